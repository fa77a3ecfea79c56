"""The head: exact counts are standardised by what was measured, and have a logit of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.models.test_ranker import CONFIG, WIDTH, requests
from vista.config import resolve
from vista.models.counts import CountsModel
from vista.models.embeddings import ContextEncoder
from vista.models.head import LEAST_DEVIATION, CountsEncoder, Head
from vista.schema import ContextColumn

NUM_COUNTS = 3


def asked(seed: int = 0):
    """Five candidates with counts, the last of them padding."""
    of = requests(torch.tensor([[7, 8, 9]]), torch.tensor([[11, 12, 13, 14, 0]]))
    generator = torch.Generator().manual_seed(seed)
    return replace(of, counts=torch.randn(1, 5, NUM_COUNTS, generator=generator) * 4 + 3)


def test_counts_are_standardised_by_all_that_was_measured_and_by_nothing_later():
    encoder, batches = CountsEncoder(NUM_COUNTS), [asked(seed) for seed in range(6)]
    for batch in batches:
        batch.counts[..., 2] = 7.0  # a column that never varies where it is measured
    with encoder.measuring():
        for batch in batches:
            encoder(batch)
    seen = torch.cat([batch.counts[0, :4] for batch in batches])  # padding is not counted
    torch.testing.assert_close(encoder.mean, seen.mean(0))
    torch.testing.assert_close(encoder.scale, seen.std(0, correction=0).clamp(min=LEAST_DEVIATION))
    known, modes = asked(9), []
    for is_training in (True, False):
        encoder.train(is_training)
        modes.append(encoder(known))
    torch.testing.assert_close(
        modes[0], ((known.counts - encoder.mean) / encoder.scale) * (known.candidate > 0)[..., None]
    )
    assert torch.equal(*modes)
    torch.testing.assert_close(encoder.mean, seen.mean(0))


@pytest.mark.parametrize("num_counts", [0, NUM_COUNTS])
def test_facts_have_a_logit_that_no_vector_changes(num_counts):
    """With the weights of the joint network at zero, counts still tell candidates apart, and vectors do not."""
    torch.manual_seed(0)
    head = Head(CONFIG, ContextEncoder(()), WIDTH, 1, num_counts).eval()
    for parameter in head.layers.parameters():
        torch.nn.init.zeros_(parameter)
    of = asked() if num_counts else replace(asked(), counts=None)
    vectors = [(torch.randn(1, 5, WIDTH), torch.randn(1, 5, WIDTH)) for _ in range(2)]
    found = [head(read, x, of) for read, x in vectors]
    assert torch.equal(*found)
    differ = found[0][0, :4].std()
    assert differ > 1e-3 if num_counts else differ == 0


def test_the_logits_of_both_networks_are_added():
    torch.manual_seed(0)
    head = Head(CONFIG, ContextEncoder(()), WIDTH, 1, NUM_COUNTS).eval()
    read, x, of = torch.randn(1, 5, WIDTH), torch.randn(1, 5, WIDTH), asked()
    both = head(read, x, of)
    for parameter in head.of_facts.parameters():
        torch.nn.init.zeros_(parameter)
    joint = head(read, x, of)
    assert (both - joint).std() > 1e-3
    assert (joint - head(read, x.flip(1), of)).abs().max() > 1e-4


def test_a_context_value_out_of_all_bounds_makes_no_logit_that_is_no_number():
    """Online a mistake may be any float32."""
    columns = tuple(ContextColumn(name, "number", 10.0, 2.0) for name in "abcdefgh")
    encoder = ContextEncoder(columns)
    x = torch.tensor([[[3.4e38] * 8, [-3.4e38] * 8, [float("inf")] * 8, [float("nan")] * 8, [12.0] * 8]])
    assert encoder(x)[0, :, 0].tolist() == [100.0, -100.0, 100.0, 0.0, 1.0]


def test_the_control_knows_how_long_ago_the_user_was_there_and_not_what_for():
    """Of the newest event `counts` reads the time alone, as every other model's head does beside counts."""
    config = resolve("tiny", overrides={"model.model": "counts"}).model
    torch.manual_seed(0)
    model = CountsModel(config, 1, (), NUM_COUNTS).eval()
    of = asked()
    later = replace(of, timestamp_us=of.timestamp_us + 10**9)
    other_item = replace(of, recent_item=of.recent_item.flip(1))
    scores = [model.rank(None, requests)[0, :4, 0] for requests in (of, later, other_item)]
    assert (scores[0] - scores[1]).abs().min() > 1e-4
    torch.testing.assert_close(scores[0], scores[2], rtol=0, atol=0)
