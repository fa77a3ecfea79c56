"""Posted events into the store: those that arrive while a commit is under way make up the next one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np

from vista.errors import ConfigError, RecordError, RequestError, StoreError
from vista.serving.deployment import Deployment, Model
from vista.serving.lanes import RETRY_S, Job
from vista.serving.metrics import Metrics
from vista.serving.requests import PostedEvent
from vista.store.record import user_key
from vista.updates.apply import OUTCOMES, NewEvents, apply_events


@dataclass(frozen=True)
class Posted:
    """What became of each event of a post, a word of ``OUTCOMES``, and the model version whose states were changed."""

    outcomes: list[str]
    version: str


class EventWriter:
    """Applies posts to the states of the version in use."""

    def __init__(self, deployment: Deployment, metrics: Metrics) -> None:
        self._deployment, self._metrics = deployment, metrics

    def write(self, jobs: list[Job[list[PostedEvent]]]) -> None:
        """The work of a lane: one commit for all posts. Where a user's record is damaged, that post fails alone."""
        model = self._deployment.model
        outcomes: list[list[int]] = [[] for _ in jobs]
        failed: dict[int, RecordError] = {}
        rows = [(number, event) for number, job in enumerate(jobs) for event in job.ask]
        # repeats of events with an id and of those without are told by different rules: each change is another commit
        for has_id, group in groupby(rows, lambda row: row[1].event_id is not None):
            together = [row for row in group if row[0] not in failed]
            if not together:
                continue
            try:
                done = self._apply(model, [event for _, event in together], has_id)
            except RecordError:
                done = self._apply_by_job(model, together, has_id, failed)
            for (number, _), outcome in zip(together, done, strict=True):
                outcomes[number].append(outcome)
        for number, (job, mine) in enumerate(zip(jobs, outcomes, strict=True)):
            if number in failed:
                job.answer.set_exception(failed[number])
                continue
            for outcome in mine:
                self._metrics.events.labels(OUTCOMES[outcome]).inc()
            job.answer.set_result(Posted([OUTCOMES[outcome] for outcome in mine], model.version))

    def _apply_by_job(
        self, model: Model, rows: list[tuple[int, PostedEvent]], has_id: bool, failed: dict[int, RecordError]
    ) -> list[int]:
        """Outcomes of rows (job, event), each job's applied by themselves; jobs that fail are put into ``failed``."""
        outcomes: list[int] = []
        for number, group in groupby(rows, lambda row: row[0]):
            events = [event for _, event in group]
            try:
                outcomes += self._apply(model, events, has_id)
            except RecordError as error:
                failed[number] = error
                outcomes += [-1] * len(events)
        return outcomes

    def _apply(self, model: Model, events: list[PostedEvent], has_id: bool) -> list[int]:
        """Outcomes of events in order of arrival."""
        try:
            done = apply_events(model.run, self._deployment.store, new_events(events, has_id))
            return done.outcome.tolist()
        except RecordError:
            raise
        except ConfigError as error:
            raise RequestError(str(error), 501) from error
        except StoreError as error:
            self._metrics.store_errors.inc()
            raise RequestError(f"the store did not take the events: {error}; send them again", 503, RETRY_S) from error
        finally:
            if model.scorer.cache is not None:
                model.scorer.cache.forget({user_key(event.user) for event in events})


def new_events(events: list[PostedEvent], has_id: bool) -> NewEvents:
    return NewEvents(
        [event.user for event in events],
        [event.item for event in events],
        np.array([event.at_us for event in events], np.int64),
        [event.action for event in events],
        [event.event_id for event in events] if has_id else None,
    )
