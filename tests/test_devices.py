"""Training, evaluation and bulk on another device than the CPU give what the CPU gives, with nothing left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.benchmark.test_leave_one_out import SMALL as NEXT_ITEM
from tests.benchmark.test_leave_one_out import cyclic
from tests.stand_in import DEVICE, stand_in
from tests.training.test_loop import stop_after
from tests.training.worlds import SMALL, write_world
from vista.benchmark.leave_one_out.entries import choose
from vista.benchmark.leave_one_out.training import NextItemTrainer
from vista.checkpoint import load_run, read_tensors
from vista.config import Config, resolve
from vista.data.histories import PreparedData
from vista.devices import chosen_device, device_of
from vista.errors import ConfigError
from vista.evaluation.evaluate import evaluate
from vista.jobs.fold import summarize_users
from vista.training.loop import train

# torch takes the stand-in's name for that of tensors without numbers; the copy is made
LOADED_THERE = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PreparedData:
    return write_world(tmp_path_factory.mktemp("world") / "data")


def config(**changes: object) -> Config:
    settings = {"train.max_steps": 6, "train.validate_every_steps": 3, "train.steps_ahead": 0}
    return resolve("tiny", overrides=SMALL | settings | {k.replace("__", "."): v for k, v in changes.items()})


def assert_same(a: Path, b: Path) -> None:
    """But for rounding: matrices that lie in another way are multiplied in another order."""
    first, second = read_tensors(a / "model.safetensors")[0], read_tensors(b / "model.safetensors")[0]
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-4, msg=name)


def test_the_stand_in_refuses_what_a_gpu_refuses():
    with stand_in() as device:
        there = torch.ones(3, device=device)
        assert (there.device, (there + 1).tolist()) == (DEVICE, [2.0, 2.0, 2.0])
        assert torch.tensor([1, 2], device=device).cpu().tolist() == [1, 2]
        assert there[torch.tensor([0, 2])].cpu().tolist() == [1.0, 1.0]
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="no numpy array"):
            there.numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model__sketch_slots": 64, "model__sketch_traces": 96},
        {"model__memory": "sum", "model__candidate_memory": "ridge"},
        {"model__memory": "delta", "model__dropout": 0.2},
        {"model__model": "recent"},
        {"model__model": "counts"},
        {"model__model": "din+counts"},
        {"model__model": "sim"},
        {"model__model": "sim", "model__search": "soft"},
        {"model__model": "twin"},
        {"model__model": "sasrec"},
        {"model__model": "hstu"},
        {"model__model": "mean"},
    ],
    ids=lambda settings: " ".join(str(value) for value in settings.values()) or "vista",
)
def test_a_model_trains_there_as_here(data, tmp_path, settings):
    chosen = config(**settings)
    with stand_in() as device:
        train(data, tmp_path / "here", chosen, quiet=True)
        train(data, tmp_path / "there", chosen, quiet=True, device=device)
        assert_same(tmp_path / "here", tmp_path / "there")
        here, there = load_run(tmp_path / "here"), load_run(tmp_path / "there", str(device))
        assert (device_of(here.model).type, device_of(there.model)) == ("cpu", DEVICE)
        can_rank_all = not chosen.model.with_counts and chosen.model.kind != "counts"
        found = [evaluate(run, data, full_ranking=can_rank_all, quiet=True).metrics for run in (here, there)]
        assert ("hr@10" in found[0]["click"]) == can_rank_all
        assert found[1]["click"] == pytest.approx(found[0]["click"], abs=1e-4)


@LOADED_THERE
@pytest.mark.parametrize(("first", "second"), [("meta", "cpu"), ("cpu", "meta"), ("meta", "meta")])
def test_what_was_begun_on_one_device_goes_on_on_another(data, tmp_path, monkeypatch, first, second):
    with stand_in():
        train(data, tmp_path / "whole", config(), quiet=True)
        with monkeypatch.context() as patch:
            stop_after(patch, 4)  # lanes are under way
            with pytest.raises(KeyboardInterrupt, match="checkpoint of step 4 kept"):
                train(data, tmp_path / "cut", config(), quiet=True, device=first)
        train(data, tmp_path / "cut", config(), resume=True, quiet=True, device=second)
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    "settings", [{"model__sketch_slots": 64}, {"model__candidate_memory": "sum"}, {"model__model": "recent"}]
)
def test_records_made_there_are_those_made_here(data, tmp_path, settings):
    users = np.arange(5)
    with stand_in() as device:
        train(data, tmp_path / "run", config(**settings, train__max_steps=1), quiet=True)
        here, there = (
            summarize_users(run.sequence_model, data.histories, users, data.user_ids[users], run.version)
            for run in (load_run(tmp_path / "run"), load_run(tmp_path / "run", str(device)))
        )
    assert len(here) == 2 * len(users)
    for a, b in zip(here, there, strict=True):
        assert (a.kind, a.user_key, a.num_events, a.as_of_us) == (b.kind, b.user_key, b.num_events, b.as_of_us)
        assert a.arrays.keys() == b.arrays.keys()
        for name, array in a.arrays.items():  # a CPU folds in tiles, which round in their own way ...
            if not name.startswith("memory_"):  # ... and holds slots by another scale; tokens are what is made of them
                np.testing.assert_allclose(array, b.arrays[name], rtol=1e-4, atol=1e-5, err_msg=name)


@LOADED_THERE
@pytest.mark.parametrize("entry", ["sasrec", "hstu", "vista"])
def test_a_next_item_model_trains_there_as_here(tmp_path, entry):
    sequences, [chosen] = cyclic(), choose([entry])
    with stand_in() as device:
        found = []
        for place in ("cpu", str(device)):
            settings = NEXT_ITEM | {"model.dropout": 0.0, "train.max_epochs": 1}
            trainer = NextItemTrainer(sequences, chosen.config(0, settings), tmp_path / place, place)
            trainer.run(quiet=True)
            found.append((trainer.measure_best(), trainer.place.curve[0]["loss"]))
    assert found[1][0] == pytest.approx(found[0][0], abs=0.02)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:x", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigError, match=f"--device '{name}'"):
        chosen_device(name)
