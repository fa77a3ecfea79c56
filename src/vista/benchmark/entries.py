"""Which models a benchmark compares, and what they are called.

Exact counts are of the whole history, so whatever has ``+counts`` behind its name reads all of it. What stands
behind an ``@``, as in ``vista@num_seeds=16@width=64``, is a setting of this entry alone: so a grid can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    """One model of a benchmark: its name on the command line and in folders, and the settings that make it.

    is_full: reads the whole history, or as much of it as its window holds; else it is a control that is cut short.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    is_full: bool = True

    @property
    def own_settings(self) -> list[str]:
        """What stands behind each ``@`` of its name: tables name the model by it, too, or two entries were one."""
        return self.name.split("@")[1:]

    def config(self, size: str, seed: int, training: dict[str, Any]) -> Config:
        """Resolved settings of one run."""
        return resolve(size, overrides={**training, **self.settings, "train.seed": seed})


def _cut(entry: Entry, last: int) -> Entry:
    """The same model over the newest ``last`` events. Counts of so many are a control, as recent events are."""
    window = _window(entry)
    assert window is not None
    return Entry(f"{entry.name}-{last}", {**entry.settings, window: last}, is_full=window == HISTORY)


def _window(entry: Entry) -> str | None:
    """The setting that says how many raw events an entry's model reads; None for one with a summary."""
    model = entry.settings.get("model.model")
    return None if model is None else WINDOWS.get(model, HISTORY)


def _all() -> tuple[Entry, ...]:
    recent, counts = (
        Entry("recent", {"model.model": "recent"}, is_full=False),
        Entry("counts", {"model.model": "counts"}),
    )
    return (
        recent,
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
    ``counts`` may have ``+counts`` behind it. Raises ConfigError for an unknown one."""
    return [_find(name) for name in names]


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
    return Entry(name, settings | dict(_setting(name, pair) for pair in pairs), entry.is_full)


def _setting(name: str, pair: str) -> tuple[str, str]:
    """``width=64`` to its dotted key and value."""
    setting, equals, value = pair.partition("=")
    if not equals:
        raise ConfigError(f"--models: {name!r}: {pair!r} is no setting; write it as vista@width=64")
    return setting_key(setting), value
