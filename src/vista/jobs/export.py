"""The lake route: summaries as of many moments of the past, as Parquet, to train other models from.

They are read at the same segment borders, by the same walk along each history, as in training and evaluation. Users go
in parts of fixed size; a finished part is kept, and the next call with the same arguments goes on behind it.

Shape letters: R requests, K summary tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from vista.batches.builder import Step
from vista.batches.plans import Feed
from vista.batches.timelines import MemoryCarry, TimelineWalk
from vista.checkpoint import Run
from vista.data.features import events_before
from vista.data.histories import Impressions, PreparedData
from vista.data.requests import MomentColumns, places_of, read_moments
from vista.data.summaries import CODECS, ExportFacts, Summaries, begin_export, end_export, write_part
from vista.errors import CheckpointError, ConfigError, nearest
from vista.models.inputs import ragged_arange
from vista.progress import Progress
from vista.schema import SPLITS

USERS_PER_PART = 1024
AS_OF = ("borders", "times")


@dataclass(frozen=True)
class ExportOptions:
    """as_of: ``borders``, a row per segment border; ``times``, a row per user and time asked for.

    requests: a table with user ids and times; None: all borders, or the data's own requests. With ``borders``, only
    borders are exported that are the newest at the time of a request.
    """

    as_of: str = "borders"
    requests: Path | str | None = None
    columns: MomentColumns = field(default_factory=MomentColumns)
    codec: str = "float32"
    users_per_part: int = USERS_PER_PART


@dataclass(frozen=True)
class ExportReport:
    """Rows written now, parts in all and of these kept from before, requests of users the data does not know."""

    num_rows: int
    num_parts: int
    num_kept: int
    num_unknown: int
    version: str


@dataclass(frozen=True)
class Moments:
    """R distinct moments of users, sorted by user index, then time: user, timestamp_us, num_known (R,) int64."""

    user: np.ndarray
    timestamp_us: np.ndarray
    num_known: np.ndarray

    def of_users(self, first: int, end: int) -> Moments:
        rows = slice(*np.searchsorted(self.user, [first, end]))
        return Moments(self.user[rows], self.timestamp_us[rows], self.num_known[rows])

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.user.tobytes() + self.timestamp_us.tobytes()).hexdigest()[:16]


def export(
    run: Run, data: PreparedData, out: Path, options: ExportOptions | None = None, quiet: bool = False
) -> ExportReport:
    """Write summaries to the folder ``out``.

    Raises ConfigError for an unknown codec or kind of moments, CheckpointError for a model without summary tokens or
    for data it was not trained on, StaleOutput for an ``out`` with something else in it.
    """
    options = options or ExportOptions()
    _check(run, data, options)
    asked, num_unknown = _asked(data, options)
    facts = _facts(run, data, options, asked)
    with torch.no_grad():
        cold_start = run.sequence_model.empty_summary(1)[0].float().numpy()
    todo = begin_export(out, facts, cold_start)
    num_rows = done = 0
    users = [min(part * options.users_per_part, data.histories.num_users) for part in range(facts.num_parts + 1)]
    try:
        with Progress("export", total=_num_events(data, users, todo), unit="events", quiet=quiet) as progress:
            for part in todo:
                first, end = users[part], users[part + 1]
                wanted = _wanted(data, asked, options, run.config.model.segment_events, first, end)
                before = progress.done
                num_rows += write_part(out, part, facts, _summaries(run, data, wanted, progress))
                done += 1
                # users without moments, and events behind the last moment, are done without being read
                progress.advance(before + _num_events(data, [first, end], [0]) - progress.done)
    except KeyboardInterrupt:
        kept = facts.num_parts - len(todo) + done
        raise KeyboardInterrupt(f"{kept} of {facts.num_parts} parts kept in {out}; the same command goes on") from None
    end_export(out, facts)
    return ExportReport(num_rows, facts.num_parts, facts.num_parts - len(todo), num_unknown, run.version)


def _check(run: Run, data: PreparedData, options: ExportOptions) -> None:
    if options.codec not in CODECS:
        raise ConfigError(f"--codec {options.codec!r}: unknown{nearest(options.codec, CODECS)}")
    if options.as_of not in AS_OF:
        raise ConfigError(f"--as-of {options.as_of!r}: unknown{nearest(options.as_of, AS_OF)}")
    if run.summarizer is None:
        raise CheckpointError(f"{run.folder}: a model without summary tokens; train one with --model vista")
    run.check_data(data.manifest, data.catalogue, data.folder)


def _facts(run: Run, data: PreparedData, options: ExportOptions, asked: Moments | None) -> ExportFacts:
    return ExportFacts(
        version=run.version,
        as_of=options.as_of,
        codec=options.codec,
        num_tokens=run.config.model.num_seeds,
        width=run.config.model.width,
        num_parts=max(1, -(-data.histories.num_users // options.users_per_part)),
        users_per_part=options.users_per_part,
        has_integer_ids=data.user_ids.dtype.kind == "i",
        data=data.manifest.fingerprint,
        requests=asked.fingerprint if asked is not None else "",
    )


def _asked(data: PreparedData, options: ExportOptions) -> tuple[Moments | None, int]:
    """The moments asked for (None: every border), and how many are of users the data does not know."""
    if options.requests is not None:
        _, ids, timestamp_us = read_moments(options.requests, options.columns)
        user = places_of(ids, data.user_ids)
    elif options.as_of == "times":
        splits = [data.impressions(split) for split in SPLITS]
        user, timestamp_us = (
            np.concatenate([np.asarray(getattr(split, name), np.int64) for split in splits])
            for name in ("user", "timestamp_us")
        )
    else:
        return None, 0
    is_known = user >= 0
    distinct = np.unique(np.column_stack([user, timestamp_us])[is_known], axis=0)
    user, timestamp_us = np.ascontiguousarray(distinct.T)
    return Moments(user, timestamp_us, events_before(data, user, timestamp_us)), int((~is_known).sum())


def _num_events(data: PreparedData, users: list[int], parts: list[int]) -> int:
    """Events of the users of some parts; users: where each part begins."""
    offsets = data.histories.offsets
    return sum(int(offsets[users[part + 1]] - offsets[users[part]]) for part in parts)


def _wanted(
    data: PreparedData, asked: Moments | None, options: ExportOptions, segment_events: int, first: int, end: int
) -> Moments:
    """What to write for users first .. end - 1."""
    if asked is not None and options.as_of == "times":
        return asked.of_users(first, end)
    offsets = np.asarray(data.histories.offsets[first : end + 1], np.int64)
    if asked is None:
        closed = np.diff(offsets) // segment_events
        user = np.repeat(np.arange(first, end), closed)
        segment = ragged_arange(np.ones(end - first, np.int64), closed)
    else:
        mine = asked.of_users(first, end)
        borders = np.unique(np.column_stack([mine.user, mine.num_known // segment_events]), axis=0)
        user, segment = borders[borders[:, 1] > 0].T
    num_known = segment * segment_events
    newest = np.asarray(data.histories.timestamp_us[offsets[user - first] + num_known - 1], np.int64)
    return Moments(user, newest + 1, num_known)  # known from the next microsecond on


def _summaries(run: Run, data: PreparedData, wanted: Moments, progress: Progress) -> Iterator[Summaries]:
    """The summaries at these moments, as the walk comes by."""
    model = run.sequence_model
    feed = Feed(data.histories, _without_candidates(wanted), run.config)
    carry = MemoryCarry()
    for step in TimelineWalk(feed):
        with torch.no_grad():
            memory = carry.gather(step, model.init_memory(len(step.users)))
            tokens, _, last = model.summaries(step.batch, model.embed(step.batch.events), memory)
        carry.keep(step, last)
        progress.advance(int(step.batch.num_segments.sum()) * run.config.model.segment_events)
        yield _rows(step, tokens.float().numpy(), data.user_ids)


def _rows(step: Step, tokens: np.ndarray, user_ids: np.ndarray) -> Summaries:
    """One row per request of a step; tokens (borders, K, D)."""
    borders, requests = step.batch.borders, step.batch.requests
    border = requests.summary.numpy()
    num_events, first_us, last_us = (
        getattr(borders.progress, name).numpy()[border] for name in ("num_events", "first_us", "last_us")
    )
    user = np.array(step.users)[borders.lane.numpy()[border]]
    return Summaries(
        user_ids[user], requests.timestamp_us.numpy(), last_us, num_events, last_us - first_us, tokens[border]
    )


def _without_candidates(moments: Moments) -> Impressions:
    """Requests that nothing is to be scored for."""
    size = len(moments.user)
    return Impressions(
        user=moments.user, timestamp_us=moments.timestamp_us, num_known=moments.num_known,
        offsets=np.zeros(size + 1, np.int64), item=np.zeros(0, np.int32), label=np.zeros((0, 1), np.int8),
        source=np.zeros(0, np.int8), context=np.zeros((0, 0), np.float32),
    )  # fmt: skip
