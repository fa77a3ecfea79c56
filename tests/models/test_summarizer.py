"""Stream equals batch, seeds read what they should, and nothing looks ahead."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models.worlds import histories, slice_users, summarizer
from vista.config import _CHOICES
from vista.errors import ConfigError
from vista.models.inputs import Events, Progress
from vista.models.layers import join_heads, norm, split_heads
from vista.models.summarizer import UserState
from vista.ops.qla import qla, rms_norm

KINDS = [
    ("qla", "sum"), ("softmax", "sum"), ("qla", "slots"), ("softmax", "slots"), ("qla", "ridge"), ("softmax", "delta"),
]  # fmt: skip
# The same additions happen in the same order; a matrix product of another height may round its rows differently.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def stream(model, events: Events, cuts: list[list[int]]) -> UserState:
    """Extend by every user's events up to each of its cuts, all users together."""
    state = model.init_state(events.num_users)
    before = [0] * events.num_users
    for now in cuts:
        state = model.extend(state, slice_users(events, before, now))
        before = now
    return state


@st.composite
def cut_histories(draw):
    lengths = draw(st.lists(st.integers(0, 45), min_size=1, max_size=4))
    num_cuts = draw(st.integers(0, 6))
    per_user = [[*sorted(draw(st.lists(st.integers(0, n), min_size=num_cuts, max_size=num_cuts))), n] for n in lengths]
    return lengths, [list(step) for step in zip(*per_user, strict=True)], draw(st.integers(0, 1000))


@pytest.mark.parametrize(("attention", "memory"), KINDS)
@given(cut_histories())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_stream_equals_batch_for_every_cut(attention, memory, case):
    lengths, cuts, seed = case
    model = summarizer(attention=attention, memory=memory)
    events = histories(lengths, seed)
    with torch.no_grad():
        state = stream(model, events, cuts)
        torch.testing.assert_close(model.read(state), model(events), **TOLERANCE)
        whole = model.extend(model.init_state(len(lengths)), events)
        torch.testing.assert_close(
            model.read(state, include_open=False), model.read(whole, include_open=False), **TOLERANCE
        )
    assert torch.equal(state.progress.num_events, torch.tensor(lengths))
    assert torch.equal(state.recent.item, whole.recent.item)
    assert torch.equal(state.recent.gap_us, whole.recent.gap_us)


@pytest.mark.parametrize(("attention", "memory"), KINDS)
def test_stream_is_bit_equal_when_one_event_comes_at_a_time_or_a_segment(attention, memory):
    """Steps of one shape: each segment is folded by itself either way."""
    model = summarizer(attention=attention, memory=memory)
    events = histories([40])
    with torch.no_grad():
        by_event = stream(model, events, [[i] for i in range(1, 41)])
        by_segment = stream(model, events, [[i] for i in range(8, 41, 8)])
        assert torch.equal(model.read(by_event), model.read(by_segment))


@pytest.mark.parametrize(("attention", "memory"), KINDS)
def test_one_user_equals_many(attention, memory):
    model = summarizer(attention=attention, memory=memory)
    lengths = [1, 63, 0, 30]
    events = histories(lengths)
    with torch.no_grad():
        together = model(events)
        for u, n in enumerate(lengths):
            alone = model(slice_users(events, [0] * 4, [n if v == u else 0 for v in range(4)]))[u]
            torch.testing.assert_close(together[u], alone, **TOLERANCE)


def test_every_memory_is_among_them():
    assert {memory for _, memory in KINDS} == set(_CHOICES["model.memory"])


def test_slots_are_the_softmax_over_the_whole_history():
    """One layer: the naive definition, the norm of a softmax over all events at once."""
    model = summarizer(memory="slots", num_layers=1)
    layer = model.layers[0]
    events = histories([37])
    with torch.no_grad():
        x = norm(model.embedding(events.item, events.action, events.timestamp_us, events.gap_us))
        k, v = split_heads(layer.key(x), 2), split_heads(layer.value(x), 2)
        logits = layer.reader.query @ k.transpose(-2, -1) * 6**-0.5
        read = join_heads(norm(logits.softmax(-1) @ v))
        mass = (logits.logsumexp(-1) - torch.log(torch.tensor(37.0))).T
        s = model._fresh_seeds(model.extend(model.init_state(1), events).progress)[0]
        expected = norm(layer._add(s + layer.mass(mass), read))
        torch.testing.assert_close(model(events)[0], expected, rtol=1e-4, atol=1e-4)


def test_slots_survive_extreme_logits():
    model = summarizer(memory="slots", num_layers=1)
    with torch.no_grad():
        model.layers[0].reader.query.mul_(1000)
        tokens = model(histories([50]))
    assert torch.isfinite(tokens).all()


def test_sum_seeds_read_events_and_themselves():
    """One layer: seeds read phi(Q) phi(norm(Z of events + Z of seeds))."""
    model = summarizer(memory="sum", num_layers=1)
    layer = model.layers[0]
    events = histories([21])
    with torch.no_grad():
        s = model._fresh_seeds(model.extend(model.init_state(1), events).progress)[0]
        x = norm(model.embedding(events.item, events.action, events.timestamp_us, events.gap_us))
        rows = torch.cat([x, norm(s)])
        k, v, q = (split_heads(p(rows), 2) for p in (layer.key, layer.value, layer.query))
        nobody = q[:, :0]
        o, _ = qla(q, k, v, nobody, nobody, nobody, norm=rms_norm)
        expected = norm(layer._add(s, join_heads(o)[21:]))
        torch.testing.assert_close(model(events)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["qla", "softmax"])
def test_scope_full_is_bidirectional_over_everything(attention):
    """The paper's operator: an event changes what earlier ones become, so only the whole history will do as state."""
    model = summarizer(attention=attention, scope="full")
    events = histories([20])
    with torch.no_grad():
        parts = model.init_state(1)
        for a, b in [(0, 7), (7, 7), (7, 20)]:
            parts = model.extend(parts, slice_users(events, [a], [b]))
        torch.testing.assert_close(model.read(parts), model(events))
    assert parts.recent.item.shape == (1, 20)
    with pytest.raises(ConfigError, match="one user at a time"):
        model(histories([2, 3]))


@pytest.mark.parametrize("attention", ["qla", "softmax"])
def test_full_and_segment_agree_where_one_segment_holds_all(attention):
    """With one layer, seeds on a sum memory read the same Z in both scopes: events plus seeds."""
    segment = summarizer(attention=attention, memory="sum", num_layers=1, segment_events=16)
    full = summarizer(attention="qla", memory="sum", num_layers=1, scope="full")
    full.load_state_dict(segment.state_dict())
    events = histories([16])
    with torch.no_grad():
        torch.testing.assert_close(full(events), segment(events), rtol=1e-4, atol=1e-4)


def test_an_empty_history_has_finite_tokens():
    for attention, memory in KINDS:
        model = summarizer(attention=attention, memory=memory)
        tokens = model.read(model.init_state(3))
        assert tokens.shape == (3, 4, 12)
        assert torch.isfinite(tokens).all()


@pytest.mark.parametrize(("attention", "memory"), KINDS)
def test_memory_at_a_border_ignores_later_events(attention, memory):
    model = summarizer(attention=attention, memory=memory)
    events = histories([32])
    with torch.no_grad():
        early = model.read(model.extend(model.init_state(1), slice_users(events, [0], [16])))
        more = model.extend(model.init_state(1), slice_users(events, [0], [19]))
        torch.testing.assert_close(model.read(more, include_open=False), early, **TOLERANCE)
        assert not torch.allclose(model.read(more), early, atol=1e-3)


def test_border_progress_is_that_of_the_closed_events():
    model = summarizer()
    events = histories([21, 3])
    state = model.extend(model.init_state(2), events)
    border = model.border(state)
    assert border.num_events.tolist() == [16, 0]
    assert border.last_us.tolist() == [int(events.timestamp_us[15]), -1]
    assert border.first_us.tolist() == [int(events.timestamp_us[0]), -1]


def test_gradients_reach_every_parameter():
    for attention, memory in KINDS:
        model = summarizer(attention=attention, memory=memory)
        model(histories([40, 9])).square().mul(torch.arange(12)).sum().backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert missing == [], (attention, memory)


def test_extend_does_not_change_the_state_it_was_given():
    model = summarizer()
    events = histories([20])
    state = model.extend(model.init_state(1), slice_users(events, [0], [10]))
    before = model.read(state)
    model.extend(state, slice_users(events, [10], [20]))
    assert torch.equal(model.read(state), before)
    assert isinstance(state.progress, Progress)
