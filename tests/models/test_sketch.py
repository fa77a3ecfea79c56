"""The sketch: what it says beside a definition in plain loops, that collisions only add, and that stream is batch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models.worlds import DAY_US, NUM_ITEMS, catalogue, histories, slice_users, summarizer
from vista.data import counts
from vista.models.batch import Requests, flatten
from vista.models.inputs import Events
from vista.models.sketch import HALF_LIVES_S, NEVER_EVENTS, NEVER_S, Sketch
from vista.models.summarizer import UserState

S, R = 8, 16  # of tests.models.worlds.model_config
FIRST = 5
EXACT, HASHED = 64, 9  # slots: more than there are items, and far fewer
PER_LEVEL = 4 + len(HALF_LIVES_S)
FEATURES = torch.from_numpy(catalogue().features).long()
LENGTHS = [0, 3, 8, 29, 100]


def state_of(events: Events, slots: int = EXACT) -> tuple[Sketch, UserState]:
    model = summarizer(sketch_slots=slots)
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


def read(slots: int, events: Events, candidate: torch.Tensor, after_us: int = DAY_US) -> torch.Tensor:
    """The features of the same candidates (C,) for every user, so long after its last event, (B, C, features)."""
    sketch, state = state_of(events, slots)
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
    torch.testing.assert_close(found, torch.tensor(expected), rtol=2e-5, atol=2e-6)
    assert found[-1, :, 0].mean() > 0.5  # most items were met, or the test would show little


def test_collisions_only_add():
    """A hashed level never says never of what was met, nor less or older than the truth; the categories still fit."""
    events = histories([400, 30, 2], seed=1)
    candidate = torch.arange(1, FIRST + NUM_ITEMS)
    hashed, exact = read(HASHED, events, candidate), read(EXACT, events, candidate)
    item_hashed, item_exact = hashed[..., :PER_LEVEL], exact[..., :PER_LEVEL]
    signs = torch.tensor([1, 1, -1, -1, 1, 1, 1])  # met, count; events since, seconds since; decayed counts
    assert (((item_hashed - item_exact) * signs) >= -1e-6).all()
    assert (item_hashed != item_exact).any()
    torch.testing.assert_close(hashed[..., PER_LEVEL:], exact[..., PER_LEVEL:], rtol=1e-6, atol=1e-7)
    few = item_exact[2, :, 0]
    assert (item_hashed[2, :, 0] - few).sum() < 8  # two tables of nine slots tell most of 44 items from two


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
    st.integers(0, 10**6),
    st.lists(st.floats(0, 1), max_size=5),
    st.sampled_from([EXACT, HASHED]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_however_a_history_is_cut_the_sketch_is_the_same(lengths, seed, cuts, slots):
    """Counts, places and times exactly; decayed counts but for the last bits of exp2, which depend on shapes."""
    events = histories(lengths, seed)
    model = summarizer(sketch_slots=slots)
    state = model.init_state(len(lengths))
    borders = [[0] * len(lengths), *([round(cut * n) for n in lengths] for cut in sorted(cuts)), lengths]
    with torch.no_grad():
        for start, end in itertools.pairwise(borders):
            state = model.extend(state, slice_users(events, start, end))
        whole = model.extend(model.init_state(len(lengths)), events)
    for cut, at_once in zip(state.memory[-1][0], whole.memory[-1][0], strict=True):
        exactly = {"rtol": 0, "atol": 0}
        torch.testing.assert_close(cut, at_once, **({"rtol": 1e-6, "atol": 0} if cut.is_floating_point() else exactly))
        assert torch.equal(cut[..., 0], at_once[..., 0])


def test_users_and_candidates_do_not_touch_one_another():
    events = histories(LENGTHS, seed=2)
    candidate = torch.arange(1, FIRST + NUM_ITEMS)
    together = read(HASHED, events, candidate)
    for user, length in enumerate(LENGTHS):
        alone = slice_users(events, [0] * len(LENGTHS), [length if u == user else 0 for u in range(len(LENGTHS))])
        torch.testing.assert_close(read(HASHED, alone, candidate[3:4])[user], together[user, 3:4], rtol=1e-6, atol=1e-7)


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
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


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


def test_padding_and_unknown_keys_are_never_met():
    events = histories([50], seed=4)
    unknown_category = int((FEATURES[1:, 0] == 0).nonzero()[0]) + 1
    found = read(EXACT, events, torch.tensor([0, unknown_category]))
    never = [0.0, 0.0, math.log1p(NEVER_EVENTS), math.log1p(NEVER_S), 0.0, 0.0, 0.0]
    torch.testing.assert_close(found[0, 0], torch.tensor(never * 2), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0, 1, PER_LEVEL:], torch.tensor(never), rtol=1e-6, atol=0)
