"""Whatever order events arrive in, what is stored is what the whole, sorted log without repeats would give.

Tolerance: a replay folds the same segments in the same order as a bulk run, but as many at a time as its stretch has,
and a matrix product of another height may round its rows differently; so 2e-5, as in tests/models/test_summarizer.py.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models.worlds import DAY_US, NUM_ACTIONS, NUM_ITEMS, catalogue, model_config
from tests.training.worlds import write_world
from vista.catalogue import Catalogue
from vista.checkpoint import ModelSchema, Run
from vista.config import Config
from vista.data.sort import _is_duplicate
from vista.errors import ConfigError, DataError, Superseded
from vista.jobs.fold import summarize_users
from vista.jobs.replay import MemoryLog
from vista.models.batch import unflatten
from vista.models.borders import KeptBorders, Spacing
from vista.models.embeddings import ItemTables
from vista.models.inputs import Events
from vista.models.vista import make_model
from vista.ops.qla import widened
from vista.records import borders_from_record, borders_to_record
from vista.store.contract import SummaryStore, open_store
from vista.store.record import decode, encode, user_key
from vista.updates.apply import (
    APPLIED,
    BAD_CLOCK,
    DUPLICATE,
    MOST_TRIES,
    REPLAYED,
    SORTED_IN,
    TOO_LATE,
    Clock,
    NewEvents,
    UpdateOptions,
    apply_events,
)  # fmt: skip
from vista.updates.order import NULL_ID, UNKNOWN_ID, Arrivals, hash_event_ids, order_of, repeats
from vista.updates.refold import Tracked, refold, start_border
from vista.updates.stored import load_states

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
EXACT = {"rtol": 0, "atol": 0}
START_US, SECOND = 1_700_000_000_000_000, 1_000_000
NOW_US = START_US + 20 * 365 * DAY_US
CLOCK = Clock(now_us=NOW_US)
S, R = 8, 16  # of tests.models.worlds.model_config
VERSION = "test-version-000"[:16]
FIRST_ITEM = 5


def make_run(memory: str = "slots", attention: str = "qla", **changes: object) -> Run:
    config = model_config(memory=memory, attention=attention, **changes)
    items = catalogue()
    torch.manual_seed(0)
    model = make_model(config, ItemTables.of(items), NUM_ACTIONS, 1, (), 0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("unit.out.weight"):
                parameter.normal_(std=0.2)
    schema = ModelSchema(("click",), ("a", "b", "c"), (), items.fingerprint, ())
    return Run(None, Config(model=config), schema, items, model, VERSION)  # type: ignore[arg-type]


RUNS = {kind: make_run(*kind) for kind in [("sum", "qla"), ("slots", "qla"), ("slots", "softmax")]}
RUNS["sketch",] = make_run(sketch_slots=8, sketch_traces=16, sketch_predecessors=2, popularity_hours=0)
RUNS["delta", "ridge asked"] = make_run("delta", candidate_memory="ridge", num_layers=1)
RUN = RUNS["slots", "qla"]


class MemoryStore:
    """What `apply_events` asks of a store, in a dictionary."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, bytes], bytes] = {}

    def commit(self, writes, version: str, provided=()) -> None:
        assert version == VERSION
        assert all(self.records.get((kind, key)) == blob for kind, key, blob in provided)
        self.records |= {(kind, key): blob for kind, key, blob in writes}

    def get_many(self, kind: str, user_keys, version: str) -> list[bytes | None]:
        return [self.records.get((kind, key)) for key in user_keys]


@dataclass(frozen=True)
class Log:
    """Events in order of arrival; event_id None: a log without ids."""

    user: list[int]
    item: list[int]
    action: list[str | None]
    time: list[int]
    event_id: list[int | None] | None

    def part(self, rows) -> NewEvents:
        def pick(values):
            return None if values is None else [values[i] for i in rows]

        times = np.array(pick(self.time), np.int64)
        return NewEvents(pick(self.user), pick(self.item), times, pick(self.action), pick(self.event_id))


def stream(run: Run, log: Log, cuts: list[int], options: UpdateOptions) -> tuple[MemoryStore, np.ndarray]:
    store, outcomes = MemoryStore(), []
    for a, b in zip([0, *cuts], [*cuts, len(log.user)], strict=True):
        outcomes.append(apply_events(run, store, log.part(range(a, b)), options).outcome)
    return store, np.concatenate(outcomes)


def batch_history(log: Log, user: int) -> pl.DataFrame:
    """One user's history as `vista prepare` makes it, by its own code."""
    columns = {"user": log.user, "ticks": log.time, "item": log.item, "action": log.action}
    if log.event_id is not None:
        columns["event_id"] = log.event_id
    frame = pl.DataFrame(columns, schema_overrides={"action": pl.String, "item": pl.Int64, "ticks": pl.Int64})
    frame = frame.filter(pl.col("user") == user).sort("ticks", maintain_order=True)
    return frame.filter(~_is_duplicate(frame))


def batch_events(run: Run, log: Log, user: int) -> Events:
    frame = batch_history(log, user)
    return Events.from_log(
        torch.from_numpy(run.catalogue.encode(frame["item"].to_numpy()).astype(np.int64)),
        torch.tensor(run.schema.action_index(frame["action"].to_list()), dtype=torch.int64),
        torch.from_numpy(frame["ticks"].to_numpy().astype(np.int64)),
        torch.tensor([0, len(frame)]),
    )


@torch.no_grad()
def check_equal_to_batch(run: Run, store: Any, log: Log) -> None:
    """State and tokens of every user, those as of the border and those with the open segment."""
    model = run.sequence_model
    for user in sorted(set(log.user)):
        events = batch_events(run, log, user)
        expected = model.extend(model.init_state(1), events)
        found = load_states(model, store, [user], VERSION).tracked.state
        for name in ("num_events", "first_us", "last_us"):
            assert int(getattr(found.progress, name)) == int(getattr(expected.progress, name)), (user, name)
        for name in ("item", "action", "timestamp_us", "gap_us"):
            assert torch.equal(getattr(found.recent, name), getattr(expected.recent, name)), (user, name)
        if model.sketch is not None:
            for mine, theirs in zip(found.memory[-1][0], expected.memory[-1][0], strict=True):
                torch.testing.assert_close(mine, theirs, **(TOLERANCE if mine.is_floating_point() else EXACT))
        readout = model.state_readout(expected)
        for include_open in (True, False):
            tokens = (model.summarizer.read(state, include_open) for state in (found, expected))
            torch.testing.assert_close(*tokens, **TOLERANCE)
        stored = decode(store.get_many("tokens", [user_key(user)], VERSION)[0], VERSION)
        assert stored.num_events == len(events.item)
        torch.testing.assert_close(
            torch.from_numpy(stored.arrays["tokens"].copy()), model.state_tokens(expected)[0], **TOLERANCE
        )
        assert (readout is None) == ("readout" not in stored.arrays)
        if readout is not None:
            torch.testing.assert_close(torch.from_numpy(stored.arrays["readout"].copy()), readout[0], **TOLERANCE)


# -- the rule, over random logs


@st.composite
def logs(draw, with_ids: bool | None = None) -> tuple[Log, list[int]]:
    """A log of a few users and where it is cut: late and repeated events, equal times, gaps of ten years."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.integers(1, 120))
    with_ids = draw(st.booleans()) if with_ids is None else with_ids
    user = rng.integers(0, draw(st.integers(1, 3)), size)
    gaps = rng.choice([0, 1, 60, 86_400, 3650 * 86_400], size, p=[0.3, 0.4, 0.2, 0.095, 0.005])
    time = START_US + np.minimum(np.cumsum(gaps), 5 * 365 * 86_400) * SECOND
    item, action = rng.integers(0, NUM_ITEMS, size), rng.integers(0, NUM_ACTIONS + 1, size)
    number = rng.permutation(size)
    copies = rng.random(size) < draw(st.sampled_from([0.0, 0.1, 0.5]))
    source = np.append(np.arange(size), np.flatnonzero(copies))
    user, time, item, action, number = (column[source] for column in (user, time, item, action, number))
    if with_ids:  # the same id may come again with another time, another item, or no id at all
        moved = (np.arange(len(source)) >= size) & (rng.random(len(source)) < 0.5)
        time = np.where(moved, rng.permutation(time), time)
        item = np.where(moved, rng.integers(0, NUM_ITEMS, len(source)), item)
    lateness = draw(st.sampled_from([0, 3, 20, 200]))  # places by which an event may be late
    order = np.argsort(np.argsort(time, kind="stable") + rng.uniform(0, lateness + 0.5, len(time)), kind="stable")
    ids = [None if n % 7 == 3 else int(n) for n in number[order]] if with_ids else None
    names = [None, "a", "b", "c"]
    cuts = sorted(draw(st.lists(st.integers(0, len(source)), max_size=6)))
    return Log(
        user[order].tolist(), item[order].tolist(), [names[a] for a in action[order]], time[order].tolist(), ids
    ), cuts


@pytest.mark.parametrize("spacing", [None, Spacing(2, 2), Spacing(3, 2)], ids=["none kept", "kept", "kept wider"])
@pytest.mark.parametrize("kind", list(RUNS), ids=lambda kind: "-".join(kind))
@given(case=logs())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_order_of_arrival_equals_batch(kind, spacing, case):
    log, cuts = case
    options = UpdateOptions(MemoryLog(), spacing, CLOCK, codec="float32")
    store, outcome = stream(RUNS[kind], log, cuts, options)
    check_equal_to_batch(RUNS[kind], store, log)
    assert not np.isin(outcome, [TOO_LATE, BAD_CLOCK]).any()


@given(case=logs(), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_everything_delivered_twice_changes_nothing(case, seed):
    """At least once is enough, in any order, with ids or without (but an event without id in a log with ids counts).

    Only an id that has come with two times may cost a replay again: which of them the state holds is not known.
    """
    log, cuts = case
    met: dict[tuple[int, Any], set[int]] = {}
    for user, event_id, time in zip(log.user, log.event_id or [], log.time, strict=False):
        met.setdefault((user, event_id), set()).add(time)
    is_moved = any(len(times) > 1 for times in met.values())
    ids = None if log.event_id is None else [-1 - i if n is None else n for i, n in enumerate(log.event_id)]
    log = replace(log, event_id=ids)
    again = np.random.default_rng(seed).permutation(len(log.user)).tolist()
    options = UpdateOptions(MemoryLog(), Spacing(), CLOCK, codec="float32")
    store, _ = stream(RUN, log, cuts, options)
    before = dict(store.records)
    update = apply_events(RUN, store, log.part(again), options)
    counts = update.counts()
    assert counts["duplicate"] + counts["replayed"] == len(again)
    assert is_moved or (counts["duplicate"] == len(again) and store.records == before)
    if is_moved:
        check_equal_to_batch(RUN, store, log)


@given(case=logs(), crash_after=st.integers(0, 5))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_crash_between_log_and_store_is_made_good(case, crash_after):
    log, cuts = case
    if log.event_id is not None:
        log = replace(log, event_id=[-1 - i if n is None else n for i, n in enumerate(log.event_id)])
    source = MemoryLog()
    options = UpdateOptions(source, Spacing(), CLOCK, codec="float32")
    store = MemoryStore()
    for number, (a, b) in enumerate(zip([0, *cuts], [*cuts, len(log.user)], strict=True)):
        if number == crash_after:
            broken = MemoryStore()
            broken.records = dict(store.records)
            apply_events(RUN, broken, log.part(range(a, b)), options)  # its commit is lost, its log is not
        apply_events(RUN, store, log.part(range(a, b)), options)
    check_equal_to_batch(RUN, store, log)


def ordered_log(num_events: int, user: int = 1, step_s: int = 3600) -> Log:
    rng = np.random.default_rng(num_events)
    times = START_US + np.arange(num_events) * step_s * SECOND
    items = rng.integers(0, NUM_ITEMS, num_events).tolist()
    return Log([user] * num_events, items, ["a"] * num_events, times.tolist(), list(range(num_events)))


def one(log: Log, time: int, event_id: int | None = None, item: int = 3) -> NewEvents:
    ids = None if log.event_id is None else [event_id]
    return NewEvents([log.user[0]], [item], np.array([time]), ["b"], ids)


def plus(log: Log, events: NewEvents) -> Log:
    ids = None if log.event_id is None else [*log.event_id, *(events.event_id or [])]
    return Log(
        [*log.user, *events.user_id], [*log.item, *events.item_id], [*log.action, *(events.action or [])],
        [*log.time, *events.timestamp_us.tolist()], ids,
    )  # fmt: skip


# -- each row of the table in docs/event-order.md


def test_events_in_order_are_bit_equal_to_one_call_per_segment():
    """The same segments, each folded by itself."""
    log = ordered_log(5 * S)
    options = UpdateOptions(clock=CLOCK)
    by_event, outcome = stream(RUN, log, list(range(1, 5 * S)), options)
    by_segment, _ = stream(RUN, log, list(range(S, 5 * S, S)), options)
    assert (outcome == APPLIED).all()
    for kind in ("tokens", "state"):
        assert by_event.records[kind, user_key(1)] == by_segment.records[kind, user_key(1)]


def test_a_late_event_in_the_open_segment_is_sorted_in_without_any_replay():
    log = ordered_log(2 * S + 5)
    store, _ = stream(RUN, log, [], UpdateOptions(clock=CLOCK, codec="float32"))
    late = one(log, log.time[2 * S + 1] + 1, 999)
    update = apply_events(RUN, store, late, UpdateOptions(clock=CLOCK, codec="float32"))
    assert update.outcome.tolist() == [SORTED_IN]
    assert (update.num_changed, update.num_replays, update.num_replayed_events) == (1, 0, 0)
    check_equal_to_batch(RUN, store, plus(log, late))


def test_a_late_event_beyond_the_open_segment_is_replayed_from_what_is_held_when_a_border_is_kept():
    log = ordered_log(20 * S + 5)
    late = one(log, log.time[19 * S + 2] + 1, 999)
    options = UpdateOptions(None, Spacing(), CLOCK, codec="float32")
    store, _ = stream(RUN, log, [], options)
    update = apply_events(RUN, store, late, options)
    assert update.outcome.tolist() == [REPLAYED]
    assert update.num_replayed_events == S + 5 + 1
    check_equal_to_batch(RUN, store, plus(log, late))


@pytest.mark.parametrize(("place", "at_most"), [(90, 4 * 10 + 5), (60, 4 * 40 + 5), (0, 100)])
def test_an_older_one_is_replayed_from_the_newest_kept_border_before_it(place, at_most):
    """At most four times its age, the age counted in segments and rounded up."""
    log = ordered_log(100 * S + 5)
    late = one(log, log.time[place * S] + 1, 999)
    options = UpdateOptions(MemoryLog(), Spacing(), CLOCK, codec="float32")
    store, _ = stream(RUN, log, [333, 420], options)
    update = apply_events(RUN, store, late, options)
    assert update.outcome.tolist() == [REPLAYED]
    assert update.num_replayed_events <= at_most * S + 6
    check_equal_to_batch(RUN, store, plus(log, late))


def test_without_a_kept_border_the_replay_starts_at_the_beginning():
    log = ordered_log(10 * S)
    late = one(log, log.time[9 * S] + 1 - 3600 * SECOND, 999)
    options = UpdateOptions(MemoryLog(), None, CLOCK, codec="float32")
    store, _ = stream(RUN, log, [20], options)
    update = apply_events(RUN, store, late, options)
    assert update.num_replayed_events == 10 * S + 1
    check_equal_to_batch(RUN, store, plus(log, late))


def test_without_a_source_what_is_too_late_is_given_back_and_the_rest_applied():
    log = ordered_log(20 * S)
    options = UpdateOptions(None, Spacing(), CLOCK, codec="float32")
    store, _ = stream(RUN, log, [], options)
    times = [log.time[3], log.time[-1] + 1, log.time[19 * S + 1] + 1]
    events = NewEvents([1] * 3, [4, 5, 6], np.array(times) + 1, ["b"] * 3, [901, 902, 903])
    update = apply_events(RUN, store, events, options)
    assert update.outcome.tolist() == [TOO_LATE, APPLIED, REPLAYED]
    placed = NewEvents([1] * 2, [5, 6], np.array(times[1:]) + 1, ["b"] * 2, [902, 903])
    check_equal_to_batch(RUN, store, plus(log, placed))


def test_a_duplicate_beyond_what_is_held_costs_no_folding():
    log = ordered_log(20 * S)
    options = UpdateOptions(MemoryLog(), Spacing(), CLOCK, codec="float32")
    store, _ = stream(RUN, log, [], options)
    before = dict(store.records)
    update = apply_events(RUN, store, log.part([5, 6, 100]), options)
    assert update.outcome.tolist() == [DUPLICATE] * 3
    assert (update.num_changed, update.num_replayed_events) == (0, 0)
    assert store.records == before


def test_an_id_that_comes_again_later_is_known_to_the_source_only():
    log = ordered_log(10 * S)
    repeated = one(log, log.time[-1] + SECOND, event_id=2)
    for source, outcome in ((MemoryLog(), DUPLICATE), (None, APPLIED)):
        options = UpdateOptions(source, None, CLOCK, codec="float32")
        store, _ = stream(RUN, log, [40], options)
        assert apply_events(RUN, store, repeated, options).outcome.tolist() == [outcome]


def test_of_one_id_the_earliest_time_stays_also_when_it_arrives_last():
    log = ordered_log(10 * S)
    earlier = one(log, log.time[2] + 1, event_id=9 * S)
    options = UpdateOptions(MemoryLog(), Spacing(), CLOCK, codec="float32")
    store, _ = stream(RUN, log, [40], options)
    assert apply_events(RUN, store, earlier, options).outcome.tolist() == [REPLAYED]
    assert len(batch_history(plus(log, earlier), 1)) == 10 * S
    check_equal_to_batch(RUN, store, plus(log, earlier))


def test_clocks_that_are_ahead_or_far_behind_are_refused_and_may_come_again():
    log = ordered_log(S)
    store, _ = stream(RUN, log, [], UpdateOptions(clock=CLOCK))
    clock = Clock(now_us=log.time[-1], ahead_us=300 * SECOND)
    times = np.array([0, 300, 301, -40 * 365 * 86_400]) * SECOND + log.time[-1]
    events = NewEvents([1] * 4, [1, 2, 3, 4], times, None, [91, 92, 93, 94])
    before = load_states(RUN.sequence_model, store, [1], VERSION).tracked
    update = apply_events(RUN, store, events, UpdateOptions(MemoryLog(), clock=clock))
    assert update.outcome.tolist() == [APPLIED, APPLIED, BAD_CLOCK, BAD_CLOCK]
    later = Clock(now_us=log.time[-1] + SECOND, ahead_us=300 * SECOND)
    again = NewEvents([1], [3], times[2:3], None, [93])
    assert apply_events(RUN, store, again, UpdateOptions(clock=later)).outcome.tolist() == [APPLIED]
    after = load_states(RUN.sequence_model, store, [1], VERSION).tracked
    assert after.num_events - before.num_events == [3]


def test_the_default_clock_is_that_of_the_machine():
    events = NewEvents([1], [1], np.array([NOW_US + 100 * 365 * DAY_US]))
    assert apply_events(RUN, MemoryStore(), events).outcome.tolist() == [BAD_CLOCK]


@pytest.mark.parametrize("spacing", [None, Spacing()])
def test_a_thousand_events_of_one_moment_and_a_gap_of_ten_years(spacing):
    """One time fills more than what is held: which of its events are known is then asked of the source."""
    size = 6 * R
    times = [START_US] * size + [START_US + 3650 * DAY_US]
    log = Log(
        [1] * (size + 1),
        [i % NUM_ITEMS for i in range(size + 1)],
        ["abc"[i // NUM_ITEMS] for i in range(size + 1)],
        times,
        None,
    )
    options = UpdateOptions(MemoryLog(), spacing, CLOCK, codec="float32")
    store, outcome = stream(RUN, log, [5, 30, 60, 61], options)
    assert not np.isin(outcome, [DUPLICATE]).any()
    update = apply_events(RUN, store, log.part([0, 40, 95, 96]), options)
    assert update.outcome.tolist() == [DUPLICATE] * 4
    check_equal_to_batch(RUN, store, log)


def test_a_repeat_of_an_event_let_go_is_known_while_others_of_its_time_are_held():
    """A kept border lies between them, from which what is held would be enough to replay."""
    log = replace(ordered_log(7 * S + 4), event_id=None)
    first, border = 5 * S, 6 * S  # a kept one
    log = replace(log, time=[log.time[first] if first <= place < border else t for place, t in enumerate(log.time)])
    options = UpdateOptions(MemoryLog(), Spacing(2, 2), CLOCK, codec="float32")
    store, _ = stream(RUN, log, [], options)
    assert first + 1 < len(log.time) - R < border
    update = apply_events(RUN, store, log.part([first + 1]), options)
    assert update.outcome.tolist() == [DUPLICATE]
    check_equal_to_batch(RUN, store, log)


def test_a_user_whose_state_is_not_stored_is_read_from_the_source():
    log = ordered_log(3 * S)
    source = MemoryLog()
    stream(RUN, log, [], UpdateOptions(source, None, CLOCK))
    store, late = MemoryStore(), one(log, log.time[-1] + 1, 999)
    update = apply_events(RUN, store, late, UpdateOptions(source, None, CLOCK, codec="float32"))
    assert (update.num_replays, update.num_replayed_events) == (1, 3 * S + 1)
    check_equal_to_batch(RUN, store, plus(log, late))


def test_states_of_a_bulk_run_go_on_with_its_prepared_data_as_source(tmp_path):
    data = write_world(tmp_path / "data", num_users=3)
    log, (start, end) = data.histories, data.histories.offsets[1:3].tolist()
    store = MemoryStore()
    records = summarize_users(RUN.sequence_model, log, np.array([1]), data.user_ids[[1]], VERSION)
    store.commit([(r.kind, r.user_key, encode(r, "float32")) for r in records], VERSION)
    ids = RUN.catalogue.decode(np.asarray(log.item[start:end]))
    names = [None, "a", "b", "c"]
    known = Log(
        [101] * (end - start),
        list(ids),
        [names[a] for a in log.action[start:end]],
        log.timestamp_us[start:end].tolist(),
        None,
    )
    late = one(known, known.time[4] + 1)
    options = UpdateOptions(MemoryLog(data), Spacing(), CLOCK, codec="float32")
    events = plus(Log([], [], [], [], None), known.part([2, 59]))
    events = plus(events, late)
    update = apply_events(RUN, store, events.part(range(3)), options)
    # what the source alone can tell apart, it tells of all late events of a user at once
    assert update.outcome.tolist() == [REPLAYED, DUPLICATE, REPLAYED]
    check_equal_to_batch(RUN, store, plus(known, late))


def test_a_source_that_is_not_the_states_log_is_refused():
    log = ordered_log(20 * S)
    store, _ = stream(RUN, log, [], UpdateOptions(None, Spacing(), CLOCK))
    with pytest.raises(DataError, match=r"user 1: the replay source has 0 events at .* the stored state 1; it is not"):
        apply_events(RUN, store, one(log, log.time[100] + 1, 999), UpdateOptions(MemoryLog(), Spacing(), CLOCK))


def test_scope_full_is_refused():
    with pytest.raises(ConfigError, match="summarize again"):
        apply_events(make_run(scope="full"), MemoryStore(), ordered_log(3).part(range(3)))


def test_a_model_without_a_summary_keeps_its_recent_events_in_order():
    run = make_run(model="recent")
    log = ordered_log(30)
    options = UpdateOptions(MemoryLog(), Spacing(), CLOCK)
    store, _ = stream(run, replace(log, time=[*log.time[:27], log.time[28], log.time[27], log.time[29]]), [28], options)
    found = load_states(run.sequence_model, store, [1], VERSION).tracked.state.recent.timestamp_us[0]
    assert found.tolist() == log.time[-R:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_id": [1]}, "1 of item_id for 2 of user_id"),
        ({"timestamp_us": np.array([1.5, 2.0])}, "timestamp_us is float64; give integers, in microseconds"),
        ({"event_id": [1.5, 2]}, r"event 0: event id 1.5 \(float\)"),
        ({"user_id": [None, 2]}, "id 0 is None"),
    ],
)
def test_bad_input_says_where(change, message):
    good: dict[str, Any] = {"user_id": [1, 2], "item_id": [1, 2], "timestamp_us": np.array([START_US] * 2)}
    with pytest.raises(DataError, match=message):
        apply_events(RUN, MemoryStore(), NewEvents(**(good | change)), UpdateOptions(clock=CLOCK))


def test_users_and_ids_mean_the_same_as_numbers_and_as_text():
    log = ordered_log(4)
    store, _ = stream(RUN, log, [], UpdateOptions(clock=CLOCK))
    events = NewEvents(
        ["1", 1], [str(log.item[0]), 2], np.array([log.time[0], log.time[3] + 1]), ["a", "a"], ["0", "77"]
    )
    assert apply_events(RUN, store, events, UpdateOptions(clock=CLOCK)).outcome.tolist() == [DUPLICATE, APPLIED]
    assert len({key for _, key in store.records}) == 1


# -- repeats, against `vista prepare`


@given(case=logs())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_repeats_are_those_of_prepare(case):
    log, _ = case
    names = [None, "a", "b", "c"]
    action = np.array([names.index(a) for a in log.action])
    ids = hash_event_ids(log.event_id, len(log.user))
    arrivals = Arrivals(np.array(log.user), np.array(log.item), action, np.array(log.time), ids)
    arrivals = arrivals.take(order_of(arrivals))
    found = arrivals.take(~repeats(arrivals))
    for user in set(log.user):
        expected = batch_history(log, user)
        mine = found.take(found.user == user)
        assert mine.timestamp_us.tolist() == expected["ticks"].to_list()
        assert mine.item.tolist() == expected["item"].to_list()


def test_an_unknown_id_is_compared_by_content_and_a_null_one_with_nothing():
    ids = np.array([UNKNOWN_ID, 5, NULL_ID, NULL_ID, 6, UNKNOWN_ID])
    same = np.ones(6, np.int64)
    assert repeats(Arrivals(same, same, same, same, ids)).tolist() == [False, True, False, False, True, True]
    ids[0] = 7
    assert repeats(Arrivals(same, same, same, same, ids))[:5].tolist() == [False] * 5


# -- kept borders


@given(st.integers(0, 3000), st.sampled_from([(2, 2), (2, 3), (4, 2)]))
def test_kept_borders_can_be_kept_in_passing_and_are_few(num_segments, spacing):
    base, per_level = spacing
    now, before = (set(Spacing(base, per_level).kept(n)) for n in (num_segments + 1, num_segments))
    assert now <= before | {num_segments}
    assert len(now) <= per_level * (np.log(num_segments + 1) / np.log(base) + 1)
    assert all(0 < border <= num_segments for border in now)


@pytest.mark.parametrize("num_segments", [1, 2, 7, 64, 1000])
def test_a_replay_reads_at_most_four_times_the_age(num_segments):
    kept = [0, *Spacing().kept(num_segments), num_segments]
    for age in range(1, num_segments + 1):
        base = max(border for border in kept if border <= num_segments - age)
        assert num_segments - base <= 4 * age


@pytest.mark.parametrize("kind", list(RUNS), ids=lambda kind: "-".join(kind))
@torch.no_grad()
def test_a_replay_from_any_kept_border_equals_recomputation(kind):
    model = RUNS[kind].sequence_model
    rng = np.random.default_rng(0)
    size = 30 * S + 3
    zero, times = np.zeros(size, np.int64), START_US + np.cumsum(rng.integers(0, 3, size)) * DAY_US
    events = Arrivals(zero, rng.integers(FIRST_ITEM, NUM_ITEMS, size), zero + 1, times, zero + UNKNOWN_ID)
    fresh = Tracked.of(model.init_state(1))
    whole = refold(model, fresh, [start_border(model)], events, Spacing())
    borders = whole.borders[0].borders
    assert [b.num_events // S for b in borders] == Spacing().kept(30)
    for border in (start_border(model), *borders):
        direct = model.extend(model.init_state(1), as_events(events.take(np.arange(border.num_events))))
        for kept, expected in zip(values(border.memory, direct), values(flatten_rows(direct), direct), strict=True):
            torch.testing.assert_close(kept, expected, **TOLERANCE)
        again = refold(model, whole, [border], events.take(np.arange(border.num_events, size)), Spacing())
        torch.testing.assert_close(model.summarizer.read(again.state), model.summarizer.read(whole.state), **TOLERANCE)
        assert torch.equal(again.state.progress.num_events, whole.state.progress.num_events)
        assert [b.num_events for b in again.borders[0].borders] == [b.num_events for b in borders]
        assert [b.num_ties for b in again.borders[0].borders] == [b.num_ties for b in borders]


def as_events(arrivals: Arrivals) -> Events:
    columns = (torch.from_numpy(c) for c in (arrivals.item, arrivals.action, arrivals.timestamp_us))
    return Events.from_log(*columns, torch.tensor([0, len(arrivals)]))


def flatten_rows(state) -> list[torch.Tensor]:
    return [t[0] for layer in state.memory for running in layer for t in running]


def values(memory: list[torch.Tensor], state) -> list[torch.Tensor]:
    """What running values stand for: the split into sum and residue, and a softmax's scale, depend on the cut."""
    found = []
    for running in (running for layer in unflatten(list(memory), state.memory) for running in layer):
        if running[-1].dtype != torch.int8:  # a sketch: whole numbers, and sums in the order of events
            found += running
            continue
        total, *maximum, residue = running
        exact = widened(total, residue)
        denominator = exact[..., -1:].masked_fill(exact[..., -1:] == 0, 1)
        found += [exact[..., :-1] / denominator, maximum[0] + denominator[..., 0].log()] if maximum else [exact]
    return found


@pytest.mark.parametrize("kind", list(RUNS), ids=lambda kind: "-".join(kind))
def test_borders_survive_the_record_exactly(kind):
    run = RUNS[kind]
    store, _ = stream(run, ordered_log(20 * S), [70], UpdateOptions(None, Spacing(), CLOCK))
    kept = load_states(run.sequence_model, store, [1], VERSION).tracked.borders[0]
    assert [b.num_events // S for b in kept.borders] == Spacing().kept(20)
    again = borders_from_record(decode(encode(borders_to_record(kept, 1, VERSION)), VERSION))
    for ours, theirs in zip(kept.borders, again.borders, strict=True):
        assert replace(ours, memory=()) == replace(theirs, memory=())
        assert all(torch.equal(a, b) for a, b in zip(ours.memory, theirs.memory, strict=True))
    empty = borders_from_record(decode(encode(borders_to_record(KeptBorders(), 1, VERSION)), VERSION))
    assert empty == KeptBorders()


def test_borders_are_not_used_for_a_state_that_was_written_without_them():
    log = ordered_log(20 * S)
    options = UpdateOptions(None, Spacing(), CLOCK)
    store, _ = stream(RUN, log, [], options)
    other, _ = stream(RUN, log, [], UpdateOptions(clock=CLOCK))
    store.records["state", user_key(1)] = other.records["state", user_key(1)]
    assert load_states(RUN.sequence_model, store, [1], VERSION).tracked.borders == (KeptBorders(),)


def test_a_border_record_is_written_when_a_segment_closes_and_not_with_every_event():
    log = ordered_log(4 * S)
    store, written = MemoryStore(), []
    commit = store.commit

    def watched(writes, version, provided):
        written.append([kind for kind, *_ in writes])
        commit(writes, version, provided)

    store.commit = watched
    for i in range(4 * S):
        apply_events(RUN, store, log.part([i]), UpdateOptions(None, Spacing(), CLOCK))
    assert [i for i, kinds in enumerate(written) if "border" in kinds] == [2 * S - 1, 3 * S - 1, 4 * S - 1]


def test_switched_off_the_kept_borders_leave_the_store():
    log = ordered_log(4 * S)
    store, _ = stream(RUN, log, [], UpdateOptions(None, Spacing(), CLOCK))
    apply_events(RUN, store, one(log, log.time[-1] + 1, 99), UpdateOptions(clock=CLOCK))
    assert decode(store.records["border", user_key(1)]).arrays["border_num_events"].size == 0


@pytest.mark.parametrize("change", [{"base": 1}, {"per_level": 1}])
def test_a_spacing_that_keeps_too_little_is_refused(change):
    with pytest.raises(ConfigError, match=f"{next(iter(change))} is 1; it must be 2 or more"):
        Spacing(**change)


def test_removing_events_asks_for_a_border_strictly_before_them():
    tracked = load_states(
        RUN.sequence_model, stream(RUN, ordered_log(8 * S), [], UpdateOptions(None, Spacing(), CLOCK))[0], [1], VERSION
    ).tracked
    kept = tracked.borders[0]
    newest = kept.borders[-1]
    assert kept.before(newest.last_us) is newest
    assert kept.before(newest.last_us, strictly=True) is kept.borders[-2]
    assert kept.before(START_US - 1) is None
    assert kept.before(NOW_US, below_events=newest.num_events) is kept.borders[-2]


# -- a real store


def test_many_users_at_once_in_lmdb(tmp_path):
    rng = np.random.default_rng(1)
    users = rng.integers(0, 300, 3000)
    times = START_US + np.sort(rng.integers(0, 10**6, 3000)) * SECOND
    late = np.argsort(np.arange(3000) + rng.uniform(0, 400, 3000))
    log = Log(
        users[late].tolist(),
        rng.integers(0, NUM_ITEMS, 3000).tolist(),
        ["a"] * 3000,
        times[late].tolist(),
        late.tolist(),
    )
    options = UpdateOptions(MemoryLog(), Spacing(), CLOCK, codec="float32")
    store: SummaryStore
    with open_store(str(tmp_path / "store")) as store:
        store.begin_version(VERSION, 4, 12, 300)
        for a in range(0, 3000, 1000):
            update = apply_events(RUN, store, log.part(range(a, a + 1000)), options)
            assert update.num_changed > 256  # more than one commit
        check_equal_to_batch(RUN, store, log)
        assert store.versions()[0].num_users == len(set(log.user))
        longest = user_key(int(np.bincount(users).argmax()))
        assert store.delete(longest) == 3
        assert store.get_many("border", [longest], VERSION) == [None]


def test_the_catalogue_of_these_tests_is_a_catalogue():
    assert isinstance(RUN.catalogue, Catalogue)
    assert RUN.catalogue.first_item == FIRST_ITEM


# -- several writers


@pytest.mark.parametrize("url", ["memory:NAME", "NAME"])
def test_no_event_of_several_writers_is_lost(tmp_path, url):
    """As from several servers of one store: each reads a state, changes it, and writes it back."""
    url = url.replace("NAME", str(tmp_path / "store"))
    with open_store(url) as store:
        store.begin_version(VERSION, 4, 12, 1)

        def write(number: int) -> list[int]:
            outcomes = []
            for place in range(8):
                at = np.array([START_US, START_US + place * SECOND], np.int64)
                events = NewEvents([0, number], [1 + number, 2], at, None, [f"{number} {place}", f"{number} {place} b"])
                outcomes += apply_events(RUN, store, events, UpdateOptions(clock=CLOCK)).outcome.tolist()
            return outcomes

        with ThreadPoolExecutor(4) as pool:
            outcomes = [outcome for found in pool.map(write, range(1, 5)) for outcome in found]
        state = load_states(RUN.sequence_model, store, [0, 1, 2, 3, 4, 5], VERSION).tracked.state
    assert outcomes.count(BAD_CLOCK) == outcomes.count(TOO_LATE) == 0
    assert state.progress.num_events.tolist() == [32, 8, 8, 8, 8, 0]


def test_a_writer_that_is_never_the_first_says_so():
    store, tries = MemoryStore(), []

    def late(writes, version, provided):
        tries.append(provided)
        raise Superseded("another one was faster")

    store.commit = late
    with pytest.raises(Superseded, match="faster"):
        apply_events(RUN, store, NewEvents([0], [1], np.array([START_US])), UpdateOptions(clock=CLOCK))
    assert tries == [[("state", user_key(0), None)]] * MOST_TRIES
    assert store.records == {}
