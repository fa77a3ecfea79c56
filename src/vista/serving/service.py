"""What the server does, whatever protocol asks: ranking in batches, recommending, taking events, telling of users."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from vista.errors import RecordError, RequestError, StoreError
from vista.serving.deployment import Deployment, Model
from vista.serving.events import EventWriter, Posted
from vista.serving.explain import Explanation, explain
from vista.serving.history import HistorySource, Timeline, Traced, timeline, trace
from vista.serving.lanes import RETRY_S, Job, Lane, too_late
from vista.serving.metrics import Metrics
from vista.serving.options import ServeOptions
from vista.serving.recommend import Recommended, Recommender
from vista.serving.requests import PostedEvent, RankAsk, RecommendAsk, shown
from vista.serving.scorer import ROW_COST, Asked, Ranking, UserSummaries
from vista.store.contract import SummaryStore
from vista.store.record import Stored, unpack
from vista.store.versions import VersionInfo

Found = TypeVar("Found")
LOOK_TIMEOUT_S = 20.0  # for an answer to a person, who can wait for a whole history to be read
MAX_LOOKS = 16  # requests of people that wait: more of them than look at a page, and few beside those who rank
RANK_WEIGHT = 100  # of a batch of rankings beside its candidates, in candidates: as measured with `bench/serve.py`
COMMIT_WEIGHT = 10  # of a commit beside its events, in events


@dataclass(frozen=True, eq=False)
class Query:
    """A ranking to be made: by which model, of which user, and what of."""

    model: Model
    user: Any
    asked: Asked


@dataclass(frozen=True)
class Ranked:
    """A ranking, whose it is, and how it came about. stages: seconds by name."""

    model: Model
    ranking: Ranking
    is_degraded: bool
    stages: dict[str, float]


class Service:
    """All that is behind the protocols. Methods are called from the event loop, work happens in threads."""

    def __init__(
        self, options: ServeOptions, store: SummaryStore, metrics: Metrics, histories: HistorySource | None = None
    ) -> None:
        """histories: where whole histories are, for those who look at one; rankings need none."""
        self.options, self.limits, self.metrics = options, options.limits, metrics
        self._histories, self.began_s = histories, time.monotonic()
        self.deployment = Deployment(options, store, metrics)
        self.is_draining = False
        limits, most = self.limits, self.limits.max_waiting
        self._rank = Lane("rank", self._rank_batch, most, limits.max_batch_candidates, metrics, RANK_WEIGHT)
        write = EventWriter(self.deployment, metrics).write
        self._events = Lane("events", write, most, limits.max_events, metrics, COMMIT_WEIGHT)
        self._recommend = Lane("recommend", _run_each, most, 1, metrics)
        self._users = Lane("users", _run_each, most, 1, metrics)
        self._looks = Lane("looks", _run_each, min(most, MAX_LOOKS), 1, metrics)
        self._recommender: Recommender | None = None
        metrics.ready.set_function(lambda: float(not self.why_not_ready()))

    def close(self) -> None:
        """Answer what waits, for ``drain_s`` in all, then end the threads."""
        self.deployment.close()
        end_s = time.monotonic() + self.limits.drain_s
        for lane in (self._rank, self._events, self._recommend, self._users, self._looks):
            lane.close(max(end_s - time.monotonic(), 0))

    @property
    def model(self) -> Model:
        return self.deployment.model

    def why_not_ready(self) -> str:
        """Empty where requests can be answered."""
        if self.is_draining:
            return "the server is ending"
        if not self.deployment.is_store_up and not self.options.degrade:
            return "the store is away"
        return ""

    def deadline_s(self, timeout_s: float | None, most_s: float | None = None) -> float:
        """When a request that came now is to be answered. most_s: another limit than that of rankings."""
        most_s = self.limits.timeout_s if most_s is None else most_s
        return time.monotonic() + (most_s if timeout_s is None else min(timeout_s, most_s))

    # -- ranking

    async def rank(self, ask: RankAsk, deadline_s: float) -> Ranked:
        """Raises RequestError."""
        model = self.model
        context = model.context.read(ask.context, len(ask.candidates))
        asked = Asked(model.run.catalogue.encode(ask.candidates), ask.at_us, context)
        (ranked,) = await self.rank_many([Query(model, ask.user, asked)], deadline_s)
        return ranked

    def check_room(self, deadline_s: float) -> None:
        """Raise RequestError where rankings cannot be had in time anyway: before a body is read and looked through."""
        self._rank.check_room(deadline_s)

    async def rank_many(self, queries: Sequence[Query], deadline_s: float) -> list[Ranked]:
        """Raises RequestError: queue full, too late, or the store away."""
        futures: list[Future[Ranked]] = []
        try:
            for query in queries:
                futures.append(self._rank.submit(query, deadline_s, len(query.asked.index) + ROW_COST))  # noqa: PERF401
            return [await answer_of(future, deadline_s) for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def _rank_batch(self, jobs: list[Job[Query]]) -> None:
        self.metrics.batch_users.observe(len(jobs))
        for model in dict.fromkeys(job.ask.model for job in jobs):
            self._rank_with(model, [job for job in jobs if job.ask.model is model])

    def _rank_with(self, model: Model, jobs: list[Job[Query]]) -> None:
        began_s = time.monotonic()
        try:
            summaries, is_degraded = self._read(model, [job.ask.user for job in jobs])
        except RecordError as error:  # a damaged record is the matter of one user
            if len(jobs) == 1:
                jobs[0].answer.set_exception(error)
            else:
                for job in jobs:
                    self._rank_with(model, [job])
            return
        read_s = time.monotonic()
        asked = [job.ask.asked for job in jobs]
        rankings = model.scorer.rankings(summaries, asked, model.scorer.score(summaries, asked))
        scored_s = time.monotonic()
        for job, ranking in zip(jobs, rankings, strict=True):
            self._observe(ranking)
            stages = {"queue": began_s - job.queued_s, "read": read_s - began_s, "score": scored_s - read_s}
            job.answer.set_result(Ranked(model, ranking, is_degraded, stages))

    def _read(self, model: Model, users: list[Any]) -> tuple[UserSummaries, bool]:
        """The summaries of users, and whether these are those of an empty history because the store is away."""
        try:
            return model.scorer.read(users), False
        except RecordError:
            raise
        except StoreError as error:
            self.metrics.store_errors.inc()
            if not self.options.degrade:
                raise store_away(error) from error
            self.metrics.degraded.inc(len(users))
            return model.scorer.cold(len(users)), True

    def _observe(self, ranking: Ranking) -> None:
        if not ranking.is_known_user:
            self.metrics.misses.inc()
        elif ranking.as_of_us >= 0:
            self.metrics.freshness.observe(max(time.time_ns() // 1000 - ranking.as_of_us, 0) / 1e6)

    # -- everything else

    async def post(self, events: list[PostedEvent], deadline_s: float) -> Posted:
        """Returns when the events are durable. Raises RequestError."""
        posted: Posted = await answer_of(self._events.submit(events, deadline_s, len(events)), deadline_s)
        return posted

    async def recommend(self, ask: RecommendAsk, deadline_s: float) -> Recommended:
        """Raises RequestError."""
        recommender = self._recommender
        if recommender is None or recommender.model is not self.model:
            self._recommender = recommender = Recommender(self.model, self.limits)

        def work() -> Recommended:
            summaries, is_degraded = self._read(recommender.model, [ask.user])
            return recommender.recommend(summaries, ask, is_degraded, deadline_s)

        found: Recommended = await answer_of(self._recommend.submit(work, deadline_s), deadline_s)
        return found

    async def user(self, user: Any, deadline_s: float) -> tuple[Model, Stored]:
        """What the store holds of a user. Raises RequestError: 404 where there is nothing."""
        model = self.model
        return model, await answer_of(
            self._users.submit(lambda: self._stored(user, model.scorer.stored), deadline_s), deadline_s
        )

    def _stored(self, user: Any, read: Callable[[Any], Found | None]) -> Found:
        """What ``read`` finds of a user in the store. Raises RequestError."""
        found = self._asked(lambda: read(user))
        if found is None:
            raise RequestError(f"user {shown(user)} is not in the store: a ranking would be a cold start", 404)
        return found

    def _asked(self, read: Callable[[], Found]) -> Found:
        """What the store answers. Raises RequestError where it is away."""
        try:
            return read()
        except RecordError:
            raise
        except StoreError as error:
            self.metrics.store_errors.inc()
            raise store_away(error) from error

    # -- for those who look

    async def explain(self, ask: RankAsk, deadline_s: float) -> Explanation:
        """Raises RequestError."""
        model = self.model
        asked = Asked(
            model.run.catalogue.encode(ask.candidates), ask.at_us, model.context.read(ask.context, len(ask.candidates))
        )

        def work() -> Explanation:
            summaries, is_degraded = self._read(model, [ask.user])
            return explain(model, summaries, asked, is_degraded)

        return await self._look(work, deadline_s)

    async def history(self, user: Any, deadline_s: float) -> tuple[Model, Timeline]:
        """What is known of a user's history. Raises RequestError."""
        model = self.model
        return model, await self._look(
            lambda: timeline(model, self._stored(user, model.scorer.stored), self._histories, user), deadline_s
        )

    async def traced(self, user: Any, deadline_s: float) -> Traced:
        """Which events wrote a user's tokens. Raises RequestError."""
        model = self.model

        def work() -> Traced:
            record = self._stored(user, model.scorer.state)
            return trace(model, record, timeline(model, record, self._histories, user), deadline_s)

        return await self._look(work, deadline_s)

    async def some_users(self, limit: int, deadline_s: float) -> tuple[Model, list[Stored]]:
        """The first users of the store, in order of their keys. Raises RequestError."""
        model = self.model

        def work() -> list[Stored]:
            records = islice(model.scorer.store.scan("tokens", model.version), limit)
            return [unpack(blob, model.version) for _, blob in records]

        return model, await self._look(lambda: self._asked(work), deadline_s)

    async def versions(self, deadline_s: float) -> tuple[list[VersionInfo], str | None]:
        """The versions of the store, and the published one. Raises RequestError."""
        store = self.deployment.store
        return await self._look(lambda: self._asked(lambda: (store.versions(), store.published())), deadline_s)

    async def _look(self, work: Callable[[], Found], deadline_s: float) -> Found:
        found: Found = await answer_of(self._looks.submit(work, deadline_s), deadline_s)
        return found


def _run_each(jobs: list[Job[Callable[[], Any]]]) -> None:
    """The work of a lane whose jobs are functions."""
    for job in jobs:
        try:
            job.answer.set_result(job.ask())
        except Exception as error:  # the caller's to handle, as if it had called
            job.answer.set_exception(error)


def store_away(error: StoreError) -> RequestError:
    return RequestError(f"the store does not answer: {error}", 503, RETRY_S)


async def answer_of(future: Future[Any], deadline_s: float) -> Any:
    """The answer, if it comes in time; else the job is dropped, if it has not begun. Raises RequestError."""
    waiting: Awaitable[Any] = asyncio.wrap_future(future)
    try:
        return await asyncio.wait_for(waiting, max(deadline_s - time.monotonic(), 0))
    except TimeoutError:
        raise too_late() from None
