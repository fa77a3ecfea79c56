"""What is computed again for its gradient gives the numbers and the gradients of what is kept, and keeps less."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.models.worlds import histories, summarizer
from vista.models import recomputed
from vista.models.batch import flatten
from vista.models.inputs import Progress
from vista.ops.order import SegmentOrder

LENGTHS = [70, 0, 9, 200, 41]


def read_all(made):
    """Tokens at every border of ragged histories, the gradients of all weights, and the bytes kept for these."""
    events, size = histories(LENGTHS), made.config.segment_events
    closed = events.lengths() // size
    order = SegmentOrder.of(closed)
    index = (events.offsets[order.user] + order.ordinal * size)[:, None] + torch.arange(size)
    kept = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.nbytes)
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        segments = made.segments_of(events, None, index)
        after, last = made.fold(segments, order, made.init_state(len(LENGTHS)).memory)
        count = torch.arange(1, len(index) + 1)
        tokens = made.read_memory(after, Progress(count, count, 10**12 * count))
        floats = [t for t in flatten(last) if t.is_floating_point()]
        loss = tokens.pow(2).mean() + sum(t.clamp(-5, 5).mean() for t in floats)
    loss.backward()
    gradients = {n: p.grad.to_dense() for n, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    return tokens.detach(), [t.detach() for t in flatten(last)], gradients, sum(kept)


@pytest.mark.parametrize("block_rows", [1, 30, 100])
@pytest.mark.parametrize("memory", ["slots", "sum", "delta"])
def test_recomputing_gives_the_same_values_and_gradients(monkeypatch, memory, block_rows):
    made = summarizer(memory=memory, sketch_slots=16)
    tokens, last, gradients, _ = read_all(made)
    monkeypatch.setattr(recomputed, "KEPT_ROWS", 10)
    monkeypatch.setattr(recomputed, "BLOCK_ROWS", block_rows)
    again, last_again, gradients_again, _ = read_all(made)
    torch.testing.assert_close(again, tokens, atol=1e-5, rtol=1e-5)
    for a, b in zip(last_again, last, strict=True):
        if b.dtype != torch.int8:  # residues of rounding
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
    assert gradients_again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_recomputing_keeps_less(monkeypatch):
    made = summarizer()
    kept = read_all(made)[-1]
    monkeypatch.setattr(recomputed, "KEPT_ROWS", 10)
    monkeypatch.setattr(recomputed, "BLOCK_ROWS", 64)
    assert read_all(made)[-1] < kept / 4


def test_without_gradients_nothing_is_cut(monkeypatch):
    monkeypatch.setattr(recomputed, "KEPT_ROWS", 10)
    assert recomputed.must_recompute(11)
    with torch.no_grad():
        assert not recomputed.must_recompute(11)
