"""Leave-one-out: split and ranks against plain loops, training that goes on as if never cut, and what a person sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

import vista.benchmark.leave_one_out.training as training
from vista.benchmark.leave_one_out.cells import LeaveOneOutPlan, NextItemCell, run_leave_one_out
from vista.benchmark.leave_one_out.entries import ENTRIES, PUBLISHED_SET, choose
from vista.benchmark.leave_one_out.ranking import by_popularity, rank_all, ranks_of
from vista.benchmark.leave_one_out.report import results_table, write_leave_one_out
from vista.benchmark.leave_one_out.split import LeaveOneOut
from vista.benchmark.leave_one_out.training import NextItemTrainer
from vista.cli.main import app
from vista.data.sequences import Sequences
from vista.errors import ConfigError, DataError, TrainingError

NUM_ITEMS = 20
SMALL: dict[str, Any] = {
    "model.width": 16, "model.dropout": 0.1, "model.num_seeds": 4, "model.segment_events": 4, "model.recent_events": 8,
    "train.users_per_step": 16, "train.learning_rate": 0.02, "train.negatives": 16, "train.length": 8,
    "train.max_epochs": 3,
}  # fmt: skip


def cyclic(num_users: int = 60) -> Sequences:
    """Each user goes through the items in a circle: the next item is certain."""
    random = np.random.default_rng(0)
    lengths = random.integers(3, 25, num_users)
    item = np.concatenate([(random.integers(NUM_ITEMS) + np.arange(n)) % NUM_ITEMS + 1 for n in lengths])
    offsets = np.concatenate([[0], lengths.cumsum()])
    return Sequences(np.arange(num_users), np.arange(NUM_ITEMS), item, np.zeros(len(item), np.int64), offsets)


def test_the_split_is_that_of_a_plain_loop():
    sequences = cyclic()
    users = np.array([5, 2, 40, 17])
    for part, held_out in (("train", None), ("validation", 2), ("test", 1)):
        for reads in (None, 6):
            split = LeaveOneOut(sequences, 4, reads)
            batch, target = split.batch(users, part)
            row, found = 0, []
            for place, user in enumerate(users):
                events = sequences.item[sequences.offsets[user] : sequences.offsets[user + 1]].tolist()
                known = events[:-3] if held_out is None else events[:-held_out]
                following = events[1:-2] if held_out is None else events[1 : len(events) - held_out + 1]
                known, following = (x if reads is None else x[-reads:] for x in (known, following))
                start, end = batch.events.offsets[place : place + 2].tolist()
                assert batch.events.item[start:end].tolist() == known
                asked = len(known) if held_out is None else 1
                asked = min(asked, len(known), 4)
                found += following[len(following) - asked :]
                assert [int(r) for r in batch.row if start <= r < end] == list(range(end - asked, end))
                row += asked
            assert target.tolist() == found
            assert len(batch.row) == row


def test_ranks_are_those_of_a_plain_loop_and_seen_items_are_left_out():
    sequences = cyclic()
    split = LeaveOneOut(sequences, 5, None)
    users = np.arange(0, 60, 7)
    scores = np.random.default_rng(1).integers(0, 6, (len(users), NUM_ITEMS + 1)).astype(np.float64)  # with ties
    expected = []
    for row, user in enumerate(users):
        events = sequences.item[sequences.offsets[user] : sequences.offsets[user + 1]].tolist()
        target, seen = events[-1], set(events[:-1][-5:])
        others = [i for i in range(1, NUM_ITEMS + 1) if i != target and i not in seen]
        expected.append(1 + sum(scores[row, i] >= scores[row, target] for i in others))
    assert ranks_of(split, "test", users, scores).tolist() == expected


def test_popularity_counts_training_alone():
    sequences = cyclic(3)
    counts = np.zeros(NUM_ITEMS + 1, int)
    for start, end in zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True):
        for item in sequences.item[start : end - 2]:
            counts[item] += 1
    assert LeaveOneOut(sequences, 5, None).counts().tolist() == counts.tolist()
    assert by_popularity(LeaveOneOut(sequences, 5, None))(np.arange(2)).shape == (2, NUM_ITEMS + 1)


@pytest.mark.parametrize("name", ["sasrec", "hstu", "vista", "recent"])
def test_a_world_that_can_be_learned_is_learned(name, tmp_path):
    config = ENTRIES[name].config(0, SMALL | {"train.max_epochs": 12})
    trainer = NextItemTrainer(cyclic(), config, tmp_path)
    trainer.run(quiet=True)
    split = LeaveOneOut(cyclic(), 8, None)
    assert trainer.measure_best()["hr@10"] > 0.95
    assert rank_all(split, "test", by_popularity(split), quiet=True)["ndcg@10"] < 0.6


@pytest.mark.parametrize("name", ["sasrec", "vista"])
def test_a_run_that_was_cut_ends_as_one_that_was_not(name, tmp_path, monkeypatch):
    config = ENTRIES[name].config(1, SMALL)
    whole = NextItemTrainer(cyclic(), config, tmp_path / "whole")
    whole.run(quiet=True)
    for _ in range(3):
        cut = NextItemTrainer(cyclic(), config, tmp_path / "cut")
        for _ in range(2):
            cut.train_step()
            if cut.place.step % cut.steps_per_epoch == 0:
                cut.end_epoch()
        cut.save()
    resumed = NextItemTrainer(cyclic(), config, tmp_path / "cut")
    assert resumed.place.step == 6
    resumed.run(quiet=True)
    assert resumed.place.curve == whole.place.curve
    assert resumed.measure_best() == whole.measure_best()


def test_it_stops_when_validation_no_longer_gains_and_keeps_the_best_epoch(tmp_path, monkeypatch):
    config = ENTRIES["sasrec"].config(0, SMALL | {"train.patience": 2, "train.max_epochs": 9})
    trainer = NextItemTrainer(cyclic(), config, tmp_path)
    told = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr(trainer, "train_step", lambda: step(trainer))
    monkeypatch.setattr(trainer, "measure", lambda part: {"hr@10": 0.0, "ndcg@10": next(told)})
    trainer.run(quiet=True)
    assert [record["ndcg@10"] for record in trainer.place.curve] == [0.1, 0.5, 0.4, 0.3]
    assert trainer.place.best["epoch"] == 2


def step(trainer: NextItemTrainer) -> None:
    trainer.place.step += 1
    trainer.place.loss_count += 1


def test_a_loss_that_is_not_finite_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    trainer = NextItemTrainer(cyclic(), ENTRIES["sasrec"].config(0, SMALL), tmp_path)
    monkeypatch.setattr(training, "sampled_softmax", lambda query, *_: query.sum() * float("nan"))
    with pytest.raises(TrainingError, match=r"lower train\.learning_rate"):
        trainer.train_step()


def test_finished_runs_are_kept_and_popularity_runs_once(tmp_path):
    plan = LeaveOneOutPlan(cyclic(), choose(["popularity", "sasrec"]), [0, 1], SMALL)
    said: list[str] = []
    cells = run_leave_one_out(plan, tmp_path, say=said.append)
    assert [(c.entry, c.seed) for c in cells] == [("popularity", 0), ("sasrec", 0), ("sasrec", 1)]
    assert [len(c.curve) for c in cells] == [0, 3, 3]
    assert run_leave_one_out(plan, tmp_path, say=said.append) == cells
    assert sum("seed 1" in line for line in said) == 3  # begun and ended, then only told
    other = LeaveOneOutPlan(cyclic(), choose(["sasrec"]), [0], SMALL | {"train.negatives": 3})
    assert other.folder(ENTRIES["sasrec"], 0, tmp_path) != plan.folder(ENTRIES["sasrec"], 0, tmp_path)
    assert write_leave_one_out(plan, cells, tmp_path, ["vista"]).rows
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["cells"][1]["metrics"] == cells[1].metrics


def test_runs_that_are_not_over_are_told_as_such(tmp_path):
    plan = LeaveOneOutPlan(cyclic(), choose(["sasrec"]), [0], SMALL)
    trainer = NextItemTrainer(cyclic(), ENTRIES["sasrec"].config(0, SMALL), plan.folder(ENTRIES["sasrec"], 0, tmp_path))
    for _ in range(trainer.steps_per_epoch):
        trainer.train_step()
    trainer.end_epoch()
    cells = run_leave_one_out(plan, tmp_path, time_budget_s=1e-9, say=lambda line: None)
    write_leave_one_out(plan, cells, tmp_path, ["vista"])
    assert "| sasrec | 0 | 1 | 1 |" in (tmp_path / "leave-one-out.md").read_text()


def test_a_cell_that_cannot_be_read_is_named(tmp_path):
    plan = LeaveOneOutPlan(cyclic(), choose(["popularity"]), [0], SMALL)
    folder = plan.folder(ENTRIES["popularity"], 0, tmp_path)
    folder.mkdir()
    (folder / "cell.json").write_text("{")
    with pytest.raises(DataError, match=r"cell\.json: not a cell"):
        run_leave_one_out(plan, tmp_path)


def test_published_numbers_stand_beside_the_log_they_were_measured_on_alone():
    cell = NextItemCell("hstu", 0, {"hr@10": 0.3, "ndcg@10": 0.2, "hr@50": 0.5, "mrr": 0.1})
    size, nothing = PUBLISHED_SET, np.zeros(1)
    events = np.zeros(size.num_events)
    theirs = Sequences(np.arange(size.num_users), np.arange(size.num_items), events, nothing, nothing)
    assert "0.3097 / 0.1720" in results_table(theirs, [cell]).to_markdown()
    assert "0.3097" not in results_table(cyclic(), [cell]).to_markdown()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "sasrek"], "did you mean 'sasrec'"),
        (["--seeds", "a"], "whole numbers"),
        (["--order-column", "plase"], "did you mean 'place'"),
        (["--set", "model.wdith=3"], "did you mean 'model.width'"),
        (["--set", "model.model=din"], "leave-one-out has sasrec"),
        (["--set", "train.temperature=0"], "must be above 0"),
        (["--set", "model.recent_events=8", "--models", "vista"], "below segment_events"),
        (["--set", "model.candidate_memory=ridge", "--models", "vista"], "scores no candidates one by one"),
        (["--set", "model.sketch_slots=8"], "neither scope full nor a sketch"),
        (["--device", "tpu"], "--device 'tpu'"),
        (["--models", ","], "name at least one entry"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_run(arguments, message, tmp_path):
    events = written(tmp_path)
    command = ["benchmark", "leave-one-out", "--events", str(events), "--out", str(tmp_path / "out")]
    order = [] if "--order-column" in arguments else ["--order-column", "place"]
    result = CliRunner().invoke(app, [*command, *order, *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def written(tmp_path: Path) -> Path:
    sequences = cyclic()
    lengths = np.diff(sequences.offsets)
    users, places = np.repeat(sequences.user_ids, lengths), np.arange(lengths.sum())
    log = pl.DataFrame({"user_id": users, "item_id": sequences.item, "place": places})
    log.write_csv(tmp_path / "events.csv")
    return tmp_path / "events.csv"


def test_the_command_ends_with_a_table(tmp_path):
    settings = [w for key, value in SMALL.items() if key != "train.max_epochs" for w in ("--set", f"{key}={value}")]
    command = ["benchmark", "leave-one-out", "--events", str(written(tmp_path)), "--order-column", "place"]
    small = ["--min-events", "3", "--models", "popularity,sasrec", "--seeds", "0", "--max-epochs", "2"]
    result = CliRunner().invoke(app, [*command, *small, "--out", str(tmp_path / "out"), *settings])
    assert result.exit_code == 0, result.output
    assert "| sasrec | 1 |" in result.output
    assert (tmp_path / "out" / "leave-one-out.md").exists()


def test_an_unknown_setting_raises():
    with pytest.raises(ConfigError, match="unknown setting"):
        ENTRIES["sasrec"].config(0, {"train.nothing": 1})
