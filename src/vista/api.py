"""The commands as Python calls. Each takes paths, does what the command of the same name does, and returns the result.

prepare    event log -> prepared data         train      prepared data -> run
load       run -> model, config, catalogue    evaluate   run, data -> metrics
summarize  run, data -> store                 rank       run, store, user, candidates -> scores
export     run, data -> summaries as of past moments, as Parquet
plan       users, events, model -> storage, traffic, cores and machines
export_model   run -> the ranking as a program for torch without vista
forget     data, store, users -> both without some of their events
stream     run, event log, store -> states and tokens kept up to date
stream_status  event log, store -> how far streams are, and how far behind
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from math import inf
from pathlib import Path
from typing import Any

from vista.checkpoint import Run, load_run
from vista.config import parse_overrides, resolve, setting_key
from vista.data.forget import Selection
from vista.data.histories import PreparedData
from vista.data.prepare import PrepareOptions
from vista.data.prepare import prepare as _prepare
from vista.data.requests import MomentColumns
from vista.devices import chosen_device
from vista.errors import ConfigError, nearest
from vista.evaluation.evaluate import evaluate as _evaluate
from vista.evaluation.results import Evaluation
from vista.jobs.export import ExportOptions, ExportReport
from vista.jobs.export import export as _export
from vista.jobs.forget import ForgetReport
from vista.jobs.forget import forget as _forget
from vista.jobs.sources.contract import open_source
from vista.jobs.stream import Stream, StreamOptions, StreamReport, stopped_by_signals
from vista.jobs.stream_status import PartitionStatus
from vista.jobs.stream_status import stream_status as _stream_status
from vista.jobs.summarize import SummarizeReport, make_engine
from vista.jobs.summarize import summarize as _summarize
from vista.planning.plan import Demand, Machine, Plan, make_plan
from vista.planning.rates import ChosenRates, rates_for
from vista.planning.sizes import fresh_run, user_bytes
from vista.schema import Manifest
from vista.serving.graph import export_model as _export_model
from vista.serving.scorer import Scorer
from vista.store.contract import open_store
from vista.store.record import CODECS
from vista.training.loop import train as _train

__all__ = [
    "evaluate",
    "export",
    "export_model",
    "forget",
    "load",
    "plan",
    "prepare",
    "rank",
    "stream",
    "stream_status",
    "summarize",
    "train",
]


def prepare(events: Path | str, out: Path | str, **options: Any) -> Manifest:
    """Prepare an event log; ``options`` are the fields of ``vista.data.prepare.PrepareOptions``."""
    return _prepare(PrepareOptions(events=str(events), **options), Path(out))


def train(
    data: Path | str, out: Path | str, size: str = "small", resume: bool = False, quiet: bool = False,
    device: str = "cpu", **settings: Any,
) -> Run:  # fmt: skip
    """Train a model and load it. Settings are those of ``vista.config``, as in ``width=32`` or ``max_steps=500``.

    device: ``cpu``, ``cuda`` or ``cuda:1``; the run that is returned is on the CPU. Raises ConfigError for a setting
    that is unknown or out of range, and for a device that is not there.
    """
    config = resolve(size, overrides={setting_key(name): value for name, value in settings.items()})
    place = chosen_device(device)
    return load_run(_train(PreparedData.open(data), Path(out), config, resume, quiet, device=place))


def load(run: Path | str) -> Run:
    """A trained run: its ``summarizer``, ``ranker``, ``model``, ``config``, ``catalogue`` and ``version``."""
    return load_run(run)


def evaluate(
    run: Path | str, data: Path | str, split: str = "test", full_ranking: bool = False, quiet: bool = False,
    device: str = "cpu",
) -> Evaluation:  # fmt: skip
    """Metrics and slices of a run on a split of the data it was trained on; device: where its model computes."""
    loaded = load_run(run, str(chosen_device(device)))
    return _evaluate(loaded, PreparedData.open(data), split, full_ranking, quiet)


def summarize(
    run: Path | str,
    data: Path | str,
    store: str,
    codec: str = "int8",
    all_users: bool = False,
    quiet: bool = False,
    publish: bool = True,
    engine: str = "local",
    workers: int | None = None,
    ray_address: str | None = None,
    device: str = "cpu",
) -> SummarizeReport:
    """Every user's summary into a store (a path or a URL), published unless told otherwise.

    engine: ``local``, or ``ray`` (at ``ray_address``); workers: processes that fold, None for one per core where there
    is enough to do; device: where the model computes, a GPU being fed by this process alone. Users that cannot be
    summarized are in the report's ``failed``. Raises ConfigError for an unknown engine, codec or device, before
    anything is written.
    """
    place = chosen_device(device)
    chosen = make_engine(engine, workers, ray_address, place)
    if codec not in CODECS:
        raise ConfigError(f"codec {codec!r}{nearest(codec, CODECS)}")
    loaded, prepared = load_run(run, str(place)), PreparedData.open(data)  # before there is a store
    loaded.check_data(prepared.manifest, prepared.catalogue, prepared.folder)
    with open_store(str(store)) as opened:
        return _summarize(loaded, prepared, opened, codec, all_users, quiet, publish, chosen)


def export(
    run: Path | str, data: Path | str, out: Path | str, as_of: str = "borders", requests: Path | str | None = None, *,
    codec: str = "float32", user_column: str = "user_id", timestamp_column: str = "timestamp",
    time_unit: str | None = None, quiet: bool = False,
) -> ExportReport:  # fmt: skip
    """Summaries as of segment borders or of the times of requests, as Parquet files; see docs/lake.md."""
    columns = MomentColumns(user_column, timestamp_column, time_unit)
    options = ExportOptions(as_of, requests, columns, codec)
    return _export(load_run(run), PreparedData.open(data), Path(out), options, quiet)


def plan(
    demands: Sequence[Demand], machine: Machine | None = None, size: str = "base", run: Path | str | None = None,
    overrides: Sequence[str] = (), codec: str = "int8", rates: dict[str, float] | None = None,
    gpu_events_per_s: float = 0.0,
) -> tuple[list[Plan], ChosenRates]:  # fmt: skip
    """How large a cluster each demand needs, and the core times that follow from; see docs/scaling.md.

    run: plan for this model, else for a fresh one of a size with overrides such as ``model.memory=sum``; rates: fields
    of ``vista.planning.rates.Rates`` that were measured elsewhere.
    """
    if codec not in CODECS:
        raise ConfigError(f"--codec {codec!r}: unknown{nearest(codec, CODECS)}")
    if run is not None and overrides:
        raise ConfigError(f"--set {overrides[0]!r}: the run {run} has its own settings; leave one of the two out")
    if not 0 <= gpu_events_per_s < inf:
        raise ConfigError(f"--gpu-events-per-s {gpu_events_per_s:g}: it must be 0 or more")
    model = load_run(run) if run is not None else fresh_run(resolve(size, overrides=parse_overrides(overrides)))
    chosen = rates_for(model.config.model, rates or {})
    found = {}
    for history in {demand.history for demand in demands}:
        found[history] = user_bytes(model, max(int(history), 1), codec)
    machine = machine or Machine()
    made = [make_plan(demand, found[demand.history], chosen.rates, machine, gpu_events_per_s) for demand in demands]
    return made, chosen


def export_model(run: Path | str, out: Path | str, compiled: bool = False) -> Path:
    """The ranking as a program that torch runs without vista, and compiled, too; its path. See docs/serving.md."""
    return _export_model(load_run(run), Path(out), compiled)


def rank(run: Path | str, store: str, user: Any, candidates: list[Any], at_us: int | None = None) -> dict[str, Any]:
    """Score one user's candidates from a store, as of ``at_us`` (microseconds since 1970 UTC; default now).

    Returns user, candidates, scores (one probability per candidate, of the first task), task_scores (the same of every
    task, by its name), known_user, known_candidates, num_events, as_of_us and version. For many calls keep a
    ``vista.serving.scorer.Scorer``.
    """
    if not candidates:
        raise ConfigError("candidates is empty: name at least one item")
    loaded = load_run(run)
    with open_store(str(store), read_only=True) as opened:
        (ranking,) = Scorer(loaded, opened).rank([user], [candidates], at_us)
    task_scores = dict(zip(loaded.schema.tasks, ranking.probability.T.tolist(), strict=True))
    return {
        "user": user,
        "candidates": list(candidates),
        "scores": task_scores[loaded.schema.tasks[0]],
        "task_scores": task_scores,
        "known_user": ranking.is_known_user,
        "known_candidates": ranking.is_known_item.tolist(),
        "num_events": ranking.num_events,
        "as_of_us": ranking.as_of_us,
        "version": loaded.version,
    }


def forget(
    data: Path | str, store: str, users: Sequence[Any], runs: Sequence[Path | str] = (), *, item: Any = None,
    before_us: int | None = None, everything: bool = False, delete_others: bool = False, quiet: bool = False,
) -> ForgetReport:  # fmt: skip
    """Remove users' events of an item, before a moment (microseconds since 1970 UTC), or all, from data and store.

    runs: the model versions in the store whose records are to be made anew. See docs/forgetting.md.
    """
    selection = Selection(tuple(users), item, before_us, everything)
    return _forget(Path(data), str(store), selection, [load_run(run) for run in runs], delete_others, quiet)


def stream(run: Path | str, source: str, store: str, stop_on_signals: bool = False, **options: Any) -> StreamReport:
    """Events from a log (``dir:PATH``, ``redis://...``, ``kafka://...``) into a store; see docs/stream.md.

    options: the fields of ``vista.jobs.stream.StreamOptions``; with ``until_end=True`` it returns when the log is read.
    stop_on_signals: SIGTERM and SIGINT end it after the micro-batch under way; for the main thread.
    """
    wanted = StreamOptions(**options)
    loaded = load_run(run)
    with open_source(source) as log, open_store(str(store)) as opened:
        made = Stream(loaded, opened, log, wanted)
        with stopped_by_signals(made) if stop_on_signals else nullcontext():
            return made.go()


def stream_status(source: str, store: str, log: str | None = None) -> list[PartitionStatus]:
    """How far the streams of a log into a store are, by model version and partition. log: the name given with --log."""
    with open_source(source) as opened_source, open_store(str(store), read_only=True) as opened:
        return _stream_status(opened, opened_source, log)
