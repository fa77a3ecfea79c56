"""What a pass over timelines reads, and a step of it before its batch is built.

A plan is small and says all that is random about a step. Whoever knows it can build the batch of any of its lanes:
that is how processes share a step.

Shape letters: B lanes, Q requests, P windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vista.config import Config
from vista.data.histories import Histories, Impressions
from vista.models.inputs import ragged_arange

CountFeatures = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (request rows, impression rows), (n,) each -> (n, F)


@dataclass(frozen=True)
class Feed:
    """What a pass over timelines reads and how.

    train: staleness and reconstruction windows are drawn, users are shuffled. Otherwise each request reads the newest
    border.
    """

    histories: Histories
    impressions: Impressions
    config: Config
    train: bool = False
    count_features: CountFeatures | None = None
    users: np.ndarray | None = None  # only these; default: all with requests

    def work(self, stretch: Stretch) -> int:
        """About what a stretch costs, in events read: those folded, and the raw ones of its requests."""
        model = self.config.model
        return stretch.num_segments * model.segment_events + stretch.num_requests * (1 + model.raw_events)

    def with_requests(self) -> np.ndarray:
        """User indices that have requests here."""
        users = np.unique(self.impressions.user)
        return users if self.users is None else np.intersect1d(users, self.users)


@dataclass(frozen=True)
class Stretch:
    """Segments first .. last - 1 of one user's history, and requests first_request .. end_request - 1."""

    user: int
    first_segment: int
    last_segment: int
    first_request: int
    end_request: int

    @property
    def num_requests(self) -> int:
        return self.end_request - self.first_request

    @property
    def num_segments(self) -> int:
        return self.last_segment - self.first_segment


@dataclass(frozen=True)
class Drawn:
    """What is drawn at random for stretches, before any of them is read.

    border        (Q,) int64: the segment border whose summary each request reads, stretch after stretch
    window_lane, window_border, window_start   (P,) int64 each: reconstruction windows: the stretch, the segment
                  border whose summary must tell it, and its first event within the history
    """

    border: np.ndarray
    window_lane: np.ndarray
    window_border: np.ndarray
    window_start: np.ndarray


@dataclass(frozen=True)
class Plan:
    """A step before its batch is built: each lane's stretch, whether it continues from carried memory and goes on.

    process: of each lane; position: of the walk after this step, to resume from.
    """

    stretches: Sequence[Stretch]
    is_carried: Sequence[bool]
    goes_on: Sequence[bool]
    process: Sequence[int]
    drawn: Drawn
    position: dict[str, Any] = field(default_factory=dict)

    @property
    def num_windows(self) -> int:
        return len(self.drawn.window_lane)

    def lanes(self, chosen: Sequence[int]) -> Plan:
        """The same with these lanes alone, and what was drawn for them."""
        drawn, size = self.drawn, np.array([s.num_requests for s in self.stretches], np.int64)
        rows = ragged_arange((np.cumsum(size) - size)[list(chosen)], size[list(chosen)])
        place = np.full(len(self.stretches), -1)
        place[list(chosen)] = np.arange(len(chosen))
        of_window = place[drawn.window_lane]
        mine = of_window >= 0
        by_lane: dict[str, Any] = {name: [getattr(self, name)[i] for i in chosen] for name in _BY_LANE}
        return replace(
            self,
            **by_lane,
            drawn=Drawn(drawn.border[rows], of_window[mine], drawn.window_border[mine], drawn.window_start[mine]),
        )


_BY_LANE = ("stretches", "is_carried", "goes_on", "process")
