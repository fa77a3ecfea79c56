"""Which models a benchmark compares, and what they are called.

Exact counts are of the whole history, so whatever has ``+counts`` behind its name reads all of it. What stands
behind an ``@``, as in ``vista@num_seeds=16@width=64``, is a setting of this entry alone: so a grid can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vista.config import WITH_COUNTS, Config, resolve, setting_key
from vista.errors import ConfigError, nearest

NO_SKETCH = {"model.sketch_slots": 0}  # nor popularity, which comes with it
COUNTED_EVENTS = (64, 512, 4096)  # what counts cut to the last so many events show: where length stops paying
HISTORY = "model.history_events"  # the setting that says how many raw events a model reads, but for these:
WINDOWS = {"counts": "model.count_last_events", "recent": "model.recent_events"}


@dataclass(frozen=True)
class Entry:
    """One model of a benchmark: its name on the command line, in folders and tables, and the settings that make it."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self, size: str, seed: int, training: Mapping[str, Any]) -> Config:
        """Resolved settings of one run."""
        return resolve(size, overrides={**training, **self.settings, "train.seed": seed})

    def reads_all(self, training: Mapping[str, Any]) -> bool:
        """Whether it reads the whole history, as a summary or as exact counts, and not so many newest events alone."""
        model = self.config("tiny", 0, training).model
        return (model.kind == "vista" and model.num_seeds > 0) or (model.with_counts and not model.count_last_events)


def _cut(entry: Entry, last: int) -> Entry:
    """The same model over the newest ``last`` events."""
    window = _window(entry)
    assert window is not None
    return Entry(f"{entry.name}-{last}", {**entry.settings, window: last})


def _window(entry: Entry) -> str | None:
    """The setting that says how many raw events an entry's model reads; None for one with a summary."""
    model = entry.settings.get("model.model")
    return None if model is None else WINDOWS.get(model, HISTORY)


def _all() -> tuple[Entry, ...]:
    counts = Entry("counts", {"model.model": "counts"})
    return (
        Entry("recent", {"model.model": "recent"}),
        *(_cut(counts, last) for last in COUNTED_EVENTS),
        counts,
        Entry("vista"),
        Entry("vista-tokens", NO_SKETCH),
        Entry("vista-sum", {"model.memory": "sum", **NO_SKETCH}),
        *(Entry(name, {"model.model": name}) for name in ("mean", "din", "sim", "twin", "sasrec", "hstu")),
        Entry("sim-soft", {"model.model": "sim", "model.search": "soft"}),
    )


ENTRIES = {entry.name: entry for entry in _all()}
DEFAULT_ENTRIES = tuple(ENTRIES)


def choose(names: Iterable[str]) -> list[Entry]:
    """Entries by name; one that reads raw events may be cut to the newest N of them, ``din-256``, and any but
    ``counts`` may have ``+counts`` behind it. Each once. Raises ConfigError for an unknown one."""
    return [_find(name) for name in dict.fromkeys(names)]


def _find(name: str) -> Entry:
    base, *pairs = name.split("@")
    plain = base.removesuffix(WITH_COUNTS)
    entry = ENTRIES.get(plain)
    name_of_whole, _, last = plain.rpartition("-")
    whole = ENTRIES.get(name_of_whole)
    if entry is None and last.isdecimal() and whole is not None and _window(whole) not in (None, *whole.settings):
        entry = _cut(whole, int(last))
    if entry is None:
        raise ConfigError(f"--models: there is no entry {base!r}{nearest(base, ENTRIES)}")
    settings = dict(entry.settings)
    if plain != base:
        model = settings.get("model.model", "vista")
        if model == "counts":
            raise ConfigError(f"--models: {base!r} has counts twice; write {plain!r}")
        settings["model.model"] = model + WITH_COUNTS
    return Entry(name, settings | dict(_setting(name, pair) for pair in pairs))


def _setting(name: str, pair: str) -> tuple[str, str]:
    """``width=64`` to its dotted key and value."""
    setting, equals, value = pair.partition("=")
    if not equals:
        raise ConfigError(f"--models: {name!r}: {pair!r} is no setting; write it as vista@width=64")
    return setting_key(setting), value
