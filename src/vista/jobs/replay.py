"""Where a replay reads events again: everything that ever arrived for a user, in order of arrival, repeats and all.

A replay source is the truth, and a stored state what follows from it. `apply_events` hands accepted events to the
source before it commits a state, so that a crash between the two is made good when the events are delivered again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from vista.data.histories import PreparedData
from vista.updates.order import UNKNOWN_ID, Arrivals
from vista.updates.source import NEVER_US


class MemoryLog:
    """A replay source in memory, on top of prepared data where there is some: for tests, examples and small services.

    Prepared data does not keep event ids; its events are compared by item, time and action.
    """

    def __init__(self, data: PreparedData | None = None) -> None:
        self.data = data
        self._parts: dict[str, list[Arrivals]] = defaultdict(list)
        self._earliest: dict[tuple[str, int], int] = {}

    def record(self, user_ids: Sequence[Any], events: Arrivals) -> None:
        order = np.argsort(events.user, kind="stable")
        bounds = np.searchsorted(events.user[order], np.arange(len(user_ids) + 1))
        for row, user_id in enumerate(user_ids):
            mine = events.take(order[bounds[row] : bounds[row + 1]])
            if len(mine):
                self._parts[str(user_id)].append(mine)
            for event_id, time_us in zip(mine.event_id.tolist(), mine.timestamp_us.tolist(), strict=True):
                if event_id > 0:
                    key = (str(user_id), event_id)
                    self._earliest[key] = min(time_us, self._earliest.get(key, NEVER_US))

    def events(self, user_id: Any, since_us: int) -> Arrivals:
        key = str(user_id)
        if len(self._parts[key]) > 1:
            self._parts[key] = [Arrivals.join(self._parts[key])]
        later = [part.take(part.timestamp_us >= since_us) for part in self._parts[key]]
        found = Arrivals.join([*self._prepared(user_id, since_us), *later])
        return Arrivals(np.zeros(len(found), np.int64), found.item, found.action, found.timestamp_us, found.event_id)

    def earliest_us(self, user_ids: Sequence[Any], event_id: np.ndarray) -> np.ndarray:
        keys = zip(map(str, user_ids), event_id.tolist(), strict=True)
        return np.array([self._earliest.get(key, NEVER_US) for key in keys], np.int64)

    def _prepared(self, user_id: Any, since_us: int) -> list[Arrivals]:
        user = None if self.data is None else self.data.user_index(user_id)
        if self.data is None or user is None:
            return []
        log = self.data.histories
        start, end = (int(o) for o in log.offsets[user : user + 2])
        start += int(np.searchsorted(log.timestamp_us[start:end], since_us))
        item, action, times = (np.asarray(c[start:end], np.int64) for c in (log.item, log.action, log.timestamp_us))
        return [Arrivals(np.zeros(end - start, np.int64), item, action, times, np.full(end - start, UNKNOWN_ID))]
