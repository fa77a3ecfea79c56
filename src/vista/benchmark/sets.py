"""What a benchmark measures on: event logs and synthetic worlds, each prepared once with the benchmark's protocol.

Requests made from events have negatives of three sources (`vista.data.negatives`): popular items, items of the
positive's category, and own items last met about as long ago as the positive. So neither "met before" nor "long ago"
gives a positive away, and each source can be looked at alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vista.data.histories import PreparedData
from vista.data.prepare import PrepareOptions, prepare
from vista.data.public import MacportsOptions, convert_macports
from vista.data.worlds import WorldOptions, write_world
from vista.data.worlds.write import WORLDS
from vista.errors import ConfigError, nearest

NEGATIVES: dict[str, Any] = {"popularity_negatives": 3, "category_negatives": 3, "history_negatives": 3}
WORLD_REQUESTS = 128  # of each user: more moments of one history cost next to nothing, and fewer are learned by heart
MAX_REQUESTS = 200_000  # of one log: enough for a standard error of a thousandth, and hours instead of days


@dataclass(frozen=True)
class BenchmarkSet:
    """A named log. write: makes it as a folder, where it is not there yet; options: how to prepare it from there."""

    name: str
    about: str
    options: Callable[[Path], PrepareOptions]
    write: Callable[[Path], object] | None = None

    def open(self, folder: Path) -> PreparedData:
        """The prepared data below ``folder``; made there on the first call, and used again by later ones."""
        log, place = folder / "log", folder / "data"
        if not place.exists():
            if self.write is not None and not log.exists():
                self.write(log)
            prepare(self.options(log), place)
        return PreparedData.open(place)


def worlds(names: list[str], seed: int, settings: dict[str, Any] | None = None) -> list[BenchmarkSet]:
    """Synthetic worlds by name. Raises ConfigError for one there is not."""
    for name in names:
        if name not in WORLDS:
            raise ConfigError(f"--worlds: there is no world {name!r}{nearest(name, WORLDS)}")
    return [_world(name, seed, settings or {}) for name in names]


def _world(name: str, seed: int, settings: dict[str, Any]) -> BenchmarkSet:
    world = WorldOptions(**({"requests": WORLD_REQUESTS, "seed": seed} | settings))

    def options(folder: Path) -> PrepareOptions:
        events, items, impressions = (str(folder / f"{part}.parquet") for part in ("events", "items", "impressions"))
        return PrepareOptions(events, items, impressions)

    about = f"Synthetic world, seed {seed}: P(click) = {WORLDS[name].formula}."
    return BenchmarkSet(name, about, options, lambda folder: write_world(name, folder, world))


def macports(source: Path) -> BenchmarkSet:
    """Who changed which package of MacPorts, from a clone of its git history or a converted copy."""

    def options(folder: Path) -> PrepareOptions:
        events, items = (str(folder / f"{part}.parquet") for part in ("events", "items"))
        return PrepareOptions(events, items, burst_column="burst", max_requests=MAX_REQUESTS, **NEGATIVES)

    about = "MacPorts: which package a maintainer changes next. Work, not consumption; few users are very long."
    return BenchmarkSet("macports", about, options, lambda folder: convert_macports(folder, source, MacportsOptions()))


def own_log(options: PrepareOptions) -> BenchmarkSet:
    """An event log of the user's, prepared by the same protocol."""
    if options.impressions is None:
        options = replace(options, max_requests=min(options.max_requests, MAX_REQUESTS), **NEGATIVES)
    name = Path(options.events).stem.strip("*?") or "log"
    return BenchmarkSet(name, f"The event log {options.events}.", lambda folder: options)
