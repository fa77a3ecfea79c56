"""Each baseline against its paper's formula in plain loops, one event and one candidate at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, silu

from tests.models.baselines.worlds import TOP_K, baseline_for, each_candidate, feed_of, raw_of
from vista.batches.builder import Step
from vista.batches.timelines import TimelineWalk
from vista.models.baselines import base, causal, din
from vista.models.baselines.base import Baseline, Window
from vista.models.baselines.din import PairPooling, WeighedUnits
from vista.models.baselines.hstu import HSTU, HSTULayer
from vista.models.baselines.sasrec import SCORE_SCALE, SASRec, SASRecBlock
from vista.models.baselines.sim import SIM
from vista.models.baselines.twin import TWIN
from vista.models.embeddings import gap_bucket
from vista.models.layers import norm

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def naive_reads(model: Baseline, step: Step, naive) -> None:
    """Hold ``read`` to ``naive(model, x, items, age_us, v, item)``, of each candidate of a step."""
    requests = step.batch.requests
    rows, _ = model.prepare(step.batch, ())
    read = model.by_pieces(model.read, rows, requests, model.embedding.items(requests.candidate))
    for q, c, v in each_candidate(model, step):
        x, items, times = raw_of(model, step, q)
        expected = naive(model, x, items, requests.timestamp_us[q] - times, v, int(requests.candidate[q, c]))
        torch.testing.assert_close(read[q, c], expected, **CLOSE)


def steps(model: str, **changes: object) -> tuple[Baseline, list[Step]]:
    feed = feed_of(model, **changes)
    return baseline_for(feed), list(TimelineWalk(feed))


def softmax(logits: list[Tensor]) -> list[Tensor]:
    weights = [logit.exp() for logit in logits]
    return [w / sum(weights) for w in weights]


def bucket(age_us: Tensor) -> int:
    return int(gap_bucket(age_us.clamp(min=0)))


def place_bucket(place_from_newest: int) -> int:
    return int(math.log2(place_from_newest))


def beside_product(read: Tensor, v: Tensor) -> Tensor:
    return torch.cat([norm(read), norm(read) * norm(v)])


def naive_mean(model, x, items, age_us, v, item):
    mean = sum(x) / len(x) if len(x) else torch.zeros_like(v)
    return beside_product(mean, v)


def naive_din(pooling: PairPooling, x, items, v, item):
    """sum of a(e, v) e, the unit on [v, e, v - e, v * e]."""
    unit, total = pooling.unit, torch.zeros_like(v)
    for e, own in zip(x, items, strict=True):
        hidden = unit.prelu(unit.hidden(torch.cat([v, e, v - e, v * e]))[None])[0]
        total = total + (unit.out(hidden) + unit.same_item * (int(own) == item)) * e
    read = torch.asinh(total)
    return torch.cat([read, read * norm(v)])


@pytest.mark.parametrize("units_at_once", [din.UNITS_AT_ONCE, 1])
def test_units_made_again_have_the_gradient_of_their_definition(units_at_once, monkeypatch):
    monkeypatch.setattr(din, "UNITS_AT_ONCE", units_at_once)
    draw = torch.Generator().manual_seed(0)
    shapes = ((3, 2, 5, 4), (3, 6, 4), (5,))  # matrix, e, scale
    given = [torch.randn(s, generator=draw, dtype=torch.float64, requires_grad=True) for s in shapes]
    matrix, e, scale = given
    expected = torch.einsum("qcur,u->qcr", torch.einsum("qcuf,qrf->qcur", matrix, e).relu(), scale)
    torch.testing.assert_close(WeighedUnits.apply(matrix, e, scale), expected)
    assert torch.autograd.gradcheck(WeighedUnits.apply, given)


def naive_twin(model: TWIN, x, items, age_us, v, item):
    heads, width = model.config.num_heads, len(v) // model.config.num_heads
    if not len(x):
        return torch.zeros(2 * len(v))
    q = model.query(norm(v)).view(heads, width)
    alpha = []  # (event, head)
    for j, e in enumerate(x):
        k = model.key(norm(e)).view(heads, width)
        cross = model.bias.age.weight[bucket(age_us[j])] + model.bias.place.weight[place_bucket(len(x) - j)]
        cross = cross + model.bias.same_item * (int(items[j]) == item)
        alpha.append((q * k).sum(1) / width**0.5 + cross)
    kept = sorted(range(len(x)), key=lambda j: -float(alpha[j].mean()))[:TOP_K]
    read = []
    for h in range(heads):
        weights = softmax([alpha[j][h] for j in kept])
        values = [model.value(norm(x[j])).view(heads, width)[h] for j in kept]
        read.append(sum(w * value for w, value in zip(weights, values, strict=True)))
    return beside_product(model.out(torch.cat(read)), v)


def naive_sim(model: SIM, x, items, age_us, v, item):
    heads, width = model.config.num_heads, len(v) // model.config.num_heads
    if model.soft is not None:
        r = [float(model.soft.key(e) @ model.soft.query(v)) for e in x]
        kept = sorted(range(len(x)), key=lambda j: -r[j])[:TOP_K]
    else:
        category = model.embedding.items.features[:, 0]
        same = [j for j in range(len(x)) if category[items[j]] == category[item] and category[item] > 0]
        kept = same[-TOP_K:]
    z = {j: torch.cat([x[j], model.age.weight[bucket(age_us[j])]]) for j in kept}
    w_b = torch.cat([model.key.weight, model.age_key.weight], 1)  # on [e; time]
    q = model.query(v).view(heads, width)
    long_term = []
    for h in range(heads):
        logits = [
            (w_b @ z[j]).view(heads, width)[h] @ q[h] / width**0.5 + model.same_item[h] * (int(items[j]) == item)
            for j in kept
        ]
        head = sum(w * z[j] for w, j in zip(softmax(logits), kept, strict=True)) if kept else torch.zeros(len(v) + 8)
        long_term.append(norm(head))
    newest = slice(max(0, len(x) - model.config.recent_events), None)
    return torch.cat([*long_term, naive_din(model.short_term, x[newest], items[newest], v, item)])


def naive_sasrec_block(block: SASRecBlock, x: Tensor) -> Tensor:
    heads, n, width = block.num_heads, len(x), x.shape[1] // block.num_heads
    h = block.before_attention(x)
    q, k, value = (p(h).view(n, heads, width) for p in (block.query, block.key, block.value))
    rows = []
    for i in range(n):
        read = []
        for head in range(heads):
            logits = [q[i, head] @ k[j, head] / width**0.5 + block.distance.weight[i - j, head] for j in range(i + 1)]
            read.append(sum(w * value[j, head] for j, w in enumerate(softmax(logits))))
        row = x[i] + torch.cat(read)
        rows.append(row + block.second(block.first(block.before_network(row)).relu()))
    return torch.stack(rows)


def naive_sasrec(model: SASRec, x, items, age_us, v, item):
    if not len(x):
        return torch.zeros(2 * len(v))
    for block in model.blocks:
        x = naive_sasrec_block(block, x)
    return beside_product(model.last_norm(x[-1]), v)


def naive_hstu_row(layer: HSTULayer, x: Tensor, i: int, bias) -> Tensor:
    """Row i of a layer over rows x, where row i sees rows 0 .. i; bias(j) (H,)."""
    heads, width = layer.config.num_heads, x.shape[1] // layer.config.num_heads
    parts = [
        [p.view(heads, width) for p in silu(layer.into(layer_norm(row, row.shape, eps=1e-6))).chunk(4)] for row in x
    ]
    attended = torch.zeros(heads, width)
    for j in range(i + 1):
        weight = silu((parts[i][2] * parts[j][3]).sum(1) + bias(j)) / layer.config.history_events
        attended = attended + weight[:, None] * parts[j][1]
    attended = attended.flatten()
    return x[i] + layer.out(layer_norm(attended, attended.shape, eps=1e-6) * parts[i][0].flatten())


def naive_hstu(model: HSTU, x, items, age_us, v, item):
    """The candidate as one more row behind the history, at the time of the request."""
    rows, age = torch.cat([x, (v + model.target)[None]]), torch.cat([age_us, torch.zeros(1, dtype=torch.int64)])

    def bias(layer: HSTULayer, i: int, j: int) -> Tensor:
        sides = layer.distance.weight[i - j] + layer.time.weight[bucket(age[j] - age[i])]
        is_own = i == len(x) and j < len(x) and int(items[j]) == item
        return sides + layer.same_item * is_own

    for layer in model.layers:
        rows = torch.stack(
            [naive_hstu_row(layer, rows, i, lambda j, i=i, layer=layer: bias(layer, i, j)) for i in range(len(rows))]
        )
    return norm(rows[-1])


def test_a_window_is_what_each_request_knows_side_by_side():
    """One stretch for all requests of a piece says of each event what the requests' own columns say."""
    feed = feed_of("twin")
    for step in TimelineWalk(feed):
        for rows in base.close_together(step.batch.requests, 5):
            requests = step.batch.requests.rows(rows)
            window, own = Window.of(requests), Window.own(requests)
            for q, known in enumerate(requests.recent.tolist()):
                there, mine = window.is_there[q], own.is_there[q]
                events = (torch.arange(window.rows.start, window.rows.stop)[there]).tolist()
                assert events == [row for row in known if row >= 0]
                for name in ("place", "item", "age_us"):
                    assert torch.equal(getattr(window, name)[q][there], getattr(own, name)[q][mine]), name


def test_pieces_hold_every_request_once_and_only_those_that_lie_close():
    recent = torch.tensor([[-1, -1], [0, 1], [1, 2], [70, 71], [71, 72], [900, 901]])
    requests = replace(next(iter(TimelineWalk(feed_of("twin")))).batch.requests.rows(slice(0, 6)), recent=recent)
    assert list(base.close_together(requests, 100)) == [slice(0, 3), slice(3, 5), slice(5, 6)]
    assert list(base.close_together(requests, 2)) == [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6)]
    assert list(base.close_together(requests.rows(slice(0, 0)), 2)) == [slice(0, 0)]


NAIVE = {
    "mean": naive_mean,
    "din": lambda model, x, items, age_us, v, item: naive_din(model.pooling, x, items, v, item),
    "sim": naive_sim,
    "twin": naive_twin,
    "sasrec": naive_sasrec,
    "hstu": naive_hstu,
}


@pytest.mark.parametrize("in_small_pieces", [False, True])
@pytest.mark.parametrize("kind", NAIVE)
@torch.no_grad()
def test_what_a_candidate_reads_is_the_papers_formula(kind, in_small_pieces, monkeypatch):
    if in_small_pieces:  # one request at a time, its candidates parted; attention in many blocks
        monkeypatch.setattr(base, "NUMBERS_PER_PIECE", 300)
        monkeypatch.setattr(causal, "BLOCK_ROWS", 5)
    model, all_steps = steps(kind)
    is_slow = kind in ("sasrec", "hstu")  # whole encoders in plain loops
    for step in [all_steps[0], all_steps[-1]] if is_slow else all_steps:
        naive_reads(model, step, NAIVE[kind])


@torch.no_grad()
def test_soft_search_takes_the_largest_inner_products():
    model, all_steps = steps("sim", search="soft")
    naive_reads(model, all_steps[0], naive_sim)


@torch.no_grad()
def test_soft_search_is_trained_on_the_sum_weighted_by_its_scores():
    """U_r = sum_b r_b e_b through a head of its own, in training alone."""
    model, all_steps = steps("sim", search="soft")
    assert isinstance(model, SIM)
    assert model.soft is not None
    step = all_steps[0]
    assert model(step.batch, ()).auxiliary is None
    auxiliary = model.train()(step.batch, ()).auxiliary
    for q, c, v in each_candidate(model, step):
        x, _, _ = raw_of(model, step, q)
        pooled = sum(((model.soft.key(e) @ model.soft.query(v)) * e for e in x), torch.zeros_like(v))
        expected = model.soft.head(torch.cat([torch.asinh(pooled), norm(v)]))
        torch.testing.assert_close(auxiliary[q, c], expected, **CLOSE)


def test_choosing_passes_no_gradient_and_soft_search_learns_by_its_own_loss():
    model, all_steps = steps("sim", search="soft")
    assert isinstance(model, SIM)
    assert model.soft is not None
    output = model.train()(all_steps[0].batch, ())
    output.logits.sum().backward(retain_graph=True)
    assert model.soft.key.weight.grad is None
    assert output.auxiliary is not None
    output.auxiliary.sum().backward()
    assert model.soft.key.weight.grad is not None
    assert model.soft.key.weight.grad.any()


@torch.no_grad()
def test_sasrec_adds_the_inner_product_of_row_and_item():
    model, all_steps = steps("sasrec")
    assert isinstance(model, SASRec)
    step = all_steps[0]
    with_product = model(step.batch, ()).logits
    model.scale.zero_()
    without = model(step.batch, ()).logits
    for q, c, v in each_candidate(model, step):
        row = naive_sasrec(model, *raw_of(model, step, q), v, 0)[: len(v)]
        expected = SCORE_SCALE * (row @ norm(v)) / len(v) ** 0.5
        torch.testing.assert_close((with_product - without)[q, c, 0], expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_hard_search_without_categories_compares_items():
    model, _ = steps("sim")
    assert isinstance(model, SIM)
    item = torch.tensor([7, 0])
    assert model.category(item).tolist() == [7 % 6, 0]
    model.embedding.items.features = torch.zeros(len(model.embedding.items.features), 0, dtype=torch.int64)
    assert model.category(item).tolist() == [7, 0]
