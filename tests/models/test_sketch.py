"""The sketch: what it says beside a definition in plain loops, what a full table forgets, and that stream is batch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models.worlds import (
    DAY_US,
    NUM_ACTIONS,
    NUM_ITEMS,
    catalogue,
    histories,
    model_config,
    slice_users,
    summarizer,
)
from vista.data import counts
from vista.errors import ConfigError, RecordError
from vista.models import sketch as sketches
from vista.models.batch import Requests, flatten
from vista.models.embeddings import ItemTables
from vista.models.inputs import Events
from vista.models.sketch import EPOCH_S, HALF_LIVES_S, NEVER_EVENTS, NEVER_S, Sketch, fingerprints
from vista.models.sketch_fold import SketchFold
from vista.models.summarizer import UserState
from vista.models.traces import Traces, _shift, _torch_shift, later_rivals
from vista.models.vista import make_model
from vista.ops.order import SegmentOrder
from vista.records import fill_sketch, sketch_arrays
from vista.store.record import Record

S, R = 8, 16  # of tests.models.worlds.model_config
FIRST = 5
EXACT, FULL = 64, 8  # slots: more than there are items, and far fewer
TRACES = 16  # beside FULL: 24 of 44 items have an entry or a trace
PER_LEVEL = 4 + len(HALF_LIVES_S)
TOTALS = 4
FEATURES = torch.from_numpy(catalogue().features).long()
LENGTHS = [0, 3, 8, 29, 100]


def state_of(events: Events, slots: int = EXACT, traces: int = 0) -> tuple[Sketch, UserState]:
    model = summarizer(sketch_slots=slots, sketch_traces=traces)
    assert model.sketch is not None
    with torch.no_grad():
        return model.sketch, model.extend(model.init_state(events.num_users), events)


def requests_of(state: UserState, candidate: torch.Tensor, timestamp_us: torch.Tensor) -> Requests:
    """One request per user, from its state."""
    recent = state.recent
    return Requests(
        summary=torch.arange(state.num_users),
        recent=torch.where(recent.item > 0, 0, -1),
        recent_item=recent.item,
        recent_us=recent.timestamp_us,
        timestamp_us=timestamp_us,
        num_known=state.progress.num_events,
        candidate=candidate,
        context=torch.zeros(*candidate.shape, 0),
    )


def read(slots: int, events: Events, candidate: torch.Tensor, after_us: int = DAY_US, traces: int = 0) -> torch.Tensor:
    """The features of the same candidates (C,) for every user, so long after its last event, (B, C, features)."""
    sketch, state = state_of(events, slots, traces)
    at_us = state.progress.last_us.clamp(min=10**15) + after_us
    requests = requests_of(state, candidate.expand(events.num_users, -1), at_us)
    return sketch.read(state.memory[-1][0], requests, FEATURES)


def naive(events: Events, user: int, item: int, after_us: int = DAY_US) -> list[float]:
    """Everything the features say, event by event."""
    rows = range(int(events.offsets[user]), int(events.offsets[user + 1]))
    last_us = int(events.timestamp_us[rows[-1]]) if len(rows) else 10**15
    now_s = (last_us + after_us) // 10**6
    features = []
    for keys in (events.item, FEATURES[:, 0][events.item]):
        key = item if keys is events.item else int(FEATURES[item, 0])
        met = [row for row in rows if key > 0 and int(keys[row]) == key]
        ages = [now_s - int(events.timestamp_us[row]) // 10**6 for row in met]
        values = [
            len(met),
            len(rows) - (met[-1] - rows[0]) if met else NEVER_EVENTS,
            ages[-1] if met else NEVER_S,
            *(sum(2 ** (-age / half_life) for age in ages) for half_life in HALF_LIVES_S),
        ]
        features += [float(bool(met)), *(math.log1p(value) for value in values)]
    return features


@pytest.mark.parametrize("seed", range(3))
def test_an_exact_level_says_what_the_definition_says(seed):
    events = histories(LENGTHS, seed)
    candidate = torch.arange(FIRST + NUM_ITEMS)
    found = read(EXACT, events, candidate)
    expected = [[naive(events, user, item) for item in candidate.tolist()] for user in range(len(LENGTHS))]
    torch.testing.assert_close(found[..., :-TOTALS], torch.tensor(expected), rtol=2e-5, atol=2e-6)
    assert found[-1, :, 0].mean() > 0.5  # most items were met, or the test would show little
    state = state_of(events)[1]
    for user, length in enumerate(LENGTHS):
        start, recent = int(events.offsets[user]), state.recent.item[user]
        whole = events.item[start : start + length // S * S]
        for place, items in ((-TOTALS, whole), (-TOTALS // 2, recent[recent > 0])):
            different = len(items.unique())
            totals = [math.log1p(different), 1 - different / max(len(items), 1)]
            torch.testing.assert_close(found[user, 0, place:][:2], torch.tensor(totals), rtol=1e-6, atol=1e-6)


def test_a_full_table_forgets_what_was_met_longest_ago_and_takes_no_key_for_another():
    """Of a user with more items than slots: what it finds is met, never more often, and as lately as in truth."""
    events = histories([400, 30, 2], seed=1)
    candidate = torch.arange(1, FIRST + NUM_ITEMS)
    full, exact = read(FULL, events, candidate), read(EXACT, events, candidate)
    item, item_exact = full[..., :PER_LEVEL], exact[..., :PER_LEVEL]
    is_found = item[..., 0] > 0
    assert not (is_found & (item_exact[..., 0] == 0)).any()
    assert 8 <= is_found[0].sum() < item_exact[0, :, 0].sum()
    signs = torch.tensor([1, 1, 1, 1, 1, 1, 1])
    assert (item - item_exact)[is_found].mul(signs).amax() < 1e-6  # counts since it came back in, at most the true ones
    torch.testing.assert_close(item[is_found][:, 2:4], item_exact[is_found][:, 2:4])  # place and time are the true ones
    torch.testing.assert_close(full[..., PER_LEVEL : 2 * PER_LEVEL], exact[..., PER_LEVEL : 2 * PER_LEVEL])
    torch.testing.assert_close(full[2], exact[2])  # few items: nothing forgotten
    since = item_exact[0, :, 2]
    assert since[is_found[0]].mean() < since[~is_found[0]].mean()


def test_a_table_under_pressure_says_what_the_definition_in_loops_says():
    """Entries, their places in the table aside, of one segment after another, for tables of any fullness."""
    for seed, slots in itertools.product(range(3), (FULL, 16, 24)):
        events = histories([400, 37], seed)
        sketch, state = state_of(events, slots)
        entries, _, clock = state.memory[-1][0]
        level = sketch.levels[0]
        for user in range(2):
            rows = range(int(events.offsets[user]), int(events.offsets[user + 1]))
            expected, num_new = naive_table(events, list(rows), level.num_buckets, level.ways, level.bucket)
            mine = entries[user, : level.end]
            assert {tuple(entry) for entry in mine[mine[:, 0] > 0].tolist()} == expected
            assert int(clock[user, 1]) == num_new


def naive_table(events: Events, rows: list[int], num_buckets: int, ways: int, bucket) -> tuple[set, int]:  # type: ignore[no-untyped-def]
    """The entries (key, count, place, second) of closed segments, and how many had none when they came."""
    tables: list[dict[int, list[int]]] = [{} for _ in range(num_buckets)]
    num_new = 0
    for start in range(0, len(rows) - len(rows) % S, S):
        brought: dict[int, list[int]] = {}
        for n in range(start, start + S):
            item, second = int(events.item[rows[n]]), int(events.timestamp_us[rows[n]]) // 10**6 - EPOCH_S
            second = min(second, 2**31 - 1)  # the times of this history go beyond 2058
            brought[item] = [brought.get(item, [0])[0] + 1, n + 1, second]
        for index, table in enumerate(tables):
            mine = {k: v for k, v in brought.items() if int(bucket(torch.tensor(k))) // ways == index}
            new = sorted((k for k in mine if k not in table), key=lambda k: -mine[k][1])
            num_new += len(new)
            held = {k: [mine[k][0] + table[k][0], *mine[k][1:]] for k in mine if k in table}
            rest = sorted((k for k in table if k not in mine), key=lambda k: -table[k][1])
            entering = new[: ways - len(held)]
            staying = rest[: ways - len(held) - len(entering)]
            tables[index] = held | {k: mine[k] for k in entering} | {k: table[k] for k in staying}
    return {(k, *v) for table in tables for k, v in table.items()}, num_new


def naive_traces(
    events: Events, rows: list[int], sketch: Sketch, size: int
) -> tuple[dict[int, int], dict[int, tuple[int, int]]]:
    """Closed segments of this size, of a sketch whose items have one bucket: counts by key of the entries; count and
    segment of the last meeting by key of the traces."""
    traces = sketch.traces
    assert traces is not None
    entries: dict[int, list[int]] = {}
    buckets: list[list[tuple[int, int, int] | None]] = [[None] * 8 for _ in range(traces.num_buckets)]
    bucket_of = {key: int(traces._scramble(torch.tensor(key))[0]) for key in range(1, FIRST + NUM_ITEMS)}
    for segment in range(len(rows) // size):
        brought: dict[int, list[int]] = {}
        for n in range(segment * size, segment * size + size):
            item = int(events.item[rows[n]])
            brought[item] = [brought.get(item, [0])[0] + 1, n + 1]
        new = [key for key in sorted(brought, key=lambda key: brought[key][1]) if key not in entries]
        met = [key for key in brought if key in entries]
        for key in new:
            for slots in buckets:
                for slot, held in enumerate(slots):
                    if held is not None and held[0] == key:
                        brought[key][0] += held[1]
                        slots[slot] = None
        oldest = sorted((key for key in entries if key not in met), key=lambda key: entries[key][1])
        room = 8 - len(met)
        leaving = {}  # in the order of the new ones that push them out
        for turn, key in reversed(list(enumerate(reversed(new)))):
            free = 8 - len(entries)
            if turn >= room:
                leaving[key] = brought[key]
            elif turn >= free:
                leaving[oldest[turn - free]] = entries[oldest[turn - free]]
        kept = {k: v for k, v in entries.items() if k not in leaving and k not in met}
        added = {k: [entries[k][0] + brought[k][0], brought[k][1]] for k in met}
        entries = kept | added | {k: brought[k] for k in new if k not in leaving}
        for index, slots in enumerate(buckets):
            mine = [key for key in leaving if bucket_of[key] == index][::-1]
            order = sorted(range(8), key=lambda slot: -1 if slots[slot] is None else slots[slot][2])  # type: ignore[index]
            for slot, key in zip(order, mine, strict=False):
                slots[slot] = (key, leaving[key][0], (leaving[key][1] - 1) // size)
    traced = {held[0]: held[1:] for slots in buckets for held in slots if held is not None}
    return {key: value[0] for key, value in entries.items()}, traced


@pytest.mark.parametrize(("seed", "size"), [(0, S), (1, S), (2, 2 * S)])
def test_traces_say_what_the_definition_in_loops_says(seed, size):
    """Which items have one, how often they were met, and the segment of the last meeting.

    A segment of 2 S events brings more new items than the bucket has room for.
    """
    events = histories([400, 37], seed)
    model = summarizer(sketch_slots=FULL, sketch_traces=TRACES, segment_events=size, recent_events=2 * size)
    sketch = model.sketch
    assert sketch is not None
    with torch.no_grad():
        state = model.extend(model.init_state(2), events)
    entries, _, clock, words, marks = state.memory[-1][0]
    assert sketch.traces is not None
    for user in range(2):
        rows = list(range(int(events.offsets[user]), int(events.offsets[user + 1])))
        counts, traced = naive_traces(events, rows, sketch, size)
        mine = entries[user, : sketch.levels[0].end]
        assert {key: count for key, count, *_ in mine[mine[:, 0] > 0].tolist()} == counts
        keys = sketch.traces.keys(words[user])
        assert set(keys.tolist()) == set(traced)
        found = sketch.traces.find((words, marks), clock[:, 0], torch.tensor([user]), keys[None])
        assert found.is_found.all()
        ends = [(segment + 1) * size for _, segment in traced.values()]
        order = [keys.tolist().index(key) for key in traced]
        assert found.place[0, order].tolist() == ends
        assert found.count[0, order].tolist() == [count for count, _ in traced.values()]
        last_us = events.timestamp_us[torch.tensor(ends) - 1 + rows[0]]
        assert found.second[0, order].tolist() == (last_us // 10**6 - EPOCH_S).clamp(max=2**31 - 1).tolist()
    assert len(traced) > 4


def test_traces_bring_back_most_of_what_a_full_table_forgets():
    events = histories([400, 30, 2], seed=1)
    candidate = torch.arange(1, FIRST + NUM_ITEMS)
    exact = read(EXACT, events, candidate)[..., :PER_LEVEL]
    full, traced = (read(FULL, events, candidate, traces=traces)[..., :PER_LEVEL] for traces in (0, TRACES))
    is_found, was_found, is_met = traced[..., 0] > 0, full[..., 0] > 0, exact[..., 0] > 0
    assert not (is_found & ~is_met).any()
    assert (was_found <= is_found).all()
    assert is_found[0].sum() > 1.3 * was_found[0].sum()  # recent events, which a full table has no room for, among them
    counts = traced[..., 1].expm1()[is_found], full[..., 1].expm1()[is_found], exact[..., 1].expm1()[is_found]
    assert (counts[0] <= counts[2] + 1e-3).all()  # forgotten again and again, but seldom
    assert counts[0].sum() > 2 * counts[1].sum()
    since, since_exact = traced[..., 2].expm1()[is_found], exact[..., 2].expm1()[is_found]
    assert ((since <= since_exact + 1e-3) & (since > since_exact - S - 1e-3)).all()
    torch.testing.assert_close(traced[2], exact[2])  # few items: nothing leaves


def test_codes_are_halved_as_a_history_grows_and_stay_what_they_would_be():
    """Segments of one event: after each, a trace's place and second are those of the newest segment of its code."""
    traces = Traces(8, 200, segment_events=1)
    words, marks = traces.initial(2)
    tables, both, first = (words.numpy(), marks.numpy()), np.arange(2), np.zeros(1, np.int64)
    for n in range(2100):
        num_events = torch.tensor([n, 0], dtype=torch.int32)
        traces.begin(*tables, both, np.array([n, 0]), np.array([7 * n, 3]))
        if n in (0, 255, 256, 300, 1024, 1900):
            traces.put(tables[0], first, first + n + 1, np.array([n % 199 + 1]), first + 1000, first + n + 1)
        if n in (300, 511, 512, 2047, 2099):
            written = [m for m in (0, 255, 256, 300, 1024, 1900) if m <= n]
            asked = torch.tensor([[m % 199 + 1 for m in written]])
            found = traces.find((words, marks), num_events + 1, torch.tensor([0]), asked)
            step = 1 << max(n.bit_length() - 8, 0)
            newest = [min(m // step * step + step - 1, n) for m in written]
            assert found.place[0].tolist() == [m + 1 for m in newest]
            assert found.second[0].tolist() == [7 * m for m in newest]
            assert set(found.count[0].tolist()) == {255}  # and no more
    assert not words[1].any()


def test_what_a_record_holds_of_a_sketch_with_traces_is_all_of_it():
    events = histories([400, 22, 3, 0], seed=2)
    model = summarizer(sketch_slots=FULL, sketch_traces=TRACES, sketch_predecessors=3)
    with torch.no_grad():
        running = model.extend(model.init_state(4), events).memory[-1][0]
        again = model.init_state(4).memory[-1][0]
    for user in range(4):
        arrays = sketch_arrays(model.sketch, tuple(t[user] for t in running))
        assert len(arrays["sketch_words"]) == int((running[3][user] != 0).sum())
        fill_sketch(model.sketch, again, user, Record("state", "0" * 16, b"i:7", 0, 0, arrays))
    for before, after in zip(running, again, strict=True):
        assert torch.equal(before, after)
    assert running[-2].any()
    for name in ("sketch_traced", "sketch_preceding"):
        without = {k: v for k, v in arrays.items() if k != name}
        with pytest.raises(RecordError, match=f"no {name} in a record of a model with a sketch"):
            fill_sketch(model.sketch, again, 0, Record("state", "0" * 16, b"i:7", 0, 0, without))


@pytest.mark.parametrize(("slots", "items"), [(8, 40), (24, 65_536), (16, 100_000)])
def test_no_two_items_have_the_same_bucket_and_fingerprint_and_buckets_are_even(slots, items):
    traces = Traces(slots, items, segment_events=8)
    bucket, fingerprint = traces._scramble(torch.arange(items))
    assert fingerprint.max() < 2**16
    assert len(torch.unique(bucket * 2**16 + fingerprint)) == items
    load = torch.bincount(bucket, minlength=slots // 8)
    assert load.max() < 1.2 * items / (slots // 8) + 8


def test_a_catalogue_beyond_what_fingerprints_tell_apart_is_refused_with_the_number_that_is_enough():
    with pytest.raises(ConfigError, match=r"sketch_traces 8: 70,000 items need at least 16"):
        Traces(8, 70_000, segment_events=8)
    Traces(16, 70_000, segment_events=8)


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
    st.integers(0, 10**6),
    st.lists(st.floats(0, 1), max_size=5),
    st.sampled_from([(EXACT, 0, 0), (EXACT, 0, 3), (FULL, 0, 2), (FULL, TRACES, 0), (FULL, TRACES, 4)]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_however_a_history_is_cut_the_sketch_is_the_same(lengths, seed, cuts, slots):
    """To the last bit, decayed counts included."""
    events = histories(lengths, seed)
    model = summarizer(sketch_slots=slots[0], sketch_traces=slots[1], sketch_predecessors=slots[2])
    state = model.init_state(len(lengths))
    borders = [[0] * len(lengths), *([round(cut * n) for n in lengths] for cut in sorted(cuts)), lengths]
    with torch.no_grad():
        for start, end in itertools.pairwise(borders):
            state = model.extend(state, slice_users(events, start, end))
        whole = model.extend(model.init_state(len(lengths)), events)
    for cut, at_once in zip(state.memory[-1][0], whole.memory[-1][0], strict=True):
        assert torch.equal(cut, at_once)


def naive_preceding(items: list[int], candidate: int, num_kept: int) -> list[float]:
    """How near the items before the newest meetings are among the newest 16 events, event by event."""
    if not candidate:
        return [0.0] * 3
    worth = []
    for place in [n for n, item in enumerate(items) if item == candidate][::-1][:num_kept]:
        before = items[place - 1] if place else None
        ages = [age for age, item in enumerate(items[::-1][:16]) if item == before != candidate]
        worth.append(2 ** (-ages[0] / 4) if ages else 0.0)
    return [sum(worth) / len(worth), max(worth), worth[0]] if worth else [0.0] * 3


@pytest.mark.parametrize(("num_kept", "seed"), [(1, 0), (3, 1), (4, 2)])
def test_predecessors_say_what_the_definition_says(num_kept, seed):
    """As of a summary at the border, and of one that is behind."""
    events = histories(LENGTHS, seed)
    candidate = torch.arange(FIRST + NUM_ITEMS).expand(len(LENGTHS), -1)
    model = summarizer(sketch_slots=EXACT, sketch_predecessors=num_kept)
    assert model.sketch is not None
    behind = [max(n - 8, 0) for n in LENGTHS]  # what the recent events, 16, make good
    with torch.no_grad():
        newest = model.extend(model.init_state(len(LENGTHS)), events)
        older = model.extend(model.init_state(len(LENGTHS)), slice_users(events, [0] * len(LENGTHS), behind))
    requests = requests_of(newest, candidate, newest.progress.last_us.clamp(min=10**15) + DAY_US)
    whole = [events.item[events.offsets[u] : events.offsets[u + 1]].tolist() for u in range(len(LENGTHS))]
    expected = torch.tensor([[naive_preceding(w, c, num_kept) for c in candidate[0].tolist()] for w in whole])
    assert (expected[-1, :, 0] > 0).sum() > 4  # or the test would show little
    for state in (newest, older):
        found = model.sketch.read(state.memory[-1][0], requests, FEATURES)[..., -TOTALS - 3 : -TOTALS]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_an_entry_that_made_room_has_lost_its_predecessors():
    """Of a full table: those since the item came back in, and of those it has the true ones."""
    events = histories([400], seed=1)
    items = events.item.tolist()
    model = summarizer(sketch_slots=FULL, sketch_traces=TRACES, sketch_predecessors=4)
    assert model.sketch is not None
    with torch.no_grad():
        state = model.extend(model.init_state(1), events)
    entries, preceding = state.memory[-1][0][0][0], state.memory[-1][0][-2][0]
    known = fingerprints(torch.tensor([0, *items[: len(items) // S * S]])).tolist()
    for slot in range(model.sketch.levels[0].end):
        key = int(entries[slot, 0])
        places = [n for n in range(len(items) // S * S) if items[n] == key][::-1][:4]
        true = [known[place] for place in places] + [0] * (4 - len(places))
        mine = preceding[slot].tolist()
        size = sum(value > 0 for value in mine)
        assert size > 0
        assert mine == true[:size] + [0] * (4 - size)


def test_fingerprints_of_items_are_in_range_and_spread():
    found = fingerprints(torch.arange(200_000))
    assert int(found[0]) == 0
    assert 1 <= int(found[1:].min()) <= int(found[1:].max()) < 2**15
    assert torch.bincount(found[1:].long()).max() < 30  # six of each, evenly


def test_users_and_candidates_do_not_touch_one_another():
    events = histories(LENGTHS, seed=2)
    candidate = torch.arange(1, FIRST + NUM_ITEMS)
    together = read(FULL, events, candidate)
    for user, length in enumerate(LENGTHS):
        alone = slice_users(events, [0] * len(LENGTHS), [length if u == user else 0 for u in range(len(LENGTHS))])
        torch.testing.assert_close(read(FULL, alone, candidate[3:4])[user], together[user, 3:4], rtol=1e-6, atol=1e-7)


def test_recent_events_after_the_summary_are_counted_once():
    """A summary that is behind, by up to what the recent events hold, gives the same features."""
    events = histories([61, 90], seed=3)
    model = summarizer(sketch_slots=EXACT)
    assert model.sketch is not None
    with torch.no_grad():
        newest = model.extend(model.init_state(2), events)
        older = model.extend(model.init_state(2), slice_users(events, [0, 0], [61 - 13, 90 - 10]))  # 1 segment behind
    candidate = torch.arange(1, FIRST + NUM_ITEMS).expand(2, -1)
    requests = requests_of(newest, candidate, newest.progress.last_us + DAY_US)
    found = [model.sketch.read(state.memory[-1][0], requests, FEATURES) for state in (newest, older)]
    assert not torch.equal(newest.memory[-1][0][0], older.memory[-1][0][0])
    torch.testing.assert_close(*(f[..., :-TOTALS] for f in found), rtol=1e-5, atol=1e-6)


def test_tokens_do_not_depend_on_the_sketch_and_a_model_without_one_carries_none():
    events = histories(LENGTHS)
    with torch.no_grad():
        with_sketch, without = (summarizer(sketch_slots=slots) for slots in (EXACT, 0))
        assert torch.equal(with_sketch(events), without(events))
        shapes = [[tuple(t.shape) for t in flatten(m.init_state(1).memory)] for m in (with_sketch, without)]
    assert shapes[0][: len(shapes[1])] == shapes[1]
    assert len(shapes[0]) == len(shapes[1]) + 3


def test_never_is_as_far_as_in_exact_counts():
    assert (NEVER_EVENTS, NEVER_S) == (counts.NEVER_EVENTS, counts.NEVER_S)
    assert set(HALF_LIVES_S) < set(counts.HALF_LIVES_S.values())
    assert sketches.PRECEDING_EVENTS == counts.PRECEDING_EVENTS
    assert sketches.PRECEDING_HALF_LIFE == counts.PRECEDING_HALF_LIFE


def test_padding_and_unknown_keys_are_never_met():
    events = histories([50], seed=4)
    unknown_category = int((FEATURES[1:, 0] == 0).nonzero()[0]) + 1
    found = read(EXACT, events, torch.tensor([0, unknown_category]))
    never = [0.0, 0.0, math.log1p(NEVER_EVENTS), math.log1p(NEVER_S), 0.0, 0.0, 0.0]
    torch.testing.assert_close(found[0, 0, :-TOTALS], torch.tensor(never * 2), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0, 1, PER_LEVEL:-TOTALS], torch.tensor(never), rtol=1e-6, atol=0)


def told_by_hand(sketch: Sketch, item: list[int], second: list[int]) -> tuple[dict[int, list[float]], dict[int, int]]:
    """Entries (key to count, place, second, decayed numbers) and traces (key to count) of one user, key by key."""
    level, traces = sketch.levels[0], sketch.traces
    assert traces is not None
    table: list[dict[str, Any] | None] = [None] * level.end
    kept: list[tuple[int, int, int] | None] = [None] * traces.num_slots  # key, count, segment
    for first in range(0, len(item) // S * S, S):
        segment, number = range(first, first + S), first // S
        found: dict[int, dict[str, Any]] = {}
        for n in segment:  # in the order of their last events
            one = found.pop(item[n], {"key": item[n], "times": []})
            one.update(place=n + 1, second=second[n], times=[*one["times"], second[n]])
            found[item[n]] = one
        met, new = set(), []
        for one in found.values():
            one["count"] = len(one["times"])
            ages = [[one["second"] - t for t in one["times"]]]
            one["decayed"] = [sum(2 ** (-age / h) for age in ages[0]) for h in HALF_LIVES_S]
            start = int(level.bucket(torch.tensor(one["key"])))
            one["slots"] = range(start, start + level.ways)
            held = [s for s in one["slots"] if table[s] is not None and table[s]["key"] == one["key"]]
            if not held:
                new.append(one)
                continue
            met.add(held[0])
            old = table[held[0]]
            assert old is not None
            left = [2 ** (-(one["second"] - old["second"]) / h) for h in HALF_LIVES_S]
            one["count"] += old["count"]
            one["decayed"] = [d + o * x for d, o, x in zip(one["decayed"], old["decayed"], left, strict=True)]
            table[held[0]] = one
        for one in new:
            for slot, trace in enumerate(kept):
                if trace is not None and trace[0] == one["key"]:
                    # the newest second of the segments that share the trace's code: with few segments, of its own
                    age_s = one["second"] - second[trace[2] * S + S - 1]
                    one["count"] += trace[1]
                    one["decayed"] = [
                        d + trace[1] * 2 ** (-age_s / h) for d, h in zip(one["decayed"], HALF_LIVES_S, strict=True)
                    ]
                    kept[slot] = None
        leaving, enters = [], []
        for n, one in enumerate(new):
            turn = sum(later["slots"] == one["slots"] for later in new[n + 1 :])
            free = sorted(set(one["slots"]) - met, key=lambda s: table[s]["place"] if table[s] else 0)
            if turn < len(free):
                enters.append((free[turn], one))
                leaving.append(table[free[turn]])
            else:
                leaving.append(one)
        for slot, one in enters:
            table[slot] = one
        leaving = [one for one in leaving if one is not None]
        places = [int(traces._scramble(torch.tensor(one["key"]))[0]) for one in leaving]
        before = list(kept)
        for n, (one, bucket) in enumerate(zip(leaving, places, strict=True)):
            turn = places[n + 1 :].count(bucket)
            slots = sorted(range(bucket * 8, bucket * 8 + 8), key=lambda s: before[s][2] if before[s] else -1)
            if turn < 8:
                kept[slots[turn]] = (one["key"], min(one["count"], 255), (one["place"] - 1) // S)
        assert number < 256, "codes would be shared"
    entries = {o["key"]: [o["count"], o["place"], o["second"], *o["decayed"]] for o in table if o is not None}
    return entries, {trace[0]: trace[1] for trace in kept if trace is not None}


@pytest.mark.parametrize("seed", range(4))
def test_entries_and_traces_are_those_of_plain_loops(seed):
    """A table too small for the items, filled beyond its traces: who makes room for whom, and what is remembered."""
    rng = np.random.default_rng(seed)
    size, num_items = 150 * S, 100
    item = np.where(rng.random(size) < 0.5, rng.zipf(1.4, size) % num_items, rng.integers(0, num_items, size)) + FIRST
    second = EPOCH_S + 10**8 + np.cumsum(rng.integers(0, 10**6, size))
    events = Events.from_log(
        torch.from_numpy(item), torch.ones(size, dtype=torch.int64), torch.from_numpy(second * 10**6),
        torch.tensor([0, size]),
    )  # fmt: skip
    sketch = Sketch(FULL, FIRST + num_items, (), 24, S)
    parts = sketch.parts(*(c.view(-1, S) for c in (events.item, events.item, events.timestamp_us, events.item > 0)))
    (table, decayed, _, words, _) = sketch.fold(
        parts, SegmentOrder.of(torch.tensor([size // S])), sketch.initial(1), keep=False
    )[1]
    entries, traces = told_by_hand(sketch, item.tolist(), (second - EPOCH_S).tolist())
    held = table[0][table[0, :, 0] > 0]
    assert {row[0]: row[1:] for row in held.tolist()} == {key: values[:3] for key, values in entries.items()}
    expected = torch.tensor([entries[key][3:] for key in held[:, 0].tolist()])
    torch.testing.assert_close(decayed[0][table[0, :, 0] > 0], expected, rtol=1e-5, atol=1e-6)
    used = words[0] != 0
    kept = sketch.traces.keys(words[0]).tolist(), (words[0][used] & 255).tolist()
    assert dict(zip(*kept, strict=True)) == traces
    assert len(held) == len(table[0])
    assert used.all()


def test_both_forms_of_what_is_left_and_of_shifts_agree():
    """Ages and segments of any size, as tensors (where candidates read) and as arrays (where segments are taken in)."""
    sketch, state = state_of(histories([3]), FULL, 8)
    fold = SketchFold(sketch, state.memory[-1][0])
    age_s = torch.cat([torch.arange(0, 3_000, 7), torch.logspace(3, 9.3, 200).long()])
    assert np.array_equal(fold._left(age_s.numpy()), sketch.left(age_s).numpy())
    segment = torch.cat([torch.arange(2_000), 2 ** torch.arange(8, 31) - 1, 2 ** torch.arange(8, 31)])
    assert _shift(segment.numpy()).tolist() == _torch_shift(segment).tolist()
    place = np.random.default_rng(0).integers(0, 9, 300)
    for size in (1, 40, 300):
        expected = [int((place[row + 1 : size] == place[row]).sum()) for row in range(size)]
        assert later_rivals(place[:size]).tolist() == expected


def test_a_model_with_a_sketch_does_not_rank_without_one():
    config = model_config(sketch_slots=EXACT, popularity_hours=0)
    model = make_model(config, ItemTables.of(catalogue()), NUM_ACTIONS, 1, (), 0).eval()
    with torch.no_grad():
        state = model.extend(model.init_state(1), histories([29]))
        facts = (model.state_tokens(state), state.recent, state.progress.num_events, state.progress.last_us + DAY_US)
        candidate = torch.tensor([[7, 8]])
        assert model.rank_users(*facts, candidate, sketch=model.state_sketch(state)).shape == (1, 2, 1)
        with pytest.raises(ValueError, match="this model has a sketch"):
            model.rank_users(*facts, candidate)


def test_recent_events_that_are_absent_have_no_age_that_overflows():
    """A request centuries after the only event: what is not there, at time 0, is older than 2^31 seconds."""
    events, at_us = histories([3]), 10**16
    sketch, state = state_of(events, FULL, 8)
    found = sketch.read(state.memory[-1][0], requests_of(state, events.item[None], torch.tensor([at_us])), FEATURES)
    assert (found[0, :, 0] == 1).all()
    assert found.isfinite().all()
