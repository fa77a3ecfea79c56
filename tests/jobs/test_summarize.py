"""Bulk summaries: what the store holds ranks as the model itself does, runs resume, and nothing is done twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.worlds import SMALL, write_world
from vista.checkpoint import Run, load_run
from vista.config import resolve
from vista.data.histories import PreparedData
from vista.errors import CheckpointError, RecordError, StoreError, VistaWarning
from vista.jobs import blocks, fold
from vista.jobs.summarize import summarize
from vista.models.inputs import Events
from vista.records import from_records, to_records
from vista.serving.scorer import Scorer
from vista.store.contract import open_store
from vista.store.record import decode, encode, error_bound, user_key
from vista.training.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PreparedData:
    return write_world(tmp_path_factory.mktemp("world") / "data")


def make_run(data: PreparedData, folder, **changes: object) -> Run:
    settings = SMALL | {"train.max_steps": 12} | {k.replace("__", "."): v for k, v in changes.items()}
    return load_run(train(data, folder, resolve("tiny", overrides=settings), quiet=True))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Run:
    return make_run(data, tmp_path_factory.mktemp("run") / "run")


def history(data: PreparedData, user: int, count: int | None = None) -> Events:
    start, end = (int(o) for o in data.histories.offsets[user : user + 2])
    end = end if count is None else start + count
    log = data.histories
    columns = (torch.from_numpy(a[start:end].astype(np.int64)) for a in (log.item, log.action, log.timestamp_us))
    return Events.from_log(*columns, torch.tensor([0, end - start]))


@torch.no_grad()
def offline_logits(run: Run, data: PreparedData, user: int, candidates: list[int], at_us: int) -> torch.Tensor:
    """A user's candidates from the whole history, no store involved."""
    model = run.sequence_model
    state = model.extend(model.init_state(1), history(data, user))
    items = torch.from_numpy(run.catalogue.encode(np.array(candidates)).astype(np.int64))[None]
    names, newest = state.recent.__dataclass_fields__, run.config.model.recent_events
    recent = replace(state.recent, **{name: getattr(state.recent, name)[:, -newest:] for name in names})
    facts = (recent, state.progress.num_events, torch.tensor([at_us]), items)
    popularity = run.read_popularity()
    return model.rank_users(
        model.state_tokens(state),
        *facts,
        sketch=model.state_sketch(state),
        readout=model.state_readout(state),
        counts=None if popularity is None else popularity[items],
    )[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__memory": "sum", "model__num_layers": 2, "model__candidate_memory": "sum"},
        {"model__memory": "ridge", "model__candidate_memory": "delta"},
        {"model__model": "recent"},
        {"model__scope": "full"},
    ],
    ids=["slots", "sum", "ridge", "recent", "full"],
)
def test_scores_from_the_store_equal_offline_scores(data, tmp_path, changes):
    run = make_run(data, tmp_path / "run", **changes)
    at_us = int(data.histories.timestamp_us.max()) + 10**9
    with open_store(str(tmp_path / "store")) as store:
        summarize(run, data, store, codec="float32", quiet=True)
        for user in (0, 7):
            (ranking,) = Scorer(run, store).rank([int(data.user_ids[user])], [[1, 5, 39]], at_us)
            offline = offline_logits(run, data, user, [1, 5, 39], at_us).double().sigmoid().numpy()
            np.testing.assert_allclose(ranking.probability, offline, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codec", ["float16", "bfloat16", "int8"])
def test_stored_tokens_are_within_the_codecs_bound_and_scores_near(data, run, tmp_path, codec):
    model, at_us = run.sequence_model, int(data.histories.timestamp_us.max()) + 10**9
    with open_store(str(tmp_path / "store")) as store:
        summarize(run, data, store, codec=codec, quiet=True)
        scorer = Scorer(run, store)
        for user in range(5):
            with torch.no_grad():
                state = model.extend(model.init_state(1), history(data, user))
                exact = model.state_tokens(state)[0].numpy()
            stored = scorer.read([int(data.user_ids[user])]).tokens[0].numpy()
            # a batch of many users rounds its matrix products differently than one user alone
            assert (np.abs(stored - exact) <= error_bound(exact, codec) + 1e-5).all()
            (ranking,) = scorer.rank([int(data.user_ids[user])], [[1, 5, 39]], at_us)
            offline = offline_logits(run, data, user, [1, 5, 39], at_us).double().sigmoid().numpy()
            assert np.abs(ranking.probability - offline).max() < 0.02


def test_a_user_the_store_does_not_know_is_ranked_from_an_empty_history(data, run, tmp_path):
    with open_store(str(tmp_path / "store")) as store:
        summarize(run, data, store, quiet=True)
        known, cold = Scorer(run, store).rank(["100", "nobody"], [[1, 2], ["1", "unheard of", 2]], 10**15)
    assert known.is_known_user
    assert not cold.is_known_user
    assert (cold.num_events, cold.as_of_us) == (0, -1)
    assert cold.is_known_item.tolist() == [True, False, True]
    model = run.sequence_model
    state = model.init_state(1)
    items = torch.from_numpy(run.catalogue.encode([1, 2]).astype(np.int64))[None]
    with torch.no_grad():
        expected = model.rank_users(
            model.state_tokens(state),
            state.recent,
            torch.tensor([0]),
            torch.tensor([10**15]),
            items,
            sketch=model.state_sketch(state),
            counts=run.read_popularity()[items],
        )[0]
    np.testing.assert_allclose(cold.probability[[0, 2]], expected.double().sigmoid().numpy(), rtol=1e-5)


def test_a_second_run_finds_everybody_current(data, run, tmp_path):
    with open_store(str(tmp_path / "store")) as store:
        first = summarize(run, data, store, quiet=True)
        again = summarize(run, data, store, quiet=True)
        forced = summarize(run, data, store, all_users=True, quiet=True)
        assert store.published() == run.version
    assert (first.num_users, first.num_current) == (30, 0)
    assert (again.num_users, again.num_current) == (0, 30)
    assert forced.num_users == 30


def test_an_interrupted_run_resumes_and_is_not_published_before(data, run, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "USERS_AT_ONCE", 8)
    num_calls = 0
    summarize_users = fold.summarize_users

    def fail_in_the_third(*arguments):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise KeyboardInterrupt
        return summarize_users(*arguments)

    with open_store(str(tmp_path / "store")) as store:
        with monkeypatch.context() as patch:
            patch.setattr(fold, "summarize_users", fail_in_the_third)
            with pytest.raises(KeyboardInterrupt, match="16 users were summarized and are in the store"):
                summarize(run, data, store, quiet=True)
        assert store.published() is None
        with pytest.raises(StoreError, match="has not ended"):
            store.publish(run.version)
        report = summarize(run, data, store, quiet=True)
        assert report.num_current == 16
        assert report.num_users + report.num_current == 30
        assert store.published() == run.version


def test_publishing_can_be_a_step_of_its_own(data, run, tmp_path):
    with open_store(f"memory:{tmp_path}") as store:
        summarize(run, data, store, quiet=True, publish=False)
        assert store.published() is None
        store.publish(run.version)
        assert store.published() == run.version


def test_states_survive_the_store_exactly(data, run):
    model = run.sequence_model
    lengths = [60, 3, 0]
    with torch.no_grad():
        states = [model.extend(model.init_state(1), history(data, u, n)) for u, n in enumerate(lengths)]
        records = []
        for state, n in zip(states, lengths, strict=True):
            record = to_records(model, state, ["someone"], run.version)[1]
            records.append(decode(encode(record), run.version) if n else None)
        together = from_records(model, records)
        more = history(data, 5, 20)
        for row, state in enumerate(states):
            one = from_records(model, [records[row]])
            torch.testing.assert_close(together.recent.item[row], state.recent.item[0], rtol=0, atol=0)
            a = model.extend(state, more)
            b = model.extend(one, more)
            assert torch.equal(model.summarizer.read(a), model.summarizer.read(b))
            assert int(a.progress.last_us) == int(b.progress.last_us)


def test_records_of_another_model_are_refused(data, run, tmp_path):
    other = make_run(data, tmp_path / "other", train__seed=5)
    with open_store(str(tmp_path / "store")) as store:
        summarize(run, data, store, quiet=True)
        key = user_key(int(data.user_ids[0]))
        (blob,) = store.get_many("tokens", [key], run.version)
        store.begin_version(other.version, 4, 16, 30)
        store.commit([("tokens", key, blob)], other.version)  # as a broken writer would
        with pytest.raises(RecordError, match=f"belongs to model version {run.version}"):
            Scorer(other, store).rank([int(data.user_ids[0])], [[1]])


def test_other_data_is_refused(run, tmp_path):
    other = write_world(tmp_path / "data")
    text = (tmp_path / "data" / "manifest.json").read_text()
    (tmp_path / "data" / "manifest.json").write_text(text.replace("share", "buy"))
    with open_store(str(tmp_path / "store")) as store, pytest.raises(CheckpointError, match="trained on other data"):
        summarize(run, PreparedData.open(other.folder), store, quiet=True)


def test_streams_start_again_where_users_are_summarized_anew(run, data, tmp_path):
    """Their states have no marks: what a log has brought since would be missing."""
    with open_store(str(tmp_path / "store")) as store:
        summarize(run, data, store, quiet=True)
        store.commit([("position", b"log", b"where it is")], run.version)
        summarize(run, data, store, quiet=True)  # nobody is
        assert store.get_many("position", [b"log"], run.version) == [b"where it is"]
        with pytest.warns(VistaWarning, match="the stream must start again"):
            summarize(run, data, store, all_users=True, quiet=True)
        assert store.get_many("position", [b"log"], run.version) == [None]
