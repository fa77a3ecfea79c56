"""Training learns, resumes to the bit, survives Ctrl-C and kill -9, and refuses what it cannot learn from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from tests.training.worlds import EVENTS_PER_USER, SMALL, write_world
from vista.batches.feeds import make_feed
from vista.checkpoint import InParts, load_run, read_tensors, write_in_parts, write_tensors
from vista.cli.main import app
from vista.config import MODELS, Config, resolve
from vista.data.histories import PreparedData
from vista.errors import CheckpointError, StaleOutput, TrainingError
from vista.training import loop
from vista.training.loop import train

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PreparedData:
    return write_world(tmp_path_factory.mktemp("world") / "data")


def config(**changes: object) -> Config:
    return resolve(
        "tiny", overrides=SMALL | {"train.max_steps": 20} | {k.replace("__", "."): v for k, v in changes.items()}
    )


def tensors(run: Path, name: str = "training.safetensors") -> dict[str, torch.Tensor]:
    return read_tensors(run / name)[0]


def assert_same(a: Path, b: Path) -> None:
    for name in ("training.safetensors", "model.safetensors"):
        first, second = tensors(a, name), tensors(b, name)
        assert first.keys() == second.keys()
        differing = [key for key in first if not torch.equal(first[key], second[key])]
        assert differing == []


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Send Ctrl-C when the trainer has made so many steps."""
    step_by_step = loop.Trainer.train_step

    def interrupt(self, step):
        step_by_step(self, step)
        if self.position.step == steps:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop.Trainer, "train_step", interrupt)


@pytest.mark.parametrize("model", [*MODELS, "vista+counts", "mean+counts"])
def test_every_model_learns(data, tmp_path, model):
    settings = {
        "train__max_steps": 60,
        "model__model": model,
        "model__search": "soft",
        "train__validate_every_steps": 20,
        "train__max_epochs": 99,
    }
    train(data, tmp_path / "run", config(**settings), quiet=True)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [20, 40, 60]
    assert log[-1]["log_loss"] < log[0]["log_loss"]
    assert ("auxiliary_log_loss" in log[-1]) == (model == "sim")
    assert load_run(tmp_path / "run").version


@pytest.mark.parametrize(
    ("model", "stop"), [("vista", 1), ("vista", 7), ("vista", 15), ("recent", 15), ("sasrec+counts", 7)]
)
def test_an_interrupted_run_resumes_to_the_same_weights(data, tmp_path, monkeypatch, model, stop):
    """Stops fall before and after validations and inside epochs with lanes under way."""
    settings = config(model__model=model, model__dropout=0.1)
    train(data, tmp_path / "whole", settings, quiet=True)
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(KeyboardInterrupt, match=f"checkpoint of step {stop} kept"):
            train(data, tmp_path / "cut", settings, quiet=True)
    train(data, tmp_path / "cut", settings, resume=True, quiet=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_run_killed_at_any_moment_resumes_to_the_same_weights(data, tmp_path):
    """kill -9 right after a checkpoint was begun, again and again: at most the steps since the last one are lost."""
    settings = config(train__max_steps=30, train__checkpoint_every_s=0.001)
    train(data, tmp_path / "whole", settings, quiet=True)
    (tmp_path / "config.json").write_text(settings.to_json())
    run = tmp_path / "killed"
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: sums depend on how they are shared out
    words = [sys.executable, "-m", "tests.training.killed", str(data.folder), str(tmp_path / "config.json"), str(run)]
    done = subprocess.run(
        [*words, "0", "0.03", "0.3"], cwd=REPOSITORY, env=one_thread, capture_output=True, text=True, timeout=200,
        check=True,
    )  # fmt: skip
    assert int(done.stdout) >= 1, "no kill hit a running process"
    assert_same(tmp_path / "whole", run)


def test_a_time_budget_ends_training(data, tmp_path):
    started = time.monotonic()
    train(
        data,
        tmp_path / "run",
        config(train__max_steps=100_000, train__max_epochs=10_000, train__time_budget_s=2),
        quiet=True,
    )
    assert time.monotonic() - started < 20
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_early_stopping(data, tmp_path):
    settings = config(train__max_steps=4000, train__max_epochs=1000, train__patience=2, train__dense_lr=0.05)
    train(data, tmp_path / "run", settings, quiet=True)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    best = min(range(len(log)), key=lambda i: log[i]["validation_ne"])
    assert len(log) == best + 1 + 2
    assert read_tensors(tmp_path / "run" / "model.safetensors")[1]["step"] == log[best]["step"]


@pytest.mark.parametrize("label", [0, 1])
def test_labels_that_never_vary_are_refused(tmp_path, label):
    constant = write_world(tmp_path / "data", label=label)
    with pytest.raises(TrainingError, match=f"task 'click' is {label} in all"):
        train(constant, tmp_path / "run", config(), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["vista", "hstu+counts"])
def test_long_histories_before_the_first_request_are_read_without_a_step(tmp_path, model):
    """As where shown items were logged for the last weeks alone: whole batches hold events, but no request."""
    late = write_world(tmp_path / "data")
    for split in ("train", "validation", "test"):
        folder = tmp_path / "data" / "impressions" / split
        known = np.load(folder / "num_known.npy")
        np.save(folder / "num_known.npy", np.full_like(known, EVENTS_PER_USER - 1))
        times = late.histories.timestamp_us.reshape(-1, EVENTS_PER_USER)[np.load(folder / "user.npy"), -1]
        np.save(folder / "timestamp_us.npy", times)
    settings = config(model__model=model, train__window_segments=1, train__max_steps=8)
    run = train(PreparedData.open(late.folder), tmp_path / "run", settings, quiet=True)
    assert read_tensors(run / "training.safetensors")[1]["step"] == 8
    assert all(t.isfinite().all() for t in tensors(run, "model.safetensors").values())


def test_a_loss_that_is_not_finite_is_named(data, tmp_path):
    with pytest.raises(TrainingError, match=r"the loss is .* at step \d+ .*lower dense_lr"):
        train(
            data,
            tmp_path / "run",
            config(train__dense_lr=1e30, train__clip_norm=1e30, train__warmup_steps=1),
            quiet=True,
        )


def test_a_gradient_that_is_not_finite_is_named_before_it_is_taken(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, most: torch.tensor(float("inf")))
    with pytest.raises(TrainingError, match=r"the gradient is inf long at step 1, .*lower dense_lr"):
        train(data, tmp_path / "run", config(), quiet=True)


def test_what_is_resumed_may_go_on_longer_and_nothing_else(data, tmp_path):
    train(data, tmp_path / "run", config(train__max_steps=2), quiet=True)
    train(data, tmp_path / "run", config(train__max_steps=4), resume=True, quiet=True)
    assert read_tensors(tmp_path / "run" / "training.safetensors")[1]["step"] == 4
    assert load_run(tmp_path / "run").config.train.max_steps == 4
    for name, value in {"train.seed": 7, "train.users_per_step": 3, "model.width": 24}.items():
        other = config(train__max_steps=6, **{name.replace(".", "__"): value})
        with pytest.raises(CheckpointError, match=f"was started with {name} .*, and {value} is asked for"):
            train(data, tmp_path / "run", other, resume=True, quiet=True)
    assert read_tensors(tmp_path / "run" / "training.safetensors")[1]["step"] == 4


@pytest.mark.parametrize("model", ["vista", "counts"])
def test_counts_of_another_version_are_not_taken_for_those_of_this_one(model, data, tmp_path):
    changes = {"model__model": model, "model__sketch_slots": 16, "model__sketch_traces": 16}
    run = train(data, tmp_path / "run", config(train__max_steps=1, **changes), quiet=True)
    assert load_run(run).schema.count_features
    schema = json.loads((run / "schema.json").read_text())
    del schema["counts_version"]
    (run / "schema.json").write_text(json.dumps(schema))
    with pytest.raises(CheckpointError, match=r"are not counted as when the model was trained\); train again"):
        load_run(run)


def test_the_command_that_resumes_keeps_what_it_does_not_say(data, tmp_path):
    def run(*arguments: object) -> Result:
        return CliRunner().invoke(
            app, ["train", str(data.folder), "--out", str(tmp_path / "run"), *map(str, arguments)]
        )

    settings = [flag for key, value in SMALL.items() for flag in ("--set", f"{key}={value}")]
    assert run("--size", "tiny", *settings, "--max-steps", 2).exit_code == 0
    result = run("--size", "tiny", "--resume")
    assert result.exit_code == 2
    assert "was started with model.head_width 8, and 32 is asked for" in result.stderr
    assert run("--size", "tiny", *settings, "--resume").exit_code == 0
    assert load_run(tmp_path / "run").config.train.max_steps == 2
    assert run("--max-steps", 3, "--resume").exit_code == 0
    assert read_tensors(tmp_path / "run" / "training.safetensors")[1]["step"] == 3


def test_a_run_folder_is_not_overwritten(data, tmp_path):
    train(data, tmp_path / "run", config(train__max_steps=2), quiet=True)
    with pytest.raises(StaleOutput, match="--resume"):
        train(data, tmp_path / "run", config(train__max_steps=2), quiet=True)


def test_resuming_on_other_data_is_refused(data, tmp_path):
    train(data, tmp_path / "run", config(train__max_steps=2), quiet=True)
    other = write_world(tmp_path / "other")
    (tmp_path / "other" / "manifest.json").write_text(
        (tmp_path / "other" / "manifest.json").read_text().replace("share", "buy")
    )
    with pytest.raises(CheckpointError, match="other data"):
        train(PreparedData.open(other.folder), tmp_path / "run", config(train__max_steps=2), resume=True, quiet=True)


def test_resuming_on_data_that_was_changed_is_refused(data, tmp_path):
    """The order of users and the carried memory are those of the data as it was."""
    before = write_world(tmp_path / "data")
    train(before, tmp_path / "run", config(train__max_steps=2), quiet=True)
    replace(before.manifest, statistics={"num_users": 29}).save(before.folder)
    with pytest.raises(CheckpointError, match="was changed since it was started"):
        train(PreparedData.open(before.folder), tmp_path / "run", config(train__max_steps=4), resume=True, quiet=True)


def test_a_damaged_or_misfit_checkpoint_is_named(data, tmp_path):
    run = train(data, tmp_path / "run", config(train__max_steps=2), quiet=True)
    weights, facts = read_tensors(run / "model.safetensors")
    name = "summarizer.seeds"
    write_tensors(run / "model.safetensors", weights | {name: weights[name][1:].clone()}, facts)
    with pytest.raises(CheckpointError, match=r"'summarizer.seeds' is \(3, 16\) in the file, \(4, 16\) in the model"):
        load_run(run)
    (run / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_run(run)
    (run / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not reached its first validation"):
        load_run(run)


def test_the_version_depends_on_content_alone(data, tmp_path):
    one = train(data, tmp_path / "one", config(train__max_steps=2), quiet=True)
    same = train(data, tmp_path / "same", config(train__max_steps=2), quiet=True)
    other = train(data, tmp_path / "other", config(train__max_steps=2, train__seed=1), quiet=True)
    assert load_run(one).version == load_run(same).version
    assert load_run(one).version != load_run(other).version


def test_bfloat16_trains(data, tmp_path):
    run = train(data, tmp_path / "run", config(train__precision="bfloat16"), quiet=True)
    assert all(t.isfinite().all() for t in tensors(run, "model.safetensors").values())


def test_resuming_a_finished_run_changes_nothing(data, tmp_path):
    for name, changes in {"steps": {"train__max_steps": 6}, "stalled": {"train__patience": 1}}.items():
        settings = config(**changes)
        run = train(data, tmp_path / name, settings, quiet=True)
        before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
        train(data, run, settings, resume=True, quiet=True)
        assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("model", ["vista", "sim"])
def test_a_step_in_portions_is_the_step_at_once(data, tmp_path, model):
    """Gradients of portions are added up: after 20 steps losses differ by rounding alone."""
    curves = []
    for portions in (1, 3):
        settings = config(model__model=model, model__search="soft", train__portions_per_step=portions)
        run = train(data, tmp_path / str(portions), settings, quiet=True)
        curves.append([json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()])
    for at_once, in_portions in zip(*curves, strict=True):
        assert at_once.keys() == in_portions.keys()
        for name in at_once.keys() - {"elapsed_s"}:
            assert in_portions[name] == pytest.approx(at_once[name], abs=1e-4), name


def test_batches_built_ahead_change_nothing(data, tmp_path):
    for ahead in (0, 3):
        train(data, tmp_path / str(ahead), config(train__steps_ahead=ahead), quiet=True)
    assert_same(tmp_path / "0", tmp_path / "3")


def test_a_file_written_in_parts_is_read_as_one_written_at_once(tmp_path):
    small = {"a": torch.arange(5, dtype=torch.int8), "b": torch.tensor(3.5), "c": torch.randn(3, 2).bfloat16(),
             "d": torch.arange(4), "e": torch.zeros(0, 2), "f": torch.tensor([True, False, True])}  # fmt: skip
    big = torch.randn(7, 3)
    write_in_parts(tmp_path / "x", small | {"big": InParts((7, 3), torch.float32, big.split(2))}, {"step": 4})
    found, facts = read_tensors(tmp_path / "x")
    assert facts == {"step": 4}
    assert found.keys() == {*small, "big"}
    for name, expected in (small | {"big": big}).items():
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)


@pytest.mark.parametrize("model", ["counts", "vista"])
def test_counts_are_measured_before_the_first_step_and_kept(data, tmp_path, monkeypatch, model):
    """Training data decides what counts are standardised by; steps, Ctrl-C and resuming change nothing of it."""
    settings = config(model__model=model)
    whole, cut = train(data, tmp_path / "whole", settings, quiet=True), tmp_path / "cut"
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(data, cut, settings, quiet=True)
    monkeypatch.setattr(loop.Trainer, "measure_counts", lambda trainer: pytest.fail("measured again"))
    train(data, cut, settings, resume=True, quiet=True)
    assert_same(whole, cut)
    (mean,) = (t for name, t in tensors(whole, "model.safetensors").items() if name.endswith("counts.mean"))
    (scale,) = (t for name, t in tensors(whole, "model.safetensors").items() if name.endswith("counts.scale"))
    assert (mean != 0).any()
    assert (scale != 1).all()
    if model == "counts":
        feed, _ = make_feed(data, settings, "train")
        columns = torch.from_numpy(feed.count_features(np.arange(0), np.arange(feed.impressions.num_impressions)))
        torch.testing.assert_close(mean, columns.mean(0), rtol=1e-4, atol=1e-4)  # of all users: they are few
        torch.testing.assert_close(scale, columns.std(0, correction=0).clamp(min=0.1), rtol=1e-3, atol=1e-3)
