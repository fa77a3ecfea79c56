"""What a replay source is: where a replay reads events again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from vista.updates.order import Arrivals

NEVER_US = np.iinfo(np.int64).max


class ReplaySource(Protocol):
    """What a log of events must be able to do; user ids are as `apply_events` was given them."""

    def record(self, user_ids: Sequence[Any], events: Arrivals) -> None:
        """Keep events; ``events.user`` are places in user_ids. Nothing to do where the log is written elsewhere, as
        long as it is written before these events reach `apply_events` and holds no others than those it accepts."""

    def events(self, user_id: Any, since_us: int) -> Arrivals:
        """What arrived for a user with a time at or after ``since_us``, in order of arrival; ``user`` is all 0."""

    def earliest_us(self, user_ids: Sequence[Any], event_id: np.ndarray) -> np.ndarray:
        """The earliest time with which an event of each id arrived, (n,) int64; NEVER_US for none. user_ids: n."""
