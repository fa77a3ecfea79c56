"""A pass over timelines scores every request once, from what was known then, exactly as ranking it alone would."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.worlds import NUM_ACTIONS, NUM_ITEMS, catalogue, model_config
from vista.batches.plans import Feed
from vista.batches.timelines import MemoryCarry, TimelineWalk
from vista.config import Config, TrainConfig, resolve
from vista.data.histories import Histories, Impressions
from vista.errors import ConfigError
from vista.models.batch import flatten, unflatten
from vista.models.embeddings import ItemTables
from vista.models.inputs import Events, ragged_arange
from vista.models.vista import SequenceModel
from vista.schema import ContextColumn

CONTEXT = (ContextColumn("price", "number", 0.2, 1.5), ContextColumn("page", "category"))
LENGTHS = [70, 0, 5, 33, 8]


def world(seed: int = 0) -> tuple[Histories, Impressions]:
    """Histories of LENGTHS, and about one request per two events, 1 to 4 candidates each."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    total = int(offsets[-1])
    times = np.concatenate([10**15 + np.cumsum(rng.integers(1, 10**10, n)) for n in LENGTHS]).astype(np.int64)
    log = Histories(
        offsets,
        rng.integers(5, 5 + NUM_ITEMS, total).astype(np.int32),
        rng.integers(0, 4, total).astype(np.int16),
        times,
    )
    user, time, known = [], [], []
    for u, n in enumerate(LENGTHS):
        for place in sorted(rng.choice(n + 1, size=n // 2 + 2).tolist()):
            mine = times[offsets[u] : offsets[u + 1]]
            user.append(u)
            known.append(place)
            time.append(int(mine[place - 1]) + 1 if place else 10**15)
    sizes = rng.integers(1, 5, len(user))
    num = int(sizes.sum())
    return log, Impressions(
        np.array(user, np.int32),
        np.array(time, np.int64),
        np.array(known, np.int64),
        np.concatenate([[0], np.cumsum(sizes)]),
        rng.integers(5, 5 + NUM_ITEMS, num).astype(np.int32),
        rng.integers(0, 2, (num, 1)).astype(np.int8),
        np.zeros(num, np.int8),
        np.stack([rng.normal(size=num), rng.integers(0, 1024, num)], 1).astype(np.float32),
    )


def make_feed(train: bool = False, seed: int = 0, **train_changes: object) -> Feed:
    settings = {"requests_per_step": 16, "window_segments": 2, "reconstruction_events": 8} | train_changes
    config = Config(model_config(), TrainConfig(**settings))  # type: ignore[arg-type]
    return Feed(*world(seed), config, train=train)


def make_model(feed: Feed, **changes: object) -> SequenceModel:
    torch.manual_seed(0)
    config = replace(feed.config.model, **changes)
    return SequenceModel(config, ItemTables.of(catalogue()), NUM_ACTIONS, num_tasks=1, context=CONTEXT).eval()


def alone(model: SequenceModel, feed: Feed, request: int, stale_segments: int = 0) -> torch.Tensor:
    """One request, ranked as a server would: a state up to a closed border, and the newest events."""
    log, shown, size = feed.histories, feed.impressions, feed.config.model.segment_events
    user, known = int(shown.user[request]), int(shown.num_known[request])
    border = (known // size - stale_segments) * size

    def events(count: int) -> Events:
        rows = slice(int(log.offsets[user]), int(log.offsets[user]) + count)
        columns = (torch.from_numpy(a[rows].astype(np.int64)) for a in (log.item, log.action, log.timestamp_us))
        return Events.from_log(*columns, torch.tensor([0, count]))

    assert model.summarizer is not None
    at_border = model.summarizer.extend(model.summarizer.init_state(1), events(border))
    tokens = model.summarizer.read(at_border)
    recent = model.summarizer.extend(model.summarizer.init_state(1), events(known)).recent
    rows = slice(int(shown.offsets[request]), int(shown.offsets[request + 1]))
    return model.rank_users(
        tokens,
        recent,
        torch.tensor([known]),
        torch.from_numpy(shown.timestamp_us[request : request + 1]),
        torch.from_numpy(shown.item[rows].astype(np.int64))[None],
        torch.from_numpy(shown.context[rows])[None],
        readout=model.state_readout(at_border) if model.config.has_candidate_memory else None,
    )[0]


def run(model: SequenceModel, feed: Feed, seed: int = 0) -> dict[int, torch.Tensor]:
    """The logits of every impression of one epoch."""
    carry, logits = MemoryCarry(), {}
    for step in TimelineWalk(feed, seed):
        output = model(step.batch, carry.gather(step, model.init_memory(len(step.users))))
        carry.keep(step, output.memory)
        for row, value in zip(
            step.batch.impression[step.batch.is_valid].tolist(), output.logits[step.batch.is_valid], strict=True
        ):
            assert row not in logits, "an impression came twice"
            logits[row] = value
    assert not carry.by_user, "memory is kept for users who are done"
    return logits


@pytest.mark.parametrize("requests_per_step", [1, 7, 64])
@pytest.mark.parametrize("window_segments", [1, 3, 50])
def test_every_request_scores_as_it_would_alone(requests_per_step, window_segments):
    feed = make_feed(requests_per_step=requests_per_step, window_segments=window_segments)
    model = make_model(feed, candidate_memory="ridge" if window_segments == 3 else "none")
    with torch.no_grad():
        logits = run(model, feed)
        assert sorted(logits) == list(range(feed.impressions.num_impressions))
        for request in range(feed.impressions.num_requests):
            rows = range(int(feed.impressions.offsets[request]), int(feed.impressions.offsets[request + 1]))
            together = torch.stack([logits[row] for row in rows])
            torch.testing.assert_close(together, alone(model, feed, request), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["qla", "softmax"])
def test_scope_full_reads_the_whole_history_at_each_border(attention):
    feed = make_feed()
    feed = replace(
        feed, config=replace(feed.config, model=replace(feed.config.model, scope="full", attention=attention))
    )
    model = make_model(feed)
    with torch.no_grad():
        logits = run(model, feed)
        for request in range(0, feed.impressions.num_requests, 5):
            first = int(feed.impressions.offsets[request])
            expected = _alone_full(model, feed, request)[0]
            torch.testing.assert_close(logits[first], expected, rtol=1e-4, atol=1e-4)


def _alone_full(model: SequenceModel, feed: Feed, request: int) -> torch.Tensor:
    segment = make_model(feed, scope="segment").summarizer
    assert segment is not None
    assert model.summarizer is not None
    full = model.summarizer
    size, known = feed.config.model.segment_events, int(feed.impressions.num_known[request])
    # recent events come from a segment-scoped summarizer, the tokens from the full one
    with_recent = make_model(feed, scope="segment")
    with_recent.summarizer = _Both(full, segment, known // size * size)  # type: ignore[assignment]
    with_recent.ranker = model.ranker
    return alone(with_recent, feed, request)


class _Both(torch.nn.Module):
    """Tokens of one summarizer, recent events of another."""

    def __init__(self, full, segment, border):
        super().__init__()
        self.full, self.segment, self.border = full, segment, border
        self.embedding, self.sketch = full.embedding, full.sketch

    def init_state(self, n):
        return self.full.init_state(n), self.segment.init_state(n)

    def extend(self, state, events):
        class State:
            pass

        both = State()
        both.full, both.segment = self.full.extend(state[0], events), self.segment.extend(state[1], events)
        both.recent = both.segment.recent
        return both

    def read(self, both):
        return self.full.read(both.full)


def test_training_reads_a_newest_or_slightly_older_border():
    """Whatever border is drawn, summary and recent events together hold every event before the request."""
    feed = make_feed(train=True, max_stale_segments=1)
    size, stale = feed.config.model.segment_events, 0
    for step in islice(TimelineWalk(feed, seed=3), 20):
        requests, borders = step.batch.requests, step.batch.borders
        count = borders.progress.num_events[requests.summary]
        assert ((requests.num_known - count) >= 0).all()
        assert ((requests.num_known - count) <= (requests.recent >= 0).sum(1)).all(), "an event is in neither"
        stale += int((requests.num_known // size * size > count).sum())
    assert stale > 0


def test_nothing_at_or_after_a_request_is_read():
    """Change every event from a request on: its score stays as it was, to the bit."""
    feed = make_feed()
    model = make_model(feed)
    user, request = 0, int(np.searchsorted(feed.impressions.user, 0, side="right")) // 2
    known = int(feed.impressions.num_known[request])
    log = feed.histories
    item = log.item.copy()
    item[int(log.offsets[user]) + known : int(log.offsets[user + 1])] = 5
    changed = replace(feed, histories=replace(log, item=item))
    rows = range(int(feed.impressions.offsets[0]), int(feed.impressions.offsets[request + 1]))
    with torch.no_grad():
        before, after = run(model, feed), run(model, changed)
    assert all(torch.equal(before[row], after[row]) for row in rows)
    assert any(not torch.equal(before[row], after[row]) for row in before)


def test_an_epoch_embeds_each_event_a_bounded_number_of_times():
    """Cost per event does not grow with the history: the stretch itself, and R events before each stretch."""
    feed = make_feed(requests_per_step=1000, window_segments=4)
    embedded = segments = steps = 0
    for step in TimelineWalk(feed):
        embedded += len(step.batch.events.item)
        segments += len(step.batch.segment)
        steps += len(step.users)
    assert segments == sum(n // 8 for n in _last_known(feed))
    assert embedded <= sum(LENGTHS) + steps * feed.config.model.recent_events


def _last_known(feed: Feed) -> list[int]:
    return [int(feed.impressions.num_known[feed.impressions.user == u].max()) for u in range(len(LENGTHS))]


def test_a_walk_resumes_exactly():
    feed = make_feed(train=True, requests_per_step=5)
    steps = list(islice(TimelineWalk(feed, seed=1), 60))
    resumed = TimelineWalk(feed, seed=1)
    resumed.resume(json.loads(json.dumps(steps[30].position)))
    rest = list(islice(resumed, 29))
    assert steps[30].position["epoch"] > 0
    assert [s.users for s in rest] == [s.users for s in steps[31:]]
    for a, b in zip(rest, steps[31:], strict=True):
        assert torch.equal(a.batch.requests.summary, b.batch.requests.summary)
        assert torch.equal(a.batch.impression, b.batch.impression)


def test_users_without_room_wait_with_their_memory():
    feed = make_feed(requests_per_step=3, window_segments=1)
    model = make_model(feed)
    carry = MemoryCarry()
    walk = TimelineWalk(feed)
    for step in walk:
        output = model(step.batch, carry.gather(step, model.init_memory(len(step.users))))
        carry.keep(step, output.memory)
        assert sorted(carry.by_user) == sorted(lane[0] for lane in step.position["lanes"])


@pytest.mark.parametrize(("open_users", "users_per_step"), [(1, 1), (3, 3), (64, 2)])
def test_training_steps_hold_several_users(open_users, users_per_step):
    feed = make_feed(train=True, requests_per_step=6, open_users=open_users, users_per_step=users_per_step)
    under_way: set[int] = set()
    for step in islice(TimelineWalk(feed, seed=3), 100):
        assert step.is_carried == [user in under_way for user in step.users]
        under_way = {lane[0] for lane in step.position["lanes"] if not lane[-1]}
        assert users_per_step <= len(step.users) == len(set(step.users))


def test_training_meets_each_request_once_an_epoch():
    """An epoch's last users mix with the next one's first, and nobody comes twice as often; only whose requests are
    more than the share one user may have of a step (here the longest: half of all) comes less often."""
    feed = make_feed(train=True, requests_per_step=6, open_users=3, users_per_step=2)
    met = np.zeros(len(feed.impressions.item), int)
    for step in TimelineWalk(feed, seed=3):
        met[step.batch.impression[step.batch.is_valid].numpy()] += 1
        if step.position["epoch"] == 20:
            break
    request = np.repeat(np.arange(len(feed.impressions.user)), np.diff(feed.impressions.offsets))
    of_user = feed.impressions.user[request]
    assert met[of_user != 0].min() >= 19
    assert met.min() >= 10
    assert met.max() <= 21


def test_long_timelines_do_not_come_alone():
    """The longest one is on its way together with the others, of this epoch or of the next."""
    feed = make_feed(train=True, requests_per_step=4, users_per_step=2)
    longest = int(np.bincount(feed.impressions.user).argmax())
    beside = [set(step.users) - {longest} for step in islice(TimelineWalk(feed), 100) if longest in step.users]
    assert len(beside) > 10
    assert all(beside)
    assert set.union(*beside) == set(range(len(LENGTHS))) - {longest}


def test_carry_round_trips_through_a_checkpoint():
    feed = make_feed(requests_per_step=20)
    model, carry = make_model(feed), MemoryCarry()
    step = next(iter(TimelineWalk(feed)))
    carry.keep(step, model(step.batch, model.init_memory(len(step.users))).memory)
    again = MemoryCarry()
    again.load(carry.state(), set(carry.by_user), torch.device("cpu"))
    assert again.by_user.keys() == carry.by_user.keys()
    for user, tensors in carry.by_user.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, again.by_user[user], strict=True))


def test_flatten_and_unflatten_are_inverse():
    memory = make_model(make_feed()).init_memory(2)
    again = unflatten(flatten(memory), memory)
    assert all(a is b for a, b in zip(flatten(memory), flatten(again), strict=True))


def test_ragged_arange():
    assert ragged_arange(np.array([5, 0, 10]), np.array([2, 0, 3])).tolist() == [5, 6, 10, 11, 12]
    assert ragged_arange(np.array([], np.int64), np.array([], np.int64)).tolist() == []


def test_reconstruction_windows_lie_before_their_border():
    feed = make_feed(train=True, seed=4)
    seen = 0
    for step in islice(TimelineWalk(feed, seed=4), 20):
        windows = step.batch.windows
        if windows is None:
            continue
        lane = step.batch.borders.lane[windows.summary]
        border_us = step.batch.borders.progress.last_us[windows.summary]
        last = windows.events.timestamp_us[windows.events.offsets[1:] - 1]
        assert (last <= border_us).all()
        for w, b in enumerate(lane.tolist()):
            user = step.users[b]
            mine = feed.histories.timestamp_us[feed.histories.offsets[user] : feed.histories.offsets[user + 1]]
            assert set(windows.events.timestamp_us[windows.index[w]].tolist()) <= set(mine.tolist())
            seen += 1
    assert seen > 5


@given(size=st.integers(1, 6), stale=st.integers(0, 3), spare=st.integers(-3, 2), window=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_no_event_is_in_neither_the_summary_nor_the_recent_events(size, stale, spare, window):
    """What settings allow, training and evaluation keep to: recent events reach back to the border that is read."""
    num_recent = size * (1 + stale) + spare
    words = {"model.segment_events": size, "model.recent_events": num_recent, "train.max_stale_segments": stale}
    if spare < 0:
        with pytest.raises(ConfigError, match="must be above 0" if num_recent < 1 else "in neither the summary nor"):
            resolve("tiny", overrides=words)
        return
    config = resolve("tiny", overrides=words | {"train.window_segments": window, "train.reconstruction_events": 1})
    for train in (True, False):
        for step in islice(TimelineWalk(Feed(*world(), config, train=train)), 20):
            requests = step.batch.requests
            in_summary = step.batch.borders.progress.num_events[requests.summary]
            assert (in_summary + (requests.recent >= 0).sum(1) >= requests.num_known).all()
            assert (in_summary <= requests.num_known).all()
