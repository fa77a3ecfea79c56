"""The scorer: from stored tokens to probabilities. Whole pipelines are in tests/jobs and tests/test_flow.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.worlds import NUM_ACTIONS, NUM_ITEMS, catalogue, histories, model_config
from vista.checkpoint import ModelSchema, Run, write_popularity
from vista.config import Config, resolve
from vista.errors import CheckpointError, RecordError, StoreError
from vista.models.embeddings import ItemTables
from vista.models.sketch import FEATURE_SLOTS, Sketch
from vista.models.vista import make_model
from vista.records import to_records
from vista.schema import ContextColumn
from vista.serving.scorer import Scorer
from vista.store.contract import SummaryStore, open_store
from vista.store.record import CODECS, Record, encode, error_bound, user_key

VERSION, OTHER = "0123456789abcdef", "fedcba9876543210"
LENGTHS = [40, 3, 8, 0, 17]  # events; 8 to a segment, 16 recent
USERS = ["anna", 7, "zoë", "new", 12]
AT_US = 2_000_000_000_000_000
CONTEXT = (ContextColumn("price", "number", 10.0, 2.0),)


def make_run(context: tuple[ContextColumn, ...] = (), version: str = VERSION, seed: int = 0, **changes: object) -> Run:
    """A run with random weights, none of them zero."""
    config, items = model_config(**({"popularity_hours": 0} | changes)), catalogue()
    torch.manual_seed(seed)
    counted = ("a", "b") if config.has_popularity else ()
    model = make_model(config, ItemTables.of(items), NUM_ACTIONS, 2, context, len(counted)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    schema = ModelSchema(("click", "like"), ("a", "b", "c"), context, items.fingerprint, counted)
    return Run(Path("run"), Config(model=config), schema, items, model, version)  # type: ignore[arg-type]


RUN = make_run()


@pytest.fixture
def store(tmp_path) -> Iterator[SummaryStore]:
    with open_store(str(tmp_path / "store")) as store:
        store.begin_version(VERSION, 4, 12, len(USERS))
        yield store


def records(run: Run = RUN) -> list[Record]:
    """Tokens and state of USERS, in turn."""
    with torch.no_grad():
        state = run.sequence_model.extend(run.sequence_model.init_state(len(USERS)), histories(LENGTHS))
        return to_records(run.sequence_model, state, USERS, run.version)


def put(store: SummaryStore, records: list[Record], codec: str = "float32") -> None:
    store.commit([(r.kind, r.user_key, encode(r, codec)) for r in records], VERSION)


def test_reads_what_was_stored(store):
    put(store, records())
    found = Scorer(RUN, store).read([*USERS, "nobody"])
    assert found.is_known.tolist() == [True] * 5 + [False]
    assert found.num_events.tolist() == [*LENGTHS, 0]
    events = histories(LENGTHS)
    ends = np.cumsum(LENGTHS)
    last_us = [int(events.timestamp_us[end - 1]) if n else -1 for end, n in zip(ends, LENGTHS, strict=True)]
    assert found.as_of_us.tolist() == [*last_us, -1]
    size = RUN.config.model.recent_events
    for row, (end, n) in enumerate(zip(ends, LENGTHS, strict=True)):
        held = min(n, size)
        for name in ("item", "action", "timestamp_us", "gap_us"):
            column = getattr(found.recent, name)[row]
            assert column[size - held :].tolist() == getattr(events, name)[end - held : end].tolist(), name
            assert not column[: size - held].any()
    exact = np.stack([record.arrays["tokens"] for record in records()[::2]])
    assert np.array_equal(found.tokens[:5].numpy(), exact)
    with torch.no_grad():  # as the scorer runs; with gradients sums are made in another order
        assert torch.equal(found.tokens[5:], RUN.sequence_model.empty_summary(1))


@pytest.mark.parametrize("slots", [8, 64])
def test_a_sketch_is_stored_with_the_tokens(store, slots):
    """Scores are those of the state itself, whatever the codec does to the tokens; a cold start has an empty one."""
    run = make_run(sketch_slots=slots)
    model, items = run.sequence_model, [0, 5, 11, 39]
    put(store, records(run), "float32")
    found = Scorer(run, store).rank([*USERS, "nobody"], [items] * 6, AT_US)
    with torch.no_grad():
        state = model.extend(model.init_state(6), histories([*LENGTHS, 0]))
        candidate = torch.from_numpy(run.catalogue.encode(items).astype(np.int64)).expand(6, -1)
        facts = (state.recent, state.progress.num_events, torch.full((6,), AT_US), candidate)
        tokens, sketch = model.state_tokens(state), state.memory[-1][0]
        expected = model.rank_users(tokens, *facts, sketch=sketch).sigmoid().numpy()
        without = model.rank_users(tokens, *facts, sketch=model.init_sketch(6)).sigmoid().numpy()
    np.testing.assert_allclose(np.stack([ranking.probability for ranking in found]), expected, rtol=1e-5)
    assert np.abs(expected - without)[:5].max() > 0.001, "the sketch says something, or the test would show nothing"


ASKED = [("slots", "ridge"), ("ridge", "ridge"), ("delta", "delta"), ("sum", "sum")]


@pytest.mark.parametrize(("memory", "asked"), ASKED)
def test_what_candidates_ask_is_stored_with_the_tokens(store, memory, asked):
    """Scores from the store are those of the state itself, and a cold start's those of an empty memory."""
    run = make_run(memory=memory, candidate_memory=asked)
    model, items = run.sequence_model, [0, 5, 11, 39]
    put(store, records(run), "float32")
    found = Scorer(run, store).rank([*USERS, "nobody"], [items] * 6, AT_US)
    with torch.no_grad():
        state = model.extend(model.init_state(6), histories([*LENGTHS, 0]))
        candidate = torch.from_numpy(run.catalogue.encode(items).astype(np.int64)).expand(6, -1)
        facts = (state.recent, state.progress.num_events, torch.full((6,), AT_US), candidate)
        tokens, empty = model.state_tokens(state), model.state_readout(model.init_state(6))
        expected = model.rank_users(tokens, *facts, readout=model.state_readout(state)).sigmoid().numpy()
        without = model.rank_users(tokens, *facts, readout=empty).sigmoid().numpy()
    np.testing.assert_allclose(np.stack([ranking.probability for ranking in found]), expected, rtol=1e-5)
    assert np.abs(expected - without)[0].max() > 0.001, "the memory says something, or the test would show nothing"


def test_a_record_without_what_candidates_ask_is_refused(store):
    put(store, records(RUN))
    with pytest.raises(RecordError, match="user s:anna: no readout in a record of a model whose candidates ask"):
        Scorer(make_run(candidate_memory="ridge"), store).read(["anna"])


def test_a_record_without_the_sketch_a_model_needs_is_refused(store):
    put(store, records(RUN))
    with pytest.raises(RecordError, match="no sketch_slot in a record"):
        Scorer(make_run(sketch_slots=8), store).read(["anna"])


@pytest.mark.parametrize("codec", CODECS)
def test_scores_are_those_of_tokens_within_the_codecs_bound(store, codec):
    """Nothing but the codec stands between a score from the store and one from the history itself."""
    model, size = RUN.sequence_model, RUN.config.model.recent_events
    items = [0, 5, 11, 39]
    put(store, records(), codec)
    found = Scorer(RUN, store).rank(USERS, [items] * len(USERS), AT_US)
    with torch.no_grad():
        state = model.extend(model.init_state(len(USERS)), histories(LENGTHS))
        exact = model.state_tokens(state)
        tokens = Scorer(RUN, store).read(USERS).tokens
        assert (
            np.abs(tokens.numpy() - exact.numpy())
            <= error_bound(exact.reshape(-1, 12).numpy(), codec).reshape(exact.shape)
        ).all()
        assert codec == "float32" or not torch.equal(tokens, exact)
        recent = replace(state.recent, **{n: getattr(state.recent, n)[:, -size:] for n in vars(state.recent)})
        candidate = torch.from_numpy(RUN.catalogue.encode(items).astype(np.int64)).expand(len(USERS), -1)
        at_us = torch.full((len(USERS),), AT_US)
        logits = model.rank_users(tokens, recent, state.progress.num_events, at_us, candidate)
    expected = logits.double().sigmoid().numpy()
    np.testing.assert_allclose(np.stack([ranking.probability for ranking in found]), expected, rtol=1e-6)
    assert expected.std(axis=0).min() > 0.001, "users differ, or the test would show nothing"


def test_codecs_may_differ_between_users(store):
    """As after a bulk run with another codec that was interrupted."""
    both = records()
    put(store, both[:4], "float32")
    put(store, both[4:6], "int8")
    found = Scorer(RUN, store).read(["nobody", *USERS[:3]]).tokens.numpy()
    exact = [record.arrays["tokens"] for record in both[:6:2]]
    assert np.array_equal(found[1:3], np.stack(exact[:2]))
    assert (np.abs(found[3] - exact[2]) <= error_bound(exact[2], "int8")).all()
    with torch.no_grad():
        assert np.array_equal(found[:1], RUN.sequence_model.empty_summary(1).numpy())


def test_who_is_not_known_gets_one_answer_whatever_the_company(store):
    put(store, records())
    scorer = Scorer(RUN, store)
    (alone,) = scorer.rank(["nobody"], [[1, 2]], AT_US)
    known, cold, other = scorer.rank(["anna", "nobody", "no one"], [[1, 2], [1, 2], [1, 2]], AT_US)
    assert (cold.is_known_user, cold.num_events, cold.as_of_us) == (False, 0, -1)
    np.testing.assert_allclose(cold.probability, alone.probability, rtol=1e-5)
    np.testing.assert_allclose(cold.probability, other.probability, rtol=1e-5)
    assert known.is_known_user
    assert np.abs(known.probability - cold.probability).max() > 0.001


def test_a_stored_empty_history_is_the_cold_start_but_known(store):
    put(store, records())
    empty, cold = Scorer(RUN, store).rank(["new", "nobody"], [[1, 2]] * 2, AT_US)
    assert (empty.is_known_user, cold.is_known_user) == (True, False)
    assert (empty.num_events, empty.as_of_us) == (0, -1)
    np.testing.assert_allclose(empty.probability, cold.probability, rtol=1e-5)


def test_an_empty_store_answers(store):
    (cold,) = Scorer(RUN, store).rank(["anna"], [[1, 2, 3]], AT_US)
    assert not cold.is_known_user
    assert cold.probability.shape == (3, 2)
    assert np.unique(cold.probability).size == 6


def test_an_unknown_item_has_the_score_of_its_bucket(store):
    """The answer says so; a string that is a known integer is known."""
    put(store, records())
    unknown = [f"item {n}" for n in range(40)]
    asked = ["3", 3, NUM_ITEMS, *unknown]
    (ranking,) = Scorer(RUN, store).rank(["anna"], [asked], AT_US)
    assert ranking.is_known_item.tolist() == [True, True] + [False] * 41
    assert np.array_equal(ranking.probability[0], ranking.probability[1])
    bucket = RUN.catalogue.encode(asked)
    assert len(set(bucket[2:])) == RUN.catalogue.first_item - 1, "every bucket is met"
    for index in set(bucket[2:]):
        same = ranking.probability[bucket == index]
        np.testing.assert_allclose(same, np.broadcast_to(same[0], same.shape), rtol=1e-5)
    assert np.isfinite(ranking.probability).all()


def test_users_with_different_numbers_of_candidates_do_not_touch_one_another(store):
    put(store, records())
    scorer = Scorer(RUN, store)
    asked = [[1, 2, 3, 4], [], [5], [6, 7], [1]]
    together = scorer.rank(USERS, asked, AT_US)
    assert [ranking.probability.shape for ranking in together] == [(len(own), 2) for own in asked]
    for user, own, ranking in zip(USERS, asked, together, strict=True):
        (alone,) = scorer.rank([user], [own], AT_US)
        np.testing.assert_allclose(ranking.probability, alone.probability, rtol=1e-5)
        assert ranking.is_known_item.shape == (len(own),)
    assert scorer.rank([], [], AT_US) == []


def test_the_same_user_twice_in_one_call(store):
    put(store, records())
    number, text = Scorer(RUN, store).rank([7, "7"], [[1], [1]], AT_US)
    assert number.is_known_user
    np.testing.assert_allclose(number.probability, text.probability, rtol=1e-5)


def test_context_belongs_to_its_own_candidate_and_may_be_absent(tmp_path):
    run = make_run(CONTEXT)
    with open_store(str(tmp_path)) as store:
        store.begin_version(VERSION, 4, 12, len(USERS))
        put(store, records(run))
        scorer = Scorer(run, store)
        given = [np.array([[9.0], [13.0]], np.float32), np.array([[np.nan]], np.float32)]
        one, two = scorer.rank(["anna", 7], [[1, 1], [1]], AT_US, given)
        plain_one, plain_two = scorer.rank(["anna", 7], [[1, 1], [1]], AT_US)
    assert np.abs(one.probability[0] - one.probability[1]).max() > 0.001
    np.testing.assert_allclose(plain_one.probability[0], plain_one.probability[1], rtol=1e-5)
    np.testing.assert_allclose(two.probability, plain_two.probability, rtol=1e-5)


# -- what is refused


def test_a_store_of_another_model_version_is_not_read(store):
    """Its users are not known to this model, even though the version is published."""
    put(store, records())
    store.complete_version(VERSION)
    store.publish(VERSION)
    (cold,) = Scorer(make_run(version=OTHER), store).rank(["anna"], [[1]], AT_US)
    assert not cold.is_known_user


def test_a_record_of_another_model_version_in_our_place_is_refused(store):
    put(store, [replace(record, version=OTHER) for record in records()])
    with pytest.raises(RecordError, match=f"user 'anna': belongs to model version {OTHER}, not {VERSION}"):
        Scorer(RUN, store).rank(["anna"], [[1]], AT_US)


def test_a_damaged_record_names_its_user(store):
    blob = encode(records()[2])
    store.commit([("tokens", user_key(7), blob[:100] + bytes([blob[100] ^ 4]) + blob[101:])], VERSION)
    with pytest.raises(RecordError, match=r"user 7: checksum mismatch: .*summarize the user again"):
        Scorer(RUN, store).read(["anna", 7])


def test_the_record_of_another_user_or_kind_is_refused(store):
    """As a damaged index of the store would give it: the record itself is whole."""
    tokens, state = records()[:2]
    store.commit([("tokens", user_key(7), encode(tokens)), ("tokens", user_key("anna"), encode(state))], VERSION)
    with pytest.raises(RecordError, match=r"user 7: the store has a record of kind 'tokens' of user b's:anna'"):
        Scorer(RUN, store).read([7])
    with pytest.raises(RecordError, match="user 'anna': the store has a record of kind 'state'"):
        Scorer(RUN, store).read(["anna"])


@pytest.mark.parametrize("shape", [(3, 12), (4, 13)])
def test_tokens_of_another_shape_are_refused(store, shape):
    tokens = records()[0]
    put(store, [replace(tokens, arrays=tokens.arrays | {"tokens": np.zeros(shape, np.float32)})])
    with pytest.raises(StoreError, match=rf"user 'anna': tokens of shape \({shape[0]}, {shape[1]}\).*are \(4, 12\)"):
        Scorer(RUN, store).read(["anna"])


def test_popularity_comes_from_the_runs_table(store, tmp_path):
    """Each candidate is scored with its row; without the file, or with that of other items, there is no scorer."""
    run = replace(make_run(sketch_slots=8, popularity_hours=720), folder=tmp_path)
    model, num_items = run.sequence_model, run.catalogue.num_indices
    with pytest.raises(CheckpointError, match="vista summarize makes it"):
        Scorer(run, store)
    write_popularity(tmp_path, np.zeros((num_items + 1, 2), np.float32), 0)
    with pytest.raises(CheckpointError, match="a table of shape"):
        Scorer(run, store)
    table = np.random.default_rng(0).normal(size=(num_items, 2)).astype(np.float32)
    write_popularity(tmp_path, table, 0)
    found = Scorer(run, store).rank(["nobody"], [[0, 5, 11]], AT_US)[0].probability
    candidate = torch.from_numpy(run.catalogue.encode([0, 5, 11]).astype(np.int64))[None]
    state = model.init_state(1)
    facts = (state.recent, state.progress.num_events, torch.tensor([AT_US]), candidate)
    with torch.no_grad():
        tokens, sketch = model.empty_summary(1), model.init_sketch(1)
        counts = torch.from_numpy(table)[candidate]
        expected, other = (
            model.rank_users(tokens, *facts, sketch=sketch, counts=c).sigmoid()[0].numpy() for c in (counts, counts * 0)
        )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.abs(expected - other).max() > 1e-3


@pytest.mark.parametrize(
    ("size", "slots", "traces", "predecessors"),
    [("tiny", 1664, 0, 0), ("tiny", 768, 5248, 4), ("tiny", 512, 8704, 0), ("small", 1024, 0, 0),
     ("small", 640, 3296, 0), ("small", 512, 3200, 4)],
)  # fmt: skip
def test_a_full_sketch_keeps_a_state_below_64_kilobytes(size, slots, traces, predecessors):
    """The sizes that docs/record-format.md names, with one category column, every slot taken and all events held."""
    chosen = {"slots": slots, "traces": traces, "predecessors": predecessors}
    overrides = {f"model.sketch_{name}": number for name, number in chosen.items()}
    config = resolve(size, overrides=overrides | {"model.popularity_hours": 0}).model
    items = catalogue()
    model = make_model(config, ItemTables.of(items), NUM_ACTIONS, 1, (), 0)
    assert model.sketch is not None
    # more items than slots, as many categories as a level holds
    sketch = Sketch(slots, slots + 1, (FEATURE_SLOTS,), traces, config.segment_events, predecessors)
    model.summarizer.sketch = sketch
    state = model.extend(model.init_state(1), histories([config.recent_events + 7]))
    full = tuple(torch.ones_like(part) for part in sketch.initial(1))
    state = replace(state, memory=(*state.memory[:-1], (full,)))
    stored = {record.kind: encode(record) for record in to_records(model, state, [1234567], VERSION)}
    assert 32 * (slots + FEATURE_SLOTS) + 4 * traces + 2 * slots * predecessors < len(stored["state"]) <= 65_536
