"""What a benchmark measures on: event logs and synthetic worlds, each prepared once with the benchmark's protocol.

Requests made from events have negatives of three sources (`vista.data.negatives`): popular items, items of the
positive's category, and own items last met about as long ago as the positive. So neither "met before" nor "long ago"
gives a positive away, and each source can be looked at alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vista.benchmark.published import Published
from vista.checkpoint import write_text
from vista.data.histories import PreparedData
from vista.data.prepare import PrepareOptions, prepare
from vista.data.public import CONVERTERS
from vista.data.tables import find_files
from vista.data.worlds import WorldOptions, write_world
from vista.data.worlds.base import World
from vista.data.worlds.write import WORLDS, make_world
from vista.errors import ConfigError, StaleOutput, nearest
from vista.store.record import CODECS

NEGATIVES: dict[str, Any] = {"popularity_negatives": 3, "category_negatives": 3, "history_negatives": 3}
WORLD_REQUESTS = 128  # of each user: more moments of one history cost next to nothing, and fewer are learned by heart
MAX_REQUESTS = 200_000  # of one log: enough for a standard error of a thousandth, and hours instead of days
CODEC = "codec"  # the axis that is no setting of a world: what stored tokens are written with
FIXED = ("items", "categories", "by_category")  # a trained model knows these items, and what they are, alone
TEST_SHARE = 0.2  # newest requests of a test world that are scored: those with nearly the whole history before them
ALL = "1970-01-01"  # where the test split begins in a world that fixes how long ago each answer lies: all is scored


@dataclass(frozen=True)
class Axis:
    """Settings in which test worlds differ from the world that models were trained on; ``codec`` is one, too.

    settings: by name, one value for each point, or one for all. The first one is what is drawn.
    """

    settings: Mapping[str, tuple[Any, ...]]

    @classmethod
    def of(cls, settings: Mapping[str, Any], place: str) -> Axis:
        """Raises ConfigError, naming the place, for numbers of values that do not fit, and for an unknown codec."""
        values = {name: tuple(v) if isinstance(v, list | tuple) else (v,) for name, v in settings.items()}
        axis = cls(values)
        for name, found in values.items():
            if not found or len(found) not in (1, axis.num_points):
                raise ConfigError(f"{place}: {name} has {len(found)} values, {axis.name} has {axis.num_points}")
            if name in FIXED:
                raise ConfigError(f"{place}: {name} cannot change, a model knows the items it was trained on alone")
        for codec in values.get(CODEC, ()):
            if codec not in CODECS:
                raise ConfigError(f"{place}: unknown codec {codec!r}{nearest(str(codec), CODECS)}")
        return axis

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Axis | None:
        """From ``events=2048,16384`` and its like; None for none. Raises ConfigError."""
        settings = {}
        for text in texts:
            name, equals, values = text.partition("=")
            if not equals:
                raise ConfigError(f"--axis {text!r}: write it as --axis events=2048,16384")
            settings[name.strip()] = [value.strip() for value in values.split(",") if value.strip()]
        return cls.of(settings, "--axis") if settings else None

    @property
    def name(self) -> str:
        return next(iter(self.settings))

    @property
    def num_points(self) -> int:
        return max(len(self.settings[self.name]), 1)

    def points(self) -> list[dict[str, Any]]:
        """The settings at each point."""
        return [
            {name: values[i if len(values) > 1 else 0] for name, values in self.settings.items()}
            for i in range(self.num_points)
        ]


@dataclass(frozen=True)
class BenchmarkSet:
    """A named log. write: makes it as a folder, where it is not there yet; options: how to prepare it from there.

    described: all that its content depends on, to tell it from another set of that name. world: name and settings of a
    synthetic one. axis: test worlds that its models are evaluated on besides. published: numbers of other people.
    """

    name: str
    about: str
    options: Callable[[Path], PrepareOptions]
    write: Callable[[Path], object] | None = None
    described: Mapping[str, Any] = field(default_factory=dict)
    world: tuple[str, Mapping[str, Any]] | None = None
    axis: Axis | None = None
    published: Published | None = None

    def open(self, folder: Path) -> PreparedData:
        """The prepared data below ``folder``; made there on the first call, and used again by later ones.

        Raises StaleOutput where there is data of a set of this name that was made in another way.
        """
        log, place, note = folder / "log", folder / "data", folder / "set.json"
        described = json.dumps(self.described, indent=1, sort_keys=True, default=str) + "\n"
        if (log.exists() or place.exists()) and note.exists() and note.read_text() != described:
            raise StaleOutput(
                f"{folder} holds data of a set {self.name!r} with other settings, or of other files (see {note}); "
                "choose another --out, or remove that folder"
            )
        if not place.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(note, described)
            if self.write is not None and not log.exists():
                self.write(log)
            prepare(self.options(log), place)
        return PreparedData.open(place)

    def at(self, point: Mapping[str, Any], folder: Path) -> BenchmarkSet:
        """A test world: this set's own, with other users and some other settings, in the items of the data in
        ``folder``. Raises ConfigError for a set that is no world, and for settings it does not have. """  # fmt: skip
        if self.world is None:
            raise ConfigError(f"--axis {', '.join(point)}: {self.name} is no synthetic world, its settings are fixed")
        name, own = self.world
        settings = {**own, **{key: str(value) for key, value in point.items()}}
        settings["seed"] = int(own.get("seed", 0)) + 1
        world = world_of(world_set(name, settings))
        is_timed = world is not None and world.is_timed
        scored = {"validation_from": ALL, "test_from": ALL} if is_timed else {"test_fraction": TEST_SHARE}
        changes = {"catalogue": str(folder), "validation_fraction": 0.0, **scored}
        label = ",".join(f"{key}={value}" for key, value in point.items())
        return replace(world_set(name, settings, changes), name=label)


def worlds(names: list[str], seed: int, settings: dict[str, Any] | None = None) -> list[BenchmarkSet]:
    """Synthetic worlds by name. Raises ConfigError for one there is not."""
    for name in names:
        if name not in WORLDS:
            raise ConfigError(f"--worlds: there is no world {name!r}{nearest(name, WORLDS)}")
    return [world_set(name, {"seed": seed, **(settings or {})}) for name in names]


def world_set(name: str, settings: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> BenchmarkSet:
    """A world with settings, and perhaps other options of ``vista prepare``. Raises ConfigError for a wrong setting."""
    options = WorldOptions(settings={"requests": WORLD_REQUESTS, **settings})
    make_world(name, options)

    def prepared(folder: Path) -> PrepareOptions:
        events, items, impressions = (str(folder / f"{part}.parquet") for part in ("events", "items", "impressions"))
        return PrepareOptions(events, items, impressions, **(changes or {}))

    about = f"Synthetic world, seed {options.settings.get('seed', 0)}: P(click) = {WORLDS[name].formula}."
    described = {"world": name, "settings": dict(options.settings), "prepare": dict(changes or {})}
    return BenchmarkSet(
        name, about, prepared, lambda folder: write_world(name, folder, options), described, (name, options.settings)
    )


def world_of(one: BenchmarkSet) -> World | None:
    """The synthetic world a set is made of."""
    return None if one.world is None else make_world(one.world[0], WorldOptions(settings=one.world[1]))


def converted(
    name: str, about: str, converter: str, source: Path | None, options: Any, **prepared: Any
) -> BenchmarkSet:
    """A public log from a local copy. options: of the converter; prepared: of ``vista prepare`` beside the tables.

    Where the converter writes impressions, they are what is measured on; else requests are made by the protocol.
    """

    def tables(folder: Path) -> PrepareOptions:
        paths = {part: folder / f"{part}.parquet" for part in ("events", "items", "impressions")}
        found = {part: str(path) for part, path in paths.items() if part != "impressions" or path.exists()}
        made = {} if "impressions" in found else {"max_requests": MAX_REQUESTS, **NEGATIVES}
        return PrepareOptions(**{**found, **made, **prepared})

    described = {"converter": converter, "options": asdict(options), "prepare": prepared}
    if source is not None:
        described["source"] = _sizes(source)
    convert = CONVERTERS[converter].convert
    return BenchmarkSet(name, about, tables, lambda folder: convert(folder, source, options), described)


def own_log(options: PrepareOptions) -> BenchmarkSet:
    """An event log of the user's, prepared by the same protocol."""
    if options.impressions is None:
        options = replace(options, max_requests=min(options.max_requests, MAX_REQUESTS), **NEGATIVES)
    name = Path(options.events).stem.strip("*?") or "log"
    paths = {"events": options.events, "items": options.items, "impressions": options.impressions}
    given: dict[str, Any] = {part: str(Path(path).absolute()) for part, path in paths.items() if path is not None}
    content = {part: _content(find_files(path, part)) for part, path in given.items()}
    described = {"prepare": asdict(replace(options, **given)), "content": content}
    return BenchmarkSet(name, f"The event log {options.events}.", lambda folder: options, described=described)


def _content(files: Iterable[Path]) -> str:
    """SHA-256 over the content of files: a log that has grown, or was corrected, is another one."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _sizes(source: Path) -> str:
    """SHA-256 over names and sizes of a folder's files: a public log may be large, and its copies differ in that."""
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    listed = [(path.relative_to(source).as_posix(), path.stat().st_size) for path in files if path.exists()]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
