"""The watch outlives whatever it meets, takes a run only when it is whole, and sees popularity made anew."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import vista.serving.deployment
from tests.serving.server import fill, saved_run
from vista.checkpoint import Run, model_version, write_popularity
from vista.errors import CheckpointError
from vista.serving.deployment import Deployment, RunFolders
from vista.serving.metrics import Metrics
from vista.serving.options import ServeOptions
from vista.serving.scorer import Asked
from vista.store.contract import SummaryStore, open_store

WAIT_S = 10.0


@contextmanager
def deployed(folder: Path, **changes: object) -> Iterator[tuple[Deployment, Run, SummaryStore]]:
    run = saved_run(folder / "runs" / "a", **changes)
    with open_store(f"memory:{folder}") as store:
        fill(store, run)
        deployment = Deployment(ServeOptions(folder / "runs", "memory:x", watch_s=0.01), store, Metrics())
        yield deployment, run, store
        deployment.close()


def wait_until(is_so) -> None:
    end_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.fixture
def said(monkeypatch) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    monkeypatch.setattr(vista.serving.deployment, "say", lambda what, **facts: found.append({"what": what, **facts}))
    return found


def test_a_folder_that_is_away_for_a_moment_does_not_end_the_watch(tmp_path, said):
    with deployed(tmp_path) as (deployment, run, store):
        other = saved_run(tmp_path / "b", seed=1)
        (tmp_path / "runs").rename(tmp_path / "away")
        fill(store, other)
        wait_until(lambda: said)
        time.sleep(0.1)
        assert deployment.model.version == run.version  # the old one goes on ...
        assert len(said) == 1  # ... and the log says why, once
        assert "cannot be read" in said[0]["problem"]
        (tmp_path / "b").rename(tmp_path / "away" / "b")
        (tmp_path / "away").rename(tmp_path / "runs")
        wait_until(lambda: deployment.model.version == other.version)


def test_an_error_that_nobody_thought_of_does_not_end_it_either(tmp_path, said, monkeypatch):
    with deployed(tmp_path) as (deployment, _, store):
        published = store.published
        monkeypatch.setattr(store, "published", lambda: 1 // 0)
        wait_until(lambda: said)
        monkeypatch.setattr(store, "published", published)
        other = saved_run(tmp_path / "runs" / "b", seed=1)
        fill(store, other)
        wait_until(lambda: deployment.model.version == other.version)
    assert "ZeroDivisionError" in said[0]["problem"]


@pytest.mark.parametrize("name", ["config.json", "schema.json"])
def test_a_run_that_was_looked_at_while_it_was_copied_is_found_when_it_is_whole(tmp_path, name):
    whole = saved_run(tmp_path / "whole")
    (tmp_path / "runs").mkdir()
    folders, copy = RunFolders(tmp_path / "runs"), tmp_path / "runs" / "a"
    shutil.copytree(tmp_path / "whole", copy)
    text = (copy / name).read_text()
    for part in (text[: len(text) // 2], "{}"):
        (copy / name).write_text(part)
        with pytest.raises(CheckpointError, match=f"no run has version {whole.version}"):
            folders.folder_of(whole.version)
    (copy / name).write_text(text)
    assert folders.folder_of(whole.version) == copy
    (copy / name).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        model_version(copy)


def test_popularity_that_was_made_anew_is_used_without_a_new_version(tmp_path, said):
    with deployed(tmp_path, sketch_slots=8, popularity_hours=24) as (deployment, run, _):
        before = deployment.model

        def score() -> float:
            scorer = deployment.model.scorer
            return float(scorer.score(scorer.cold(1), [Asked(np.array([run.catalogue.first_item]), 0)])[0][0, 0])

        first, shape = score(), (run.catalogue.num_indices, len(run.schema.count_features))
        write_popularity(run.folder, np.full(shape, 3.0, np.float32), 1)
        wait_until(lambda: deployment.model is not before)
        assert deployment.model.version == before.version
        assert abs(score() - first) > 1e-6
        assert said[-1]["what"] == "popularity was read anew"
        after = deployment.model
        (run.folder / "popularity.safetensors").write_bytes(b"x")
        wait_until(lambda: said[-1]["what"] == "popularity cannot be read")
        assert deployment.model is after
