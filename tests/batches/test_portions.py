"""A step shared over processes and portions holds what it holds undivided; batches made ahead are the same batches."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from tests.batches.test_timelines import make_feed, make_model
from vista.batches.portions import Sharer, ahead, share_out
from vista.batches.timelines import MemoryCarry, TimelineWalk

STEPS = 10  # of a walk without end


@pytest.mark.parametrize(("num_processes", "portions"), [(1, 3), (2, 1), (3, 2)])
def test_portions_hold_the_step_and_weigh_as_much_as_they_hold(num_processes, portions):
    feed = make_feed(train=True, requests_per_step=24)
    whole = list(islice(TimelineWalk(feed, seed=5), STEPS))
    sharers = [Sharer(feed, rank, portions) for rank in range(num_processes)]
    walks = [islice(s.steps(TimelineWalk(feed, 5, num_processes=num_processes)), STEPS) for s in sharers]
    num_shared = 0
    for step, *shared in zip(whole, *walks, strict=True):
        parts = [portion for one in shared for portion in one.portions]
        num_shared += len(parts) > 1
        users = [user for part in parts for user in part.step.users]
        assert sorted(users) == sorted(step.users)
        shown = [part.step.batch.impression[part.step.batch.is_valid].numpy() for part in parts]
        assert sorted(np.concatenate(shown)) == sorted(step.batch.impression[step.batch.is_valid].numpy())
        assert [part.impressions for part in parts] == [len(s) / int(step.batch.is_valid.sum()) for s in shown]
        total = 0 if step.batch.windows is None else len(step.batch.windows.index)
        windows = [0 if part.step.batch.windows is None else len(part.step.batch.windows.index) for part in parts]
        assert sum(windows) == total
        assert [part.windows for part in parts] == [n / max(total, 1) for n in windows]
    assert num_shared > 1


def test_portions_read_the_borders_that_were_drawn_for_them():
    """Staleness is drawn for the whole step: a request scores the same in whichever portion it is."""
    feed = make_feed(train=True, requests_per_step=24, max_stale_segments=1)
    model = make_model(feed)

    def logits(portions: int) -> dict[int, float]:
        carry, found = MemoryCarry(), {}
        for shared in islice(Sharer(feed, 0, portions).steps(TimelineWalk(feed, seed=5)), STEPS):
            for step in (portion.step for portion in shared.portions):
                output = model(step.batch, carry.gather(step, model.init_memory(len(step.users))))
                carry.keep(step, output.memory)
                mine = step.batch.is_valid
                pairs = zip(step.batch.impression[mine].tolist(), output.logits[mine].flatten().tolist(), strict=True)
                found.update(pairs)
        return found

    assert logits(3) == pytest.approx(logits(1), abs=1e-5)


def test_a_walk_goes_on_with_another_number_of_processes():
    feed = make_feed(train=True, requests_per_step=12)
    plans = list(islice(TimelineWalk(feed, 3, num_processes=3).plans(), STEPS))
    resumed = TimelineWalk(feed, 3, num_processes=2)
    resumed.resume(plans[1].position)
    rest = list(islice(resumed.plans(), STEPS - 2))
    assert [p.stretches for p in rest] == [p.stretches for p in plans[2:]]
    assert all((a.drawn.border == b.drawn.border).all() for a, b in zip(rest, plans[2:], strict=True))
    assert {process for plan in rest for process in plan.process} == {0, 1}


def test_new_lanes_go_to_whoever_has_least_to_do():
    feed = make_feed(train=True, requests_per_step=200, window_segments=50)
    plan = next(TimelineWalk(replace(feed, users=np.array([0, 2, 3, 4])), num_processes=2).plans())
    work = np.array([feed.work(stretch) for stretch in plan.stretches])
    loads = [work[np.array(plan.process) == process].sum() for process in (0, 1)]
    assert max(loads) - min(loads) <= work.max()


def test_share_out_gives_each_about_the_same():
    owner = share_out(np.array([8, 1, 7, 2, 3, 3]), 2)
    assert sorted(np.bincount(owner, [8, 1, 7, 2, 3, 3])) == [12, 12]
    assert share_out(np.zeros(0), 3).tolist() == []


@pytest.mark.parametrize("number", [0, 1, 4])
def test_values_made_ahead_are_the_same_in_the_same_order(number):
    assert list(ahead(iter(range(20)), number)) == list(range(20))


def test_no_more_is_made_ahead_than_asked_for_and_nothing_after_the_end():
    made: list[int] = []

    def values():
        for i in range(100):
            made.append(i)
            yield i

    with closing(ahead(values(), 2)) as taken:
        assert next(taken) == 0
        threads = [thread for thread in threading.enumerate() if thread.name == "batches ahead"]
        assert len(threads) == 1
    assert len(made) <= 5
    assert not threads[0].is_alive()


def test_an_error_made_ahead_is_raised_in_its_place():
    def values():
        yield 1
        raise ValueError("no more")

    taken = ahead(values(), 3)
    assert next(taken) == 1
    with pytest.raises(ValueError, match="no more"):
        next(taken)
