"""The contract of a model: what every choice of ``--model`` must do, a new one as soon as config.py lists it."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from tests.models.baselines.worlds import baseline_for, feed_of, logits_of, model_for
from tests.models.worlds import NUM_ACTIONS, catalogue
from vista.batches.plans import Feed
from vista.batches.timelines import TimelineWalk
from vista.checkpoint import load_weights, read_tensors, write_tensors
from vista.config import _CHOICES
from vista.models.baselines import base, causal
from vista.models.embeddings import ItemTables
from vista.models.vista import make_model

MODELS = _CHOICES["model.model"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
every_model = pytest.mark.parametrize("name", MODELS)


def assert_close(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for row, value in a.items():
        torch.testing.assert_close(value, b[row], **CLOSE)


def with_train(feed: Feed, **changes: object) -> Feed:
    return replace(feed, config=replace(feed.config, train=replace(feed.config.train, **changes)))


@every_model
def test_a_request_scores_the_same_in_every_batch(name):
    feed = feed_of(name)
    model = model_for(feed)
    with torch.no_grad():
        together = logits_of(model, with_train(feed, requests_per_step=64, window_segments=50))
        alone = logits_of(model, with_train(feed, requests_per_step=1, window_segments=1))
    assert len(alone) == feed.impressions.num_impressions
    assert_close(together, alone)
    assert len({round(float(value), 4) for value in alone.values()}) > len(alone) // 2, "scores hardly differ"


@every_model
def test_the_order_of_users_changes_nothing(name):
    feed = feed_of(name)
    model = model_for(feed)
    backwards = TimelineWalk(feed)
    backwards.order = backwards.order[::-1]
    with torch.no_grad():
        expected = logits_of(model, with_train(feed, window_segments=50, requests_per_step=1000))
        found = {}
        for step in backwards:
            logits = model(step.batch, model.init_memory(len(step.users))).logits
            if not any(step.is_carried):  # a lane under way would want its memory
                is_valid = step.batch.is_valid
                found |= dict(zip(step.batch.impression[is_valid].tolist(), logits[is_valid], strict=True))
    assert len(found) > 10
    assert_close(found, {row: expected[row] for row in found})


@every_model
def test_nothing_at_or_after_a_request_is_read(name):
    """Change every event of one user from a request on: its score and those before it stay, others change."""
    feed = feed_of(name)
    model = model_for(feed)
    log, shown = feed.histories, feed.impressions
    request = int(np.searchsorted(shown.user, 0, side="right")) // 2
    first, last = int(log.offsets[0]) + int(shown.num_known[request]), int(log.offsets[1])
    item, action = log.item.copy(), log.action.copy()
    item[first:last], action[first:last] = 5, 1
    changed = replace(feed, histories=replace(log, item=item, action=action))
    with torch.no_grad():
        before, after = logits_of(model, feed), logits_of(model, changed)
    known = range(int(shown.offsets[request + 1]))
    torch.testing.assert_close([before[row] for row in known], [after[row] for row in known], **CLOSE)
    if feed.config.model.kind != "counts":
        assert any(not torch.allclose(before[row], after[row], atol=1e-4) for row in before)


@every_model
def test_other_candidates_change_nothing(name):
    feed = feed_of(name)
    model = model_for(feed)
    with torch.no_grad():
        step = next(iter(TimelineWalk(feed)))
        prepared, _ = model.prepare(step.batch, model.init_memory(len(step.users)))
        together = model.rank(prepared, step.batch.requests)
        for c in range(together.shape[1]):
            alone = model.rank(prepared, step.batch.requests.candidates(slice(c, c + 1)))
            is_valid = step.batch.is_valid[:, c]
            torch.testing.assert_close(alone[is_valid, 0], together[is_valid, c], **CLOSE)


@every_model
def test_a_batch_without_requests_is_scored_as_nothing(name):
    feed = feed_of(name)
    model = model_for(feed)
    step = next(iter(TimelineWalk(feed)))
    prepared, _ = model.prepare(step.batch, model.init_memory(len(step.users)))
    none = step.batch.requests.rows(slice(0, 0))
    assert model.rank(prepared, none).shape == (0, none.candidate.shape[1], 1)


@every_model
def test_a_single_impression_can_be_trained_on(name):
    """The last batch of an epoch may hold no more."""
    feed = with_train(feed_of(name, train=True), requests_per_step=1)
    model = model_for(feed).train()
    step = next(step for step in TimelineWalk(feed) if step.batch.is_valid.sum() == 1)
    logits = model(step.batch, model.init_memory(len(step.users))).logits[step.batch.is_valid]
    assert logits.isfinite().all()


@every_model
def test_saved_and_loaded_it_scores_the_same(name, tmp_path):
    feed = feed_of(name)
    model, other = model_for(feed, seed=0), model_for(feed, seed=1)
    write_tensors(tmp_path / "model.safetensors", model.state_dict())
    with torch.no_grad():
        expected = logits_of(model, feed)
        assert any(not torch.equal(value, expected[row]) for row, value in logits_of(other, feed).items())
        load_weights(other, read_tensors(tmp_path / "model.safetensors")[0], tmp_path)
        found = logits_of(other, feed)
    assert all(torch.equal(found[row], value) for row, value in expected.items())


@every_model
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_reach_every_weight(name, precision):
    """In training form, over an epoch, with a gradient that is finite; and in bfloat16, too."""
    feed = feed_of(name, train=True, search="soft")
    model = model_for(feed).train()
    for step in islice(TimelineWalk(feed), 10):
        with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
            output = model(step.batch, model.init_memory(len(step.users)))
        parts = (output.logits[step.batch.is_valid], output.reconstruction, output.auxiliary)
        torch.cat([part.float().square().flatten() for part in parts if part is not None]).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{parameter_name} is not used"
        values = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
        assert values.isfinite().all(), parameter_name
        assert values.any(), f"{parameter_name} gets no gradient"


@pytest.mark.parametrize("name", ["din", "sim", "twin", "sasrec", "hstu", "twin+counts"])
def test_the_gradient_is_the_same_in_pieces(name, monkeypatch):
    """Recomputed piece by piece, with dropout drawn again as it was: the loss and the gradient of one piece."""
    feed = feed_of(name, train=True)
    step = next(iter(TimelineWalk(feed, seed=2)))

    def gradient() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = model_for(feed).train()
        loss = model(step.batch, ()).logits[step.batch.is_valid].square().sum()
        loss.backward()
        return loss, {n: p.grad.to_dense() for n, p in model.named_parameters() if p.grad is not None}

    loss, whole = gradient()
    monkeypatch.setattr(base, "NUMBERS_PER_PIECE", 2000)
    monkeypatch.setattr(base, "NUMBERS_KEPT", 0)
    monkeypatch.setattr(causal, "NUMBERS_KEPT", 0)
    monkeypatch.setattr(causal, "NUMBERS_PER_PIECE", 2000)
    monkeypatch.setattr(causal, "BLOCK_ROWS", 7)
    in_pieces_loss, in_pieces = gradient()
    torch.testing.assert_close(in_pieces_loss, loss, **CLOSE)
    assert whole.keys() == in_pieces.keys()
    for key, value in whole.items():
        torch.testing.assert_close(in_pieces[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["din", "sim", "twin", "hstu"])
def test_pieces_are_not_kept_for_the_gradient(name, monkeypatch):
    """What a step keeps does not grow with requests x candidates x events: pieces are made again on the way back."""
    feed = feed_of(name, train=True)
    model = model_for(feed).train()
    step = next(iter(TimelineWalk(feed, seed=2)))

    def kept() -> int:
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        rows, _ = model.prepare(step.batch, ())
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model.rank(rows, step.batch.requests)
        return total

    whole = kept()
    monkeypatch.setattr(base, "NUMBERS_KEPT", 0)
    assert kept() < whole / 2


@pytest.mark.parametrize("name", ["sasrec", "hstu"])
def test_training_form_equals_evaluation_form_while_a_history_fits(name):
    """A window of 24 events: the same for requests with up to 24 known events, and for others not."""
    feed = feed_of(name)
    model = baseline_for(feed)
    differs = 0
    with torch.no_grad():
        for step in TimelineWalk(feed):
            window = model.eval()(step.batch, ()).logits
            lane = model.train()(step.batch, ()).logits
            fits = step.batch.is_valid & (step.batch.requests.num_known <= 24)[:, None]
            torch.testing.assert_close(lane[fits], window[fits], **CLOSE)
            others = step.batch.is_valid & ~fits
            differs += int((~torch.isclose(lane[others], window[others], atol=1e-5)).sum())
    assert differs > 0


def test_a_single_layer_gives_the_same_in_both_forms_at_any_length():
    """Every row sees as many rows before it in training as it does in its own window."""
    feed = feed_of("sasrec", encoder_layers=1)
    model = baseline_for(feed)
    with torch.no_grad():
        for step in TimelineWalk(feed):
            window, lane = model.eval()(step.batch, ()).logits, model.train()(step.batch, ()).logits
            torch.testing.assert_close(lane[step.batch.is_valid], window[step.batch.is_valid], **CLOSE)


@every_model
def test_a_history_beyond_the_window_is_not_read(name):
    """Only memory and counts go further back than the raw events."""
    feed = feed_of(name)
    if feed.config.model.kind in ("vista", "counts"):
        return
    model = model_for(feed)
    log, shown = feed.histories, feed.impressions
    reach = feed.config.model.raw_events
    request = int(np.searchsorted(shown.user, 0, side="right")) - 1
    oldest = int(shown.num_known[request]) - reach
    assert oldest > 1
    item = log.item.copy()
    item[: oldest - 1] = 5  # one event further back still enters the oldest one's vector, by its time alone
    with torch.no_grad():
        before = logits_of(model, feed)
        after = logits_of(model, replace(feed, histories=replace(log, item=item)))
    rows = range(int(shown.offsets[request]), int(shown.offsets[request + 1]))
    torch.testing.assert_close([before[row] for row in rows], [after[row] for row in rows], **CLOSE)


def test_items_and_categories_are_tied_to_those_of_events():
    feed = feed_of("twin")
    model = make_model(feed.config.model, ItemTables.of(catalogue()), NUM_ACTIONS, 1, (), 0)
    assert sum(name.endswith("items.rows.weight") for name, _ in model.named_parameters()) == 1
