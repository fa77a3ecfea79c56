"""Evaluate a run on a split of prepared data: every impression scored from what was known then, and measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from vista.batches.feeds import make_feed
from vista.batches.plans import Feed
from vista.batches.timelines import MemoryCarry, TimelineWalk
from vista.checkpoint import Run
from vista.data.counts import last_met
from vista.data.histories import Impressions, PreparedData
from vista.data.popularity import PopularityFeatures
from vista.devices import device_of
from vista.errors import ConfigError
from vista.evaluation.metrics import Metrics, positive_rank, ranking_metrics
from vista.evaluation.results import Evaluation
from vista.evaluation.scoring import score
from vista.evaluation.slices import ScoredImpressions
from vista.evaluation.tables import BEST_POSSIBLE
from vista.models.batch import Requests
from vista.progress import Progress

# Settings that make no other model: runs that differ in these alone are runs of one.
OF_NO_MODEL = ("seed", "checkpoint_every_s", "steps_ahead", "portions_per_step")
RANKED_AT_ONCE = 65_536  # candidates x requests scored together in full ranking: some hundred megabytes


def evaluate(
    run: Run, data: PreparedData, split: str = "test", full_ranking: bool = False, quiet: bool = False
) -> Evaluation:
    """All metrics and slices of a run on one split.

    full_ranking: also HR@K and NDCG@K of each request's positive among the whole catalogue, for the first task. Raises
    CheckpointError for data the run was not trained on, ConfigError for full ranking of a model that cannot.
    """
    scored, feed = score_impressions(run, data, split, quiet)
    impressions = data.impressions(split)
    protocol = describe(data, split, impressions) | {
        "run": str(run.folder),
        "version": run.version,
        "seed": run.config.train.seed,
    }
    result = Evaluation.of(model_name(run), scored, protocol, learning_curve(run))
    if full_ranking:
        task = data.manifest.tasks[0]
        metrics = result.metrics[task] | rank_catalogue(run, feed, quiet)
        result = replace(result, metrics=result.metrics | {task: metrics})
    return result


def score_impressions(
    run: Run, data: PreparedData, split: str = "test", quiet: bool = False
) -> tuple[ScoredImpressions, Feed]:
    """All impressions of one split with a run's probabilities, and the feed they came from.

    Raises CheckpointError for data the run was not trained on.
    """
    run.check_data(data.manifest, data.catalogue, data.folder)
    impressions = data.impressions(split)
    feed, _ = make_feed(data, run.config, split)
    scores = score(run.model, feed, f"score {split}", quiet)
    distance = last_met(data.histories, impressions)
    scored = ScoredImpressions.of(impressions, data.manifest.tasks, scores.impression, scores.probability, distance)
    return scored, feed


def best_possible(data: PreparedData, split: str = "test") -> Evaluation | None:
    """The evaluation of the true probabilities, where the data is a synthetic world that knows them; else None."""
    impressions = data.impressions(split)
    if impressions.best_score is None:
        return None
    every = np.arange(impressions.num_impressions)
    best = np.asarray(impressions.best_score, np.float64)
    distance = last_met(data.histories, impressions)
    scored = ScoredImpressions.of(impressions, data.manifest.tasks, every, best, distance)
    return Evaluation.of(BEST_POSSIBLE, scored, describe(data, split, impressions))


def model_name(run: Run) -> str:
    """How tables call the model: its kind, and what it has of its own."""
    model = run.config.model
    match model.kind:
        case "vista":
            what = f"{model.attention} {'full' if model.scope == 'full' else model.memory}"
            what += f", candidates ask {model.candidate_memory}" if model.has_candidate_memory else ""
            what += f", sketch of {model.sketch_slots:,}" if model.has_sketch else ""
            what += f" and {model.sketch_traces:,} traces" if model.has_sketch and model.sketch_traces else ""
        case "recent":
            what = str(model.recent_events)
        case "counts":
            what = f"of the last {model.count_last_events:,}" if model.count_last_events else ""
        case "sim" | "twin":
            search = f"{model.search} " if model.kind == "sim" else ""
            what = f"{search}{model.top_k:,} of {model.history_events:,}"
        case _:
            what = f"{model.history_events:,}"
    return f"{model.model} {what}".rstrip()


def model_names(runs: Sequence[Run]) -> list[str]:
    """What tables call several runs: seeds of one model the same, models that differ in a setting not.

    Raises ConfigError for a run that is there twice, which would count as two seeds.
    """
    seen: dict[str, Run] = {}
    for run in runs:
        if run.version in seen:
            raise ConfigError(
                f"{run.folder}: the same weights as {seen[run.version].folder}; give each run once, or the spread over "
                "runs is too small"
            )
        seen[run.version] = run
    settings = [{k: v for part in asdict(run.config).values() for k, v in part.items()} for run in runs]
    names = [model_name(run) for run in runs]
    found = []
    for name, mine in zip(names, settings, strict=True):
        others = [s for n, s in zip(names, settings, strict=True) if n == name]
        differing = [k for k in mine if k not in OF_NO_MODEL and any(other[k] != mine[k] for other in others)]
        found.append(", ".join([name, *(f"{key}={mine[key]}" for key in differing)]))
    return found


def describe(data: PreparedData, split: str, impressions: Impressions) -> dict[str, Any]:
    """What was measured on."""
    return {
        "data": str(data.folder),
        "split": split,
        "requests": impressions.num_requests,
        "impressions": impressions.num_impressions,
    }


def learning_curve(run: Run) -> tuple[dict[str, float], ...]:
    """The validations of a run's training, from its log, each step once: a run that was resumed may have one again.

    A line that cannot be read, such as one cut by a loss of power, is left out.
    """
    path = run.folder / "log.jsonl"
    found: dict[int, dict[str, float]] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
            found[int(values["step"])] = values
        except (ValueError, TypeError, KeyError):
            continue
    return tuple(found[step] for step in sorted(found))


@torch.no_grad()
def rank_catalogue(run: Run, feed: Feed, quiet: bool = False) -> Metrics:
    """HR@K and NDCG@K of the positive of each request that has exactly one, among all items of the catalogue (task 1).

    Ties count against the positive. A positive that the catalogue does not hold cannot be ranked, and is left out.
    Context columns, which an item that was not shown does not have, are left out.
    """
    model = run.model
    if run.config.model.with_counts:
        raise ConfigError(
            f"{run.folder}: full ranking needs a score of every item for every request; a model of kind "
            f"{run.config.model.model!r} reads counts made for the shown ones alone; leave out --full-ranking"
        )
    device = device_of(model)
    items = torch.arange(run.catalogue.first_item, run.catalogue.num_indices, device=device)
    walk, carry, ranks = TimelineWalk(feed), MemoryCarry(), []
    with Progress("rank all items", total=walk.num_requests, unit="requests", quiet=quiet) as progress:
        for step in (step.to(device) for step in walk):
            batch = step.batch
            prepared, memory = model.prepare(batch, carry.gather(step, model.init_memory(len(step.users))))
            carry.keep(step, memory)
            is_positive = (batch.label[..., 0] > 0) & batch.is_valid
            positive = batch.requests.candidate.gather(1, is_positive.long().argmax(1, keepdim=True)).squeeze(1)
            is_ranked = (is_positive.sum(1) == 1) & (positive >= run.catalogue.first_item)
            chosen = is_ranked.nonzero().squeeze(1)
            for rows in chosen.split(max(1, RANKED_AT_ONCE // len(items))) if len(chosen) else ():
                requests = with_candidates(batch.requests, rows, items)
                if isinstance(feed.count_features, PopularityFeatures):
                    tables = [feed.count_features.of_all_items(int(us)) for us in requests.timestamp_us]
                    counts = torch.from_numpy(np.stack(tables)).to(device)
                    requests = replace(requests, counts=counts[:, items])
                logits = model.rank(prepared, requests)[..., 0].double()
                column = (positive[rows] - run.catalogue.first_item)[:, None]
                of_positive = logits.gather(1, column).squeeze(1)
                others = logits.scatter(1, column, -torch.inf)
                ranks.append(positive_rank(of_positive.cpu().numpy(), others.cpu().numpy()))
            progress.advance(len(batch.requests.summary))
    return ranking_metrics(np.concatenate([np.zeros(0, np.int64), *ranks]))


def with_candidates(requests: Requests, rows: torch.Tensor, items: torch.Tensor) -> Requests:
    """Some requests, each with all ``items`` (n,) as candidates."""
    context = requests.context.new_full((len(rows), len(items), requests.context.shape[-1]), torch.nan)
    return replace(requests.rows(rows), candidate=items.expand(len(rows), -1), context=context, counts=None)
