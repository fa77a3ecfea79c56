"""A summary does not drift: float32 against the same model in float64, over histories of up to a million events.

Errors are relative to the size of what is compared: the norm of the difference divided by the norm of the reference,
of each memory tensor and of each summary token; the worst one counts. Two layers, so that what reads a memory is itself
an event that another layer remembers.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.models.worlds import DAY_US, histories, slice_users, summarizer
from vista.models.batch import flatten
from vista.models.inputs import Events
from vista.models.summarizer import Summarizer, UserState
from vista.ops.qla import RESIDUE_STEP, add_compensated

LARGEST_ERROR = 1e-4
PART_EVENTS = 65_536
SIZES = {"segment_events": 64, "recent_events": 64, "num_seeds": 16, "width": 32, "num_heads": 2, "num_layers": 2}


def read_all(model: Summarizer, events: Events) -> UserState:
    state = model.init_state(1)
    for start in range(0, len(events.item), PART_EVENTS):
        state = model.extend(state, slice_users(events, [start], [min(start + PART_EVENTS, len(events.item))]))
    return state


def relative_error(found: Tensor, reference: Tensor, dims: tuple[int, ...]) -> float:
    """The largest, over everything but ``dims``, of |found - reference| / |reference|."""
    difference = torch.linalg.vector_norm(found.double() - reference, dim=dims)
    return float((difference / torch.linalg.vector_norm(reference, dim=dims)).max())


@torch.no_grad()
def errors(attention: str, memory: str, events: Events) -> dict[str, float]:
    model = summarizer(attention=attention, memory=memory, **SIZES)
    reference = copy.deepcopy(model).double()
    states = {m: read_all(m, events) for m in (model, reference)}
    ours, theirs = (flatten(states[m].memory) for m in (model, reference))
    is_residue = [t.dtype == torch.int8 for t in ours]
    narrow = torch.float64 if memory in ("ridge", "delta") else torch.float32
    assert all(t.dtype in (torch.float32, narrow) for t, residue in zip(ours, is_residue, strict=True) if not residue)
    assert all(t.dtype == torch.float64 for t, residue in zip(theirs, is_residue, strict=True) if not residue)
    found = {
        f"memory {i}": relative_error(a, b, tuple(range(1, a.ndim)))
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
        if not is_residue[i]
    }
    tokens, exact = (m.read(states[m]) for m in (model, reference))
    return found | {"tokens": relative_error(tokens, exact, (-1,))}


def one_item_for_ever(num_events: int) -> Events:
    """The same event every day: every segment adds the same part, and rounds it the same way."""
    days = 10**15 + torch.arange(num_events) * DAY_US
    ones = torch.ones(num_events, dtype=torch.int64)
    return Events.from_log(7 * ones, ones, days, torch.tensor([0, num_events]))


def test_equal_parts_add_up_where_plain_float32_drifts() -> None:
    total, residue = torch.zeros(3), torch.zeros(3, dtype=torch.int8)
    plain, part = torch.zeros(3), torch.tensor([0.1, -7.3e-3, 0.0])
    for _ in range(20_000):
        total, residue = add_compensated(total, residue, part)
        plain = plain + part
    expected = part.double() * 20_000
    assert residue[2] == 0
    torch.testing.assert_close(total.double(), expected, rtol=2e-7, atol=0)
    assert (plain.double() - expected).abs()[0] > 1e-5 * expected[0]


def test_a_rescaled_sum_takes_its_residue_along() -> None:
    total, residue = torch.tensor([1.0]), torch.tensor([100], dtype=torch.int8)
    for scale in (0.5, 0.0):
        after, _ = add_compensated(total, residue, torch.tensor([1e-9]), torch.tensor([scale]))
        assert after.item() == pytest.approx((1 + 100 * RESIDUE_STEP) * scale + 1e-9, rel=2e-7)
    _, cleared = add_compensated(total, residue, torch.tensor([0.0]), torch.tensor([0.0]))
    assert cleared.item() == 0


def test_gradients_of_a_sum_are_those_of_plain_addition() -> None:
    total, part = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    add_compensated(total, torch.tensor([9], dtype=torch.int8), part, scale)[0].sum().backward()
    assert [x.grad.item() for x in (total, part, scale)] == [0.5, 1.0, 2.0]


KINDS = [
    ("qla", "sum"),
    ("softmax", "sum"),
    ("qla", "slots"),
    ("softmax", "slots"),
    ("softmax", "ridge"),
    ("softmax", "delta"),
]
WORLDS = {"varied": lambda num_events: histories([num_events]), "one item": one_item_for_ever}


def check(attention: str, memory: str, world: str, num_events: int) -> None:
    found = errors(attention, memory, WORLDS[world](num_events))
    print(
        f"\n{attention} {memory}, {world}, {num_events:,} events:", ", ".join(f"{k} {v:.1e}" for k, v in found.items())
    )
    assert max(found.values()) < LARGEST_ERROR, found


@pytest.mark.parametrize(("attention", "memory"), KINDS)
@pytest.mark.parametrize("world", list(WORLDS))
def test_float32_stays_near_float64(world: str, attention: str, memory: str) -> None:
    check(attention, memory, world, 20_000)


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "memory"), KINDS)
@pytest.mark.parametrize("world", list(WORLDS))
def test_float32_stays_near_float64_over_a_million_events(world: str, attention: str, memory: str) -> None:
    check(attention, memory, world, 1_000_000)
