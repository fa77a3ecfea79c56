"""A run evaluated on a split: each score from what was known then, the catalogue ranked as one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.training.worlds import SMALL, write_world
from vista.batches.feeds import make_feed
from vista.batches.timelines import TimelineWalk
from vista.checkpoint import Run, load_run
from vista.cli.main import app
from vista.config import resolve, setting_key
from vista.data.histories import Impressions, PreparedData
from vista.errors import CheckpointError, ConfigError
from vista.evaluation.evaluate import best_possible, evaluate, model_name, model_names, with_candidates
from vista.evaluation.metrics import normalized_entropy, ranking_metrics
from vista.evaluation.results import Evaluation
from vista.jobs.summarize import summarize
from vista.models.baselines import base
from vista.models.inputs import Events
from vista.training.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PreparedData:
    return write_world(tmp_path_factory.mktemp("world") / "data")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Run:
    settings = SMALL | {"train.max_steps": 12, "model.popularity_hours": 0}  # which no state holds
    return load_run(
        train(data, tmp_path_factory.mktemp("run") / "run", resolve("tiny", overrides=settings), quiet=True)
    )


@torch.no_grad()
def logits_alone(run: Run, data: PreparedData, request: int, items: np.ndarray) -> np.ndarray:
    """One test request by itself: a state up to the newest closed border, recent events up to the request."""
    model, log, test = run.sequence_model, data.histories, data.impressions("test")
    start, known = int(log.offsets[test.user[request]]), int(test.num_known[request])
    columns = (
        torch.from_numpy(a[start : start + known].astype(np.int64)) for a in (log.item, log.action, log.timestamp_us)
    )
    state = model.extend(model.init_state(1), Events.from_log(*columns, torch.tensor([0, known])))
    at_us = torch.tensor([int(test.timestamp_us[request])])
    candidates = torch.from_numpy(items.astype(np.int64))[None]
    facts = (state.recent, torch.tensor([known]), at_us, candidates)
    return model.rank_users(model.state_tokens(state), *facts, sketch=model.state_sketch(state))[0, :, 0].numpy()


def test_metrics_are_those_of_the_scores_one_request_at_a_time(data, run):
    test = data.impressions("test")
    logits = [
        logits_alone(run, data, r, test.item[test.offsets[r] : test.offsets[r + 1]]) for r in range(test.num_requests)
    ]
    expected = normalized_entropy(test.label[:, 0], 1 / (1 + np.exp(-np.concatenate(logits).astype(np.float64))))
    result = evaluate(run, data, quiet=True)
    assert result.metrics["click"]["ne"] == pytest.approx(expected, rel=1e-5)
    assert result.protocol["version"] == run.version
    assert [line["step"] for line in result.learning_curve] == [5, 10, 12]
    assert Evaluation.from_json(json.loads(result.dumps())) == result


def test_full_ranking_ranks_the_positive_among_all_items(data, run):
    test = data.impressions("test")
    items = np.arange(run.catalogue.first_item, run.catalogue.num_indices)
    ranks = []
    for r in range(test.num_requests):
        rows = slice(int(test.offsets[r]), int(test.offsets[r + 1]))
        positives = test.item[rows][test.label[rows, 0] == 1]
        if len(positives) == 1:
            logits = logits_alone(run, data, r, items)
            ranks.append(1 + int((logits > logits[positives[0] - items[0]]).sum()))
    expected = ranking_metrics(np.array(ranks))
    result = evaluate(run, data, full_ranking=True, quiet=True)
    assert len(ranks) > 10
    for name, value in expected.items():
        assert result.metrics["click"][name] == pytest.approx(value), name


def test_a_positive_that_the_catalogue_does_not_hold_is_left_out_of_the_full_ranking(data, run, monkeypatch):
    """As in new data that was prepared with the catalogue of older data."""
    whole = evaluate(run, data, full_ranking=True, quiet=True).metrics["click"]["num_ranked"]
    impressions = PreparedData.impressions
    changed = 0

    def with_unknown(self: PreparedData, split: str) -> Impressions:
        nonlocal changed
        found = impressions(self, split)
        item = np.array(found.item)
        first = found.offsets[0]
        rows = np.arange(first, found.offsets[10])
        rows = rows[np.asarray(found.label[rows, 0]) == 1]
        item[rows] = 2  # an unknown bucket
        changed = sum(np.asarray(found.label[found.offsets[r] : found.offsets[r + 1], 0]).sum() == 1 for r in range(10))
        return replace(found, item=item)

    monkeypatch.setattr(PreparedData, "impressions", with_unknown)
    ranked = evaluate(run, data, full_ranking=True, quiet=True).metrics["click"]["num_ranked"]
    assert changed > 0
    assert ranked == whole - changed


def test_tables_tell_models_apart_that_differ_in_a_setting_alone(data, run, tmp_path):
    """Their mean would be of no model."""
    wide, other_seed = run_of(data, tmp_path / "a", head_width=8), run_of(data, tmp_path / "b", seed=1, head_width=8)
    narrow = run_of(data, tmp_path / "c", head_width=4)
    plain = model_name(wide)
    assert model_names([wide, other_seed]) == [plain, plain]
    assert model_names([wide, other_seed, narrow]) == [*[f"{plain}, head_width=8"] * 2, f"{plain}, head_width=4"]
    with pytest.raises(ConfigError, match="each run once"):
        model_names([wide, load_run(wide.folder)])
    told = CliRunner().invoke(
        app, ["evaluate", str(wide.folder), str(narrow.folder), "--data", str(data.folder), "--json"]
    )
    assert [e["model"] for e in json.loads(told.stdout)["evaluations"]] == [
        f"{plain}, head_width=8", f"{plain}, head_width=4",
    ]  # fmt: skip


def run_of(data: PreparedData, folder: Path, **settings: object) -> Run:
    """A run of three steps."""
    overrides = SMALL | {"train.max_steps": 3} | {setting_key(name): value for name, value in settings.items()}
    return load_run(train(data, folder, resolve("tiny", overrides=overrides), quiet=True))


@pytest.mark.parametrize(("model", "name"), [("counts", "counts"), ("recent+counts", "recent+counts 16")])
def test_what_reads_counts_cannot_rank_the_catalogue(data, tmp_path, model, name):
    counts = run_of(data, tmp_path / "run", model=model)
    assert np.isfinite(evaluate(counts, data, quiet=True).metrics["click"]["ne"])
    with pytest.raises(ConfigError, match="leave out --full-ranking"):
        evaluate(counts, data, full_ranking=True, quiet=True)
    assert model_name(counts) == name


@pytest.mark.parametrize("model", ["sim", "hstu"])
def test_a_baseline_ranks_the_catalogue_as_it_scores_what_is_shown(data, tmp_path, monkeypatch, model):
    """Ranked in pieces of few candidates, the items shown get the scores they got as shown."""
    baseline = run_of(data, tmp_path / "run", model=model, history_events=30, top_k=4)
    step = next(iter(TimelineWalk(make_feed(data, baseline.config, "test")[0])))
    items = torch.arange(baseline.catalogue.first_item, baseline.catalogue.num_indices)
    with torch.no_grad():
        prepared, _ = baseline.model.prepare(step.batch, ())
        shown = baseline.model.rank(prepared, step.batch.requests)
        monkeypatch.setattr(base, "NUMBERS_PER_PIECE", 1000)
        every = with_candidates(step.batch.requests, torch.arange(len(shown)), items)
        logits = baseline.model.rank(prepared, every)[..., 0]
    found = logits.gather(1, step.batch.requests.candidate - baseline.catalogue.first_item)
    torch.testing.assert_close(found, shown[..., 0], rtol=1e-4, atol=1e-4)
    assert evaluate(baseline, data, full_ranking=True, quiet=True).metrics["click"]["hr@10"] > 0
    assert model_name(baseline) == {"sim": "sim hard 4 of 30", "hstu": "hstu 30"}[model]


@pytest.mark.parametrize(
    ("model", "read"), [("twin", "the last 1,024 events"), ("vista+counts", "exact counts"), ("counts", "exact counts")]
)
def test_what_reads_more_than_a_store_holds_cannot_be_ranked_from_one(data, tmp_path, model, read):
    run = run_of(data, tmp_path / "run", model=model)
    with pytest.raises(CheckpointError, match=f"reads {read}.*which a store does not hold.*--model vista"):
        summarize(run, data, None, quiet=True)  # type: ignore[arg-type]


def test_best_possible_is_there_for_worlds_that_know_it_alone(data, tmp_path):
    assert best_possible(data) is None
    world = write_world(tmp_path / "data")
    label = world.impressions("test").label
    np.save(
        tmp_path / "data" / "impressions" / "test" / "best_score.npy", np.where(label == 1, 0.9, 0.1).astype(np.float32)
    )
    best = best_possible(PreparedData.open(tmp_path / "data"))
    assert best is not None
    assert best.metrics["click"]["auc"] == 1.0


def test_other_data_is_refused(run, tmp_path):
    write_world(tmp_path / "data")
    manifest = tmp_path / "data" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"click"', '"buy"'))
    with pytest.raises(CheckpointError, match="trained on other data"):
        evaluate(run, PreparedData.open(tmp_path / "data"), quiet=True)
