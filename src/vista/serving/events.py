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
        """The work of a lane: one commit for all posts, or, where a user's record is damaged, one each."""
        model = self._deployment.model
        try:
            outcomes = self._apply(model, [event for job in jobs for event in job.ask])
        except RecordError as error:
            if len(jobs) == 1:
                jobs[0].answer.set_exception(error)
            else:
                for job in jobs:
                    self.write([job])
            return
        for code, number in enumerate(np.bincount(outcomes, minlength=len(OUTCOMES)).tolist()):
            self._metrics.events.labels(OUTCOMES[code]).inc(number)
        words = iter([OUTCOMES[code] for code in outcomes])
        for job in jobs:
            job.answer.set_result(Posted([next(words) for _ in job.ask], model.version))

    def _apply(self, model: Model, events: list[PostedEvent]) -> list[int]:
        """Outcomes of events in order of arrival.

        Repeats of events with an id and of those without are told by different rules, so a change from one to the
        other begins another commit.
        """
        outcomes: list[int] = []
        try:
            for has_id, group in groupby(events, lambda event: event.event_id is not None):
                done = apply_events(model.run, self._deployment.store, new_events(list(group), has_id))
                outcomes += done.outcome.tolist()
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
        return outcomes


def new_events(events: list[PostedEvent], has_id: bool) -> NewEvents:
    return NewEvents(
        [event.user for event in events],
        [event.item for event in events],
        np.array([event.at_us for event in events], np.int64),
        [event.action for event in events],
        [event.event_id for event in events] if has_id else None,
    )
