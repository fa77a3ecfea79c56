"""Kept borders: the state at some of the borders a history has passed, so that a replay starts near what it changes.

Which borders are kept depends on the number of closed segments g alone: for each power p of ``base``, the newest
``per_level`` multiples of p that are not above g. These are about per_level x log(g) borders, dense at the new end. A
border that leaves the set never comes back into it, so the set can be kept in passing, whatever the cuts of the stream.
With the default (2, 2) a replay of something that is a segments old reads at most 4 a segments.

A border holds the memory and three numbers, not the raw events before it: those a replay still needs are either held by
the newest state or read again.

Shape letters: M borders of one user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vista.errors import ConfigError


@dataclass(frozen=True)
class Spacing:
    """Which borders are kept. Raises ConfigError for a base or a number per level below 2."""

    base: int = 2
    per_level: int = 2

    def __post_init__(self) -> None:
        for name in ("base", "per_level"):
            if getattr(self, name) < 2:
                raise ConfigError(f"kept borders: {name} is {getattr(self, name)}; it must be 2 or more")

    def kept(self, num_segments: int) -> list[int]:
        """The borders kept beside the newest, as numbers of closed segments, oldest first.

        The newest, ``num_segments``, is the state itself, and 0 the start of every history: neither is among them.
        """
        kept: set[int] = set()
        power = 1
        while power <= num_segments:
            newest = num_segments // power
            kept.update(power * (newest - back) for back in range(self.per_level))
            power *= self.base
        return sorted(border for border in kept if 0 < border < num_segments)


@dataclass(frozen=True)
class Border:
    """One user's history as of one border.

    num_ties: how many of its events have the time ``last_us``, so that a log read from that time on can be cut here;
    memory: the tensors of ``vista.models.batch.flatten``, one user's row of each.
    """

    num_events: int
    first_us: int
    last_us: int
    num_ties: int
    memory: tuple[Tensor, ...]


@dataclass(frozen=True)
class KeptBorders:
    """The kept borders of one user, oldest first."""

    borders: tuple[Border, ...] = ()

    def before(self, timestamp_us: int, below_events: int | None = None, strictly: bool = False) -> Border | None:
        """The newest border that an event of this time comes after; None: only the start of the history will do.

        below_events: a border of fewer events than that. strictly: one that holds no event of this very time, which is
        what removing an event asks for.
        """
        for border in reversed(self.borders):
            is_older = border.last_us < timestamp_us or (border.last_us == timestamp_us and not strictly)
            if is_older and (below_events is None or border.num_events < below_events):
                return border
        return None

    def after_replay(self, base_events: int, passed: Sequence[Border], kept_events: set[int]) -> KeptBorders:
        """What remains of them when a history was folded again from ``base_events`` on and passed these borders."""
        merged = {b.num_events: b for b in self.borders if b.num_events <= base_events}
        merged |= {b.num_events: b for b in passed}
        return KeptBorders(tuple(merged[n] for n in sorted(merged) if n in kept_events))

    def is_same(self, other: KeptBorders) -> bool:
        """Whether these are the very same borders, not only equal ones."""
        return list(map(id, self.borders)) == list(map(id, other.borders))
