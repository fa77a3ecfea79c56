"""The ranker: what candidates see, and what they do not."""

from __future__ import annotations

import pytest
import torch

from vista.config import resolve
from vista.models.batch import Requests
from vista.models.ranker import Ranker

WIDTH, RECENT, CANDIDATES = 32, 6, 5
CONFIG = resolve("tiny", overrides={"model.recent_events": 64}).model


def requests(recent_item: torch.Tensor, candidate: torch.Tensor) -> Requests:
    """One user whose recent events stand in rows 0 .. RECENT - 1; item 0 is no event."""
    rows = torch.arange(recent_item.shape[1])[None]
    return Requests(
        summary=torch.zeros(1, dtype=torch.int64),
        recent=torch.where(recent_item > 0, rows, -1),
        recent_item=recent_item,
        recent_us=torch.arange(recent_item.shape[1])[None] * 10**6,
        timestamp_us=torch.tensor([10**8]),
        num_known=(recent_item > 0).sum(1),
        candidate=candidate,
        context=torch.zeros(1, candidate.shape[1], 0),
    )


def score(ranker: Ranker, of: Requests, event_x: torch.Tensor, candidate_x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    tokens = torch.randn(1, CONFIG.num_seeds, WIDTH)
    with torch.no_grad():
        return ranker(ranker.prepare(tokens, event_x), of, candidate_x)[0, :, 0]


def setting() -> tuple[Ranker, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    ranker = Ranker(CONFIG, 1, ()).eval()
    return ranker, torch.randn(RECENT, WIDTH), torch.randn(1, CANDIDATES, WIDTH)


def test_a_candidate_never_sees_another() -> None:
    ranker, event_x, candidate_x = setting()
    item = torch.tensor([[7, 8, 9, 8, 7, 3]])
    all_at_once = requests(item, torch.tensor([[7, 20, 9, 21, 22]]))
    together = score(ranker, all_at_once, event_x, candidate_x)
    for place in range(CANDIDATES):
        alone = requests(item, all_at_once.candidate[:, place : place + 1])
        assert torch.allclose(
            score(ranker, alone, event_x, candidate_x[:, place : place + 1])[0], together[place], atol=1e-6
        )


def test_a_recent_event_of_the_own_item_counts_whatever_the_vectors_say() -> None:
    """With equal vectors everywhere, the item index alone makes the difference; padding never does."""
    ranker, event_x, candidate_x = setting()
    same_vector = candidate_x[:, :1].expand(-1, 2, -1)
    known, unknown = score(
        ranker, requests(torch.tensor([[7, 8, 9, 8, 7, 3]]), torch.tensor([[7, 50]])), event_x, same_vector
    )
    assert not torch.allclose(known, unknown, atol=1e-4)
    none, padding = score(
        ranker, requests(torch.tensor([[0, 0, 9, 8, 7, 3]]), torch.tensor([[50, 0]])), event_x, same_vector
    )
    assert torch.allclose(none, padding, atol=1e-6)


def test_the_place_of_an_absent_event_is_not_read() -> None:
    ranker, event_x, candidate_x = setting()
    of = requests(torch.tensor([[0, 0, 9, 8, 7, 3]]), torch.tensor([[7, 20, 9, 21, 22]]))
    before = score(ranker, of, event_x, candidate_x)
    event_x[:2] = 1e3
    assert torch.equal(score(ranker, of, event_x, candidate_x), before)


@pytest.mark.parametrize("item", [[7, 8, 9, 8, 7, 3], [0, 0, 0, 0, 8, 7], [0] * 6])
@pytest.mark.parametrize("num_tokens", [0, 4])
def test_scores_are_the_same_source_by_source(item: list[int], num_tokens: int) -> None:
    """As bulk and online compute them, as training does, and as explanations do."""
    ranker, event_x, candidate_x = setting()
    for parameter in ranker.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    of = requests(torch.tensor([item]), torch.tensor([[7, 20, 9, 21, 8]]))
    cache = ranker.prepare(torch.randn(1, num_tokens, WIDTH), event_x)
    expected, seen = ranker(cache, of, candidate_x), []
    with torch.no_grad():
        torch.testing.assert_close(ranker(cache, of, candidate_x), expected)
        torch.testing.assert_close(ranker(cache, of, candidate_x, seen), expected)
    assert [tuple(weight.shape[-2:]) for weight in seen] == [(CANDIDATES, num_tokens + RECENT + 1)] * len(seen)
