"""Next-item models: no future event reaches a query, padding and company change nothing, the loss is its formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vista.benchmark.leave_one_out.entries import ENTRIES
from vista.models.inputs import Events
from vista.models.layers import small_lookup
from vista.models.losses import PRODUCTS_PER_ROW, sampled_softmax
from vista.models.next_item import NextItemBatch, NextItemModel, make_next_item_model

MODELS = ("sasrec", "hstu", "hstu-large", "vista", "recent")
NUM_ITEMS = 30
SMALL = {"model.width": 8, "model.num_seeds": 4, "model.segment_events": 4, "model.recent_events": 6,
         "train.length": 12}  # fmt: skip


def model_of(name: str) -> NextItemModel:
    torch.manual_seed(0)
    model = make_next_item_model(ENTRIES[name].config(0, SMALL).model, NUM_ITEMS)
    with torch.no_grad():
        for p in model.parameters():  # zeros and small values would hide a leak
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def batch_of(lengths: list[int], row: list[int] | None = None, seed: int = 0) -> NextItemBatch:
    """Random histories; every event asks unless ``row`` says which."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    size = int(offsets[-1])
    item = torch.randint(1, NUM_ITEMS + 1, (size,), generator=generator)
    time = torch.randint(0, 10**11, (size,), generator=generator).cumsum(0)
    events = Events.from_log(item, torch.zeros(size, dtype=torch.int64), time, offsets)
    asked_us = time + torch.randint(0, 10**10, (size,), generator=generator)
    return NextItemBatch(events, asked_us, torch.arange(size) if row is None else torch.tensor(row))


@pytest.mark.parametrize("name", MODELS)
def test_a_query_knows_no_later_event(name):
    model, batch = model_of(name), batch_of([11])
    before = model(batch)
    for changed in (1, 5, 10):
        item = batch.events.item.clone()
        item[changed] = item[changed] % NUM_ITEMS + 1
        later = replace(batch.events, item=item)
        after = model(replace(batch, events=later))
        torch.testing.assert_close(after[:changed], before[:changed], rtol=0, atol=1e-6)
        assert (after[changed] - before[changed]).abs().max() > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_company_and_padding_change_nothing(name):
    model, batch = model_of(name), batch_of([3, 9, 5])
    together = model(batch)
    for user, (start, end) in enumerate([(0, 3), (3, 12), (12, 17)]):
        columns = (c[start:end] for c in (batch.events.item, batch.events.action, batch.events.timestamp_us))
        alone = Events.from_log(*columns, torch.tensor([0, end - start]))
        one = NextItemBatch(alone, batch.asked_us[start:end], torch.arange(end - start))
        torch.testing.assert_close(model(one), together[start:end], rtol=1e-4, atol=1e-5, msg=f"user {user}")


@pytest.mark.parametrize("name", MODELS)
def test_asking_at_the_end_alone_gives_what_asking_everywhere_gives(name):
    model = model_of(name)
    everywhere, at_the_end = model(batch_of([7, 10])), model(batch_of([7, 10], [6, 16]))
    torch.testing.assert_close(at_the_end, everywhere[[6, 16]], rtol=1e-4, atol=1e-5)


def test_vista_reads_what_its_stages_read_one_query_at_a_time():
    """The blocks of queries against the plain definition: tokens of the newest border, the newest events, itself."""
    model, batch = model_of("vista"), batch_of([11])
    events, size, num_recent = batch.events, SMALL["model.segment_events"], SMALL["model.recent_events"]
    event_x = model.embedding(events.item, events.action, events.timestamp_us, events.gap_us)
    for row in (0, 3, 4, 10):
        known = row + 1
        closed = known // size * size
        first = Events.from_log(*(c[:closed] for c in (events.item, events.action, events.timestamp_us)),
                                torch.tensor([0, closed]))  # fmt: skip
        tokens = model.summarizer(first)
        newest = torch.arange(max(0, known - num_recent), known)
        place = torch.arange(len(newest), 0, -1)
        age_s = (batch.asked_us[row] - events.timestamp_us[newest]).clamp(min=0) / 1e6
        age = 1 + (1 + age_s.double()).log2().floor().long()
        x = (model.target + event_x[row])[None, None]
        for block in model.blocks:
            bias = block.age_bias(age) + block.position_bias(place.float().log2().floor().long())
            x = block(x, block.keys_values(tokens), block.keys_values(event_x[newest][None]), bias.T[None, :, None])
        expected = torch.nn.functional.normalize(x[0, 0], dim=-1)
        torch.testing.assert_close(model(batch)[row], expected, rtol=1e-4, atol=1e-5, msg=f"row {row}")


@pytest.mark.parametrize("num_items", [20, PRODUCTS_PER_ROW * 10])
def test_sampled_softmax_is_its_definition(num_items):
    """Both forms: products with all items, and rows fetched."""
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(300, 4, generator=generator, dtype=torch.float64).requires_grad_()
    items = torch.randn(num_items + 1, 4, generator=generator, dtype=torch.float64).requires_grad_()
    target, drawn = (torch.randint(1, num_items + 1, shape, generator=generator) for shape in ((300,), (300, 5)))
    loss = sampled_softmax(query, items, target, drawn, 0.5)
    expected: Tensor = torch.zeros((), dtype=torch.float64)
    for q, t, d in zip(query, target, drawn, strict=True):
        chosen = [int(t), *(int(i) for i in d if i != t)]
        expected = expected + cross_entropy(items[chosen] @ q / 0.5, torch.tensor(0))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
    ours = torch.autograd.grad(loss, (query, items))
    theirs = torch.autograd.grad(expected, (query, items))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_small_lookup_is_an_embedding_with_heads_first():
    weight = torch.randn(7, 3, requires_grad=True)
    index = torch.randint(0, 7, (4, 5))
    ours, theirs = small_lookup(weight, index), weight[index].permute(2, 0, 1)
    assert torch.equal(ours, theirs)
    up = torch.randn(3, 4, 5)
    torch.testing.assert_close(torch.autograd.grad(ours, weight, up)[0], torch.autograd.grad(theirs, weight, up)[0])
