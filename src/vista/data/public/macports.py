"""The MacPorts log: a maintainer changes packages in commits, since 2002. Few people, very long histories.

Made from any clone of the macports-ports git history, or from a Parquet folder of it that somebody made before. A user
is a commit's author, as a number that stands for the person (in order of first commit; no name or address is written);
an item is a package, ``category/port``; an event is one package changed by one commit; a burst is one commit.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from vista.data.public.folder import read_columns, write_dataset
from vista.errors import DataError
from vista.progress import Progress

URL = "https://github.com/macports/macports-ports.git"
KINDS = ("update", "other", "fix", "remove", "meta", "maintainer", "new", "revbump")  # codes in the Parquet layout
# What a commit's message says, roughly; the first that matches. An added or deleted Portfile says it better.
MESSAGES = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("revbump", r"\brev-?\s?bump|\b(bump|increase|increment|up) (the )?(port )?revision|\brebuild\b"),
        ("maintainer", r"maintainer|\babandon|\btake over\b|\borphan"),
        (
            "new",
            r"\bnew (port|submission|package|subport)|\badd(ed|s)? (a )?(new )?port\b|\binitial (port|commit|import)",
        ),
        ("remove", r"\b(remove|delete|drop)[sd]?\b.*\b(port|obsolete)|\bobsoleted?\b|\breplaced by\b"),
        ("fix", r"\bfix|\bbroken\b|\bpatch|\bwork ?around|\bcorrect|\brepair"),
        (
            "meta",
            r"\blicen[sc]e|\bhomepage|\blivecheck|\bchecksums?\b|\bdescription|\bmaster_sites|\bwhitespace|\blint\b",
        ),
        ("update", r"\bupdate|\bupgrade|\bbump|\bversion\b|\d+\.\d+"),
    )
)
HEADER, FIELD = "\x1e", "\x1f"  # before a commit and between its fields: never in a path or a name
LOG = ("log", "--reverse", "--no-merges", "--no-renames", "--name-status", f"--format={HEADER}%aE{FIELD}%ct{FIELD}%s")
PORT_FILE = "Portfile"
OLD_PREFIXES = ("trunk/dports/", "dports/")  # where ports were before the repository was theirs alone


@dataclass(frozen=True)
class MacportsOptions:
    """max_burst: commits of more packages are left out, 0 = none. min_user_events: users with fewer events, of those
    that are left over, are left out. url: cloned when there is no local copy.
    """

    max_burst: int = 50
    min_user_events: int = 20
    url: str = URL


@dataclass(frozen=True)
class Commit:
    """author: mail address. ports: what happened in it, ``category/port`` -> kind or None (see the message)."""

    author: str
    time_s: int
    message: str
    ports: dict[str, str | None] = field(default_factory=dict)


def convert_macports(out: Path, source: Path | None = None, options: MacportsOptions | None = None) -> dict[str, Any]:
    """Convert the log into a new folder; what is in its dataset.json.

    source: a git clone (with or without work tree), or a folder with events.parquet and items.parquet; without it the
    history is cloned from ``options.url``, without file contents, and the clone is removed afterwards.
    Raises DataError for a source that is neither, for git's errors, and when no event is left.
    """
    options = options or MacportsOptions()
    if source is None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".macports-", dir=out.parent) as folder:
            clone(options.url, Path(folder) / "clone.git")
            events = read_clone(Path(folder) / "clone.git")
        origin = options.url
    else:
        events, origin = _read(source), source.resolve().name
    events = _filtered(events, options)
    items = events.select("item_id").unique().sort("item_id")
    items = items.with_columns(category=pl.col("item_id").str.split("/").list.first())
    described = {"source": origin, "max_burst": options.max_burst, "min_user_events": options.min_user_events}
    return write_dataset(out, "macports", {"events": events, "items": items}, described)


def _read(source: Path) -> pl.DataFrame:
    if (source / "events.parquet").is_file():
        return read_parquet(source)
    if (source / ".git").exists() or (source / "HEAD").is_file():
        return read_clone(source)
    raise DataError(
        f"{source}: neither a git clone nor a folder with events.parquet and items.parquet; "
        f"clone {URL} (with --bare --filter=blob:none it is small) and give that folder"
    )


def _filtered(events: pl.DataFrame, options: MacportsOptions) -> pl.DataFrame:
    """Leave out large bursts, then users with few events; sorted by user and time, bursts numbered anew."""
    if options.max_burst:
        events = events.filter(pl.len().over("burst") <= options.max_burst)
    events = events.filter(pl.len().over("user_id") >= options.min_user_events)
    events = events.with_columns(burst=pl.col("burst").rank("dense").cast(pl.Int64) - 1)
    return events.sort("user_id", "timestamp", "burst", maintain_order=True)


def read_parquet(folder: Path) -> pl.DataFrame:
    """All events of the Parquet layout, in its order: user_id, item_id, timestamp, action, burst.

    events.parquet has user_id, item_id, ts (epoch seconds) and kind, an index into KINDS; items.parquet has item_id and
    item, ``category/port``. A commit is what one user did at one moment.
    """
    events = read_columns(folder / "events.parquet", ("user_id", "item_id", "ts", "kind"))
    items = read_columns(folder / "items.parquet", ("item_id", "item"))
    named = events.join(items.select("item_id", "item"), on="item_id", how="left", maintain_order="left")
    unnamed = named.filter(pl.col("item").is_null())
    if len(unnamed):
        raise DataError(f"{folder}/items.parquet: no item {unnamed['item_id'][0]}, which events.parquet has")
    beyond = named.filter(~pl.col("kind").is_between(0, len(KINDS) - 1))
    if len(beyond):
        raise DataError(f"{folder}/events.parquet: kind {beyond['kind'][0]}; known are 0 .. {len(KINDS) - 1}: {KINDS}")
    return named.select(
        pl.col("user_id").cast(pl.Int64),
        pl.col("item").alias("item_id"),
        pl.col("ts").cast(pl.Int64).alias("timestamp"),
        pl.col("kind").cast(pl.Int64).replace_strict(dict(enumerate(KINDS)), return_dtype=pl.String).alias("action"),
        pl.struct("ts", "user_id").rank("dense").cast(pl.Int64).alias("burst"),
    )


def clone(url: str, folder: Path) -> None:
    """Clone a history without file contents: the log needs names alone. Raises DataError with git's own words."""
    command = [_git(), "clone", "--bare", "--quiet", "--single-branch", "--filter=blob:none", url, str(folder)]
    with Progress("macports: cloning, some hundred megabytes", unit="clones") as progress:
        done = subprocess.run(command, env=_git_environment(), capture_output=True, text=True, check=False)
        progress.advance()
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataError(f"cannot clone {url}: {reason}. Clone it where there is a network, and give --from FOLDER")


def read_clone(folder: Path) -> pl.DataFrame:
    """All events of a clone's history, oldest commit first: user_id, item_id, timestamp, action, burst."""
    rows: dict[str, list[Any]] = {name: [] for name in ("user_id", "item_id", "timestamp", "action", "burst")}
    users: dict[str, int] = {}
    with Progress("macports: reading the history", unit="commits") as progress:
        for number, commit in enumerate(parse_log(_log_lines(folder))):
            progress.advance()
            for port, kind in commit.ports.items():
                rows["user_id"].append(users.setdefault(commit.author, len(users)))
                rows["item_id"].append(port)
                rows["timestamp"].append(commit.time_s)
                rows["action"].append(kind or kind_of(commit.message))
                rows["burst"].append(number)
    types = {"user_id": pl.Int64, "item_id": pl.String, "timestamp": pl.Int64, "action": pl.String, "burst": pl.Int64}
    return pl.DataFrame(rows, schema=types)


def _log_lines(folder: Path) -> Iterator[str]:
    """The lines of the log. Raises DataError with git's own words."""
    command = [_git(), "-c", "core.quotePath=false", "-C", str(folder), *LOG]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=_git_environment()) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            yield line.decode(errors="replace").rstrip("\n")
        process.wait()
        errors.seek(0)
        if process.returncode:
            reason = (errors.read().decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
            raise DataError(f"{folder}: git cannot read its history: {reason}")


def parse_log(lines: Iterable[str]) -> Iterator[Commit]:
    """The commits of a log in the format LOG that change a port."""
    commit: Commit | None = None
    for line in lines:
        if line.startswith(HEADER):
            if commit is not None and commit.ports:
                yield commit
            author, time_s, message = line[1:].split(FIELD, 2)
            commit = Commit(author.lower(), int(time_s), message)
        elif "\t" in line and commit is not None:
            status, path = line.split("\t", 1)
            port = port_of(path)
            if port is not None:
                changed = {"A": "new", "D": "remove"}.get(status) if path.endswith("/" + PORT_FILE) else None
                commit.ports[port] = commit.ports.get(port) or changed
    if commit is not None and commit.ports:
        yield commit


def port_of(path: str) -> str | None:
    """``category/port`` of a file in a port's folder, None for any other file."""
    for prefix in OLD_PREFIXES:
        path = path.removeprefix(prefix)
    parts = path.split("/")
    return None if len(parts) < 3 or parts[0].startswith(("_", ".")) else f"{parts[0]}/{parts[1]}"


def kind_of(message: str) -> str:
    """What a commit does, by its message: one of KINDS."""
    return next((kind for kind, pattern in MESSAGES if pattern.search(message)), "other")


def _git() -> str:
    git = shutil.which("git")
    if git is None:
        raise DataError("git is not installed; install it to read a clone, or convert from Parquet")
    return git


def _git_environment() -> dict[str, str]:
    """Git in English, asking nothing."""
    return {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
