"""One file that says a benchmark: a set, how it is prepared, what is run on it, and what others published.

    [set]        name, about; converter = "kuairand" (of `vista data`) or world = "membership"
    [options]    of the converter or the world
    [prepare]    options of `vista prepare`, beside those of the protocol
    [run]        models, seeds, size, max_steps
    [settings]   of all runs, as "model.num_seeds" = 128
    [axis]       settings of test worlds, each with its values; the first is drawn
    [published]  source, protocol, difference, and rows: model, ours, and metrics

The repository holds one for each published set in ``configs/benchmark``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vista.benchmark.published import Published
from vista.benchmark.sets import Axis, BenchmarkSet, converted, world_set
from vista.config import SIZES
from vista.data.prepare import PrepareOptions
from vista.data.public import CONVERTERS
from vista.data.worlds.write import WORLDS
from vista.errors import ConfigError, nearest

TABLES = ("set", "options", "prepare", "run", "settings", "axis", "published")
SET_KEYS = ("name", "about", "converter", "world")
PATHS = ("events", "items", "impressions")  # of `vista prepare`: the converter makes them


@dataclass(frozen=True)
class RunChoice:
    """What is run: entries and seeds, the size, the most steps, and settings of all runs. None: not chosen."""

    models: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    size: str | None = None
    max_steps: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def under(self, other: RunChoice) -> RunChoice:
        """This choice where the other one leaves something open."""
        chosen = {f.name: getattr(other, f.name) for f in fields(self) if f.name != "settings"}
        given = {name: value for name, value in chosen.items() if value is not None}
        return replace(self, **given, settings={**self.settings, **other.settings})


@dataclass(frozen=True)
class BenchmarkConfig:
    """A set, and what is run on it."""

    one: BenchmarkSet
    run: RunChoice


def read_config(path: Path, source: Path | None) -> BenchmarkConfig:
    """Read a file. source: the local copy of a public log, None for a world, and where the converter downloads.

    Raises ConfigError naming the file, the table and the key of what is unknown, missing or of the wrong type.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not a readable TOML file ({error})") from error
    _known(tables, TABLES, f"{path}: table")
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name!r} stands outside a table; tables are {', '.join(TABLES)}")
    one = _set(path, tables, source)
    axis = Axis.of(tables["axis"], f"{path}: [axis]") if tables.get("axis") else None
    published = Published.of(tables["published"], str(path)) if "published" in tables else None
    return BenchmarkConfig(replace(one, axis=axis, published=published), _run(path, tables))


def _set(path: Path, tables: Mapping[str, Any], source: Path | None) -> BenchmarkSet:
    about, options, prepared = (dict(tables.get(name, {})) for name in ("set", "options", "prepare"))
    _known(about, SET_KEYS, f"{path}: [set]")
    if not isinstance(about.get("name"), str) or ("converter" in about) == ("world" in about):
        raise ConfigError(f"{path}: [set] needs a name, and either a converter or a world")
    name, text = about["name"], str(about.get("about", ""))
    prepared = _checked(PrepareOptions, prepared, f"{path}: [prepare]", hidden=PATHS)
    if "world" in about:
        if about["world"] not in WORLDS:
            raise ConfigError(f"{path}: there is no world {about['world']!r}{nearest(about['world'], WORLDS)}")
        if source is not None:
            raise ConfigError(f"--from {source}: {path} is a synthetic world, which is made and not read")
        one = world_set(about["world"], options, prepared)
        return replace(one, name=name, about=f"{text} {one.about}".strip())
    converter = about["converter"]
    if converter not in CONVERTERS:
        raise ConfigError(f"{path}: there is no converter {converter!r}{nearest(str(converter), CONVERTERS)}")
    kind = CONVERTERS[converter]
    if source is None and not kind.can_download:
        raise ConfigError(f"{path}: {name} is read from a local copy; give it with --from (docs/public-sets.md)")
    made = kind.options(**_checked(kind.options, options, f"{path}: [options]"))
    return converted(name, text, converter, source, made, **prepared)


def _run(path: Path, tables: Mapping[str, Any]) -> RunChoice:
    values = dict(tables.get("run", {}))
    _known(values, [f.name for f in fields(RunChoice) if f.name != "settings"], f"{path}: [run]")
    models, seeds, size, steps = (values.get(name) for name in ("models", "seeds", "size", "max_steps"))
    for name, value, kind in (("models", models, str), ("seeds", seeds, int)):
        if value is not None and not (isinstance(value, list) and all(isinstance(v, kind) for v in value)):
            raise ConfigError(f"{path}: [run] {name} = {value!r}: a list, as in {name} = [...]")
    if size is not None and size not in SIZES:
        raise ConfigError(f"{path}: [run] size {size!r}{nearest(str(size), SIZES)}")
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ConfigError(f"{path}: [run] max_steps = {steps!r}: a whole number above 0")
    return RunChoice(
        None if models is None else tuple(models), None if seeds is None else tuple(dict.fromkeys(seeds)), size, steps,
        dict(tables.get("settings", {})),
    )  # fmt: skip


def _checked(kind: type, values: Mapping[str, Any], place: str, hidden: tuple[str, ...] = ()) -> dict[str, Any]:
    """Values for the fields of a dataclass: known, of the type of the field's default; lists become tuples."""
    known = {f.name: f.default for f in fields(kind) if f.name not in hidden}
    _known(values, known, place)
    found = {}
    for name, value in values.items():
        value, default = (tuple(value) if isinstance(value, list) else value), known[name]
        if default is not MISSING and default is not None and not isinstance(value, _types(default)):
            raise ConfigError(f"{place}: {name} = {value!r} is not {type(default).__name__}")
        found[name] = value
    return found


def _types(default: Any) -> tuple[type, ...]:
    return (int, float) if isinstance(default, float) else (type(default),)


def _known(values: Mapping[str, Any], known: Any, place: str) -> None:
    for name in values:
        if name not in known:
            raise ConfigError(f"{place}: unknown {name!r}{nearest(name, known)}")
