"""Public logs in every form they come in, made up here; and the real ones, where they are at hand."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.error
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from tests.conftest import shared_data
from vista.cli.main import app
from vista.data.public import MacportsOptions, MovielensOptions, convert_macports, convert_movielens
from vista.data.public.macports import kind_of, parse_log, port_of
from vista.errors import ConfigError, DataError, MissingColumn, StaleOutput

RATINGS = [(1, 10, 4.0, 100), (1, 20, 3.5, 90), (2, 10, 5.0, 300)]
FILMS = [(10, "Heat (1995)", "Action|Crime"), (20, "Up, Up (2009)", "Children's"), (30, "Unseen", "(no genres listed)")]


def write_csv(folder: Path) -> None:
    rows = "".join(f"{u},{i},{r},{t}\n" for u, i, r, t in RATINGS)
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + rows)
    rows = "".join(f'{i},"{title}",{genres}\n' for i, title, genres in FILMS)
    (folder / "movies.csv").write_text("movieId,title,genres\n" + rows)


def write_dat(folder: Path) -> None:
    (folder / "ratings.dat").write_text(
        "".join(f"{u}::{i}::{r:g}::{t}\n" for u, i, r, t in RATINGS), encoding="latin-1"
    )
    (folder / "movies.dat").write_text("".join("::".join(map(str, film)) + "\n" for film in FILMS), encoding="latin-1")


def write_parquet(folder: Path) -> None:
    user, item, rating, ts = zip(*RATINGS, strict=True)
    table = pl.DataFrame({"user_id": user, "item_id": item, "rating_x2": [int(2 * r) for r in rating], "ts": ts})
    table.write_parquet(folder / "events.parquet")
    item, _, genres = zip(*FILMS, strict=True)
    pl.DataFrame({"item_id": item, "genres": genres}).write_parquet(folder / "items.parquet")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_titles_of_any_encoding(encoding, tmp_path):
    """In UTF-8 an A with a ring has a byte that Latin 1 takes for the end of a line."""
    write_dat(tmp_path)
    films = "".join("::".join(map(str, film)) + "\n" for film in [*FILMS[1:], (10, "Å (1995)", "Action|Crime")])
    (tmp_path / "movies.dat").write_text(films, encoding=encoding)
    convert_movielens(tmp_path / "out", tmp_path, MovielensOptions())
    items = pl.read_parquet(tmp_path / "out" / "items.parquet").sort("item_id")
    assert items.row(0, named=True)["genre_crime"] == 1


@pytest.mark.parametrize("write", [write_csv, write_dat, write_parquet])
def test_movielens_in_each_form(tmp_path: Path, write: Callable[[Path], None]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write(source)
    summary = convert_movielens(tmp_path / "out", source)
    events, items = (pl.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in ("events", "items"))
    assert events.rows() == [(1, 20, 90_000, "3.5"), (1, 10, 100_000, "4"), (2, 10, 300_000, "5")]
    assert items["category"].to_list() == ["Action", "Children's", "(no genres listed)"]
    assert items.select("genre_action", "genre_crime", "genre_childrens").rows() == [(1, 1, 0), (0, 0, 1), (0, 0, 0)]
    assert summary == json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (summary["num_events"], summary["num_users"], summary["num_items"]) == (3, 2, 2)


def test_a_known_order_rules_over_times(tmp_path: Path) -> None:
    """pos says 10, 20, 30, 40; the times say otherwise for 20 and do not tell 30 from 40."""
    source = tmp_path / "source"
    source.mkdir()
    table = {"user_id": [1, 1, 1, 1, 2], "item_id": [10, 20, 30, 40, 10], "rating": [4, 4, 4, 4, 4],
             "pos": [0, 1, 2, 3, 0], "ts": [100, 99, 101, 101, 5], "ts_src": [0, 0, 0, 0, 2]}  # fmt: skip
    pl.DataFrame(table).sample(fraction=1.0, shuffle=True, seed=1).write_parquet(source / "events.parquet")
    pl.DataFrame({"item_id": [10, 20, 30, 40], "genres": ["A"] * 4}).write_parquet(source / "items.parquet")
    convert_movielens(tmp_path / "out", source)
    events = pl.read_parquet(tmp_path / "out" / "events.parquet")
    assert events.filter(pl.col("user_id") == 1)["item_id"].to_list() == [10, 20, 30, 40]
    assert events["timestamp"].to_list() == [100_000, 100_001, 101_000, 101_001, 5_000]
    convert_movielens(tmp_path / "exact", source, MovielensOptions(exact_times=True))
    assert pl.read_parquet(tmp_path / "exact" / "events.parquet")["user_id"].unique().to_list() == [1]


def test_movielens_refuses(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no ratings.csv, ratings.dat or events.parquet"):
        convert_movielens(tmp_path / "out", tmp_path)
    write_csv(tmp_path)
    (tmp_path / "ratings.csv").write_text("user,movieId,rating,timestamp\n1,10,4,100\n")
    with pytest.raises(MissingColumn, match="'userId'"):
        convert_movielens(tmp_path / "out", tmp_path)
    (tmp_path / "ratings.csv").unlink()
    (tmp_path / "ratings.dat").write_text("1::10::4::100\n1::20::4\n")
    with pytest.raises(DataError, match=r"ratings.dat, row 2: 3 columns, expected 4"):
        convert_movielens(tmp_path / "out", tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'ml-20m'"):
        MovielensOptions(variant="ml-20")
    assert not (tmp_path / "out").exists()
    write_dat(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(StaleOutput):
        convert_movielens(tmp_path / "out", tmp_path)


class Answer:
    """What a server sends."""

    def __init__(self, body: bytes) -> None:
        self.body, self.headers = body, {"Content-Length": str(len(body))}

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *error: object) -> None: ...

    def read(self, size: int) -> bytes:
        chunk, self.body = self.body[:size], self.body[size:]
        return chunk


def test_movielens_is_downloaded_where_there_is_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "ml-1m"
    source.mkdir()
    write_dat(source)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in source.iterdir():
            archive.write(path, f"ml-1m/{path.name}")
    asked = []

    def answer(url: str, timeout: float) -> Answer:
        asked.append(url)
        return Answer((tmp_path / "a.zip").read_bytes())

    monkeypatch.setattr("urllib.request.urlopen", answer)
    assert convert_movielens(tmp_path / "out")["num_events"] == 3
    assert asked == ["https://files.grouplens.org/datasets/movielens/ml-1m.zip"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "ml-1m", "out"]

    def refuse(url: str, timeout: float) -> Answer:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(DataError, match=r"no route to host.*--from FOLDER"):
        convert_movielens(tmp_path / "other")
    assert not (tmp_path / "other").exists()


# -- MacPorts


def git(folder: Path, *words: str, **extra: str) -> None:
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", **extra}
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, env=environment)


def commit(folder: Path, author: str, time_s: int, message: str, files: dict[str, str | None]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink() if text is None else path.write_text(text)
    git(folder, "add", "-A")
    stamp = {"GIT_AUTHOR_DATE": f"@{time_s} +0000", "GIT_COMMITTER_DATE": f"@{time_s} +0000"}
    who = {"GIT_AUTHOR_NAME": "n", "GIT_AUTHOR_EMAIL": author, "GIT_COMMITTER_NAME": "n", "GIT_COMMITTER_EMAIL": "c@c"}
    git(folder, "commit", "-q", "-m", message, **stamp, **who)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ports")
    git(folder, "init", "-q")
    commit(folder, "a@x.org", 1_000, "start", {"lang/python/Portfile": "1", "net/curl/Portfile": "1", "README": "x"})
    commit(folder, "B@x.org", 2_000, "curl: update to 2.0", {"net/curl/Portfile": "2", "net/curl/files/p.diff": "p"})
    commit(folder, "b@x.org", 3_000, "python: fix build", {"lang/python/files/p.diff": "p"})
    commit(folder, "a@x.org", 4_000, "readme", {"README": "y"})
    commit(folder, "a@x.org", 5_000, "curl: is gone", {"net/curl/Portfile": None, "net/curl/files/p.diff": None})
    return folder


def test_macports_from_a_clone(tmp_path: Path, clone: Path) -> None:
    summary = convert_macports(tmp_path / "out", clone, MacportsOptions(min_user_events=1))
    events = pl.read_parquet(tmp_path / "out" / "events.parquet")
    assert events.rows() == [
        (0, "lang/python", 1_000, "new", 0),
        (0, "net/curl", 1_000, "new", 0),
        (0, "net/curl", 5_000, "remove", 3),
        (1, "net/curl", 2_000, "update", 1),
        (1, "lang/python", 3_000, "fix", 2),
    ]
    assert pl.read_parquet(tmp_path / "out" / "items.parquet").rows() == [("lang/python", "lang"), ("net/curl", "net")]
    assert summary["num_events"] == 5
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"x.org" not in written


def test_macports_leaves_out_large_commits_and_rare_users(tmp_path: Path, clone: Path) -> None:
    convert_macports(tmp_path / "burst", clone, MacportsOptions(max_burst=1, min_user_events=1))
    assert len(pl.read_parquet(tmp_path / "burst" / "events.parquet")) == 3
    convert_macports(tmp_path / "users", clone, MacportsOptions(min_user_events=3))
    assert pl.read_parquet(tmp_path / "users" / "events.parquet")["user_id"].unique().to_list() == [0]
    with pytest.raises(DataError, match="no events are left"):
        convert_macports(tmp_path / "none", clone, MacportsOptions(min_user_events=9))
    assert not (tmp_path / "none").exists()


def test_a_clone_without_work_tree_is_made_and_removed(tmp_path: Path, clone: Path) -> None:
    summary = convert_macports(tmp_path / "out", options=MacportsOptions(min_user_events=1, url=str(clone)))
    assert summary["num_events"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(DataError, match=r"cannot clone .*nowhere"):
        convert_macports(tmp_path / "other", options=MacportsOptions(url=str(tmp_path / "nowhere")))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a git clone nor a folder"):
        convert_macports(tmp_path / "out", tmp_path)
    (tmp_path / ".git").mkdir()
    with pytest.raises(DataError, match="git cannot read its history"):
        convert_macports(tmp_path / "out", tmp_path)


@pytest.mark.parametrize(
    ("path", "port"),
    [
        ("net/curl/Portfile", "net/curl"),
        ("trunk/dports/net/curl/files/x", "net/curl"),
        ("dports/net/curl/Portfile", "net/curl"),
        ("_resources/port1.0/group/x.tcl", None),
        (".github/workflows/x.yml", None),
        ("README", None),
    ],
)
def test_port_of(path: str, port: str | None) -> None:
    assert port_of(path) == port


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("curl: update to 8.1", "update"),
        ("qt5: revbump for new poppler", "revbump"),
        ("gcc: fix build on Tiger", "fix"),
        ("foo: new port", "new"),
        ("foo: remove obsolete port", "remove"),
        ("hello", "other"),
    ],
)
def test_kind_of(message: str, kind: str) -> None:
    assert kind_of(message) == kind


def test_a_log_without_ports_is_empty() -> None:
    assert list(parse_log(["\x1ea@x\x1f5\x1fhello", "", "M\tREADME"])) == []


# -- the real logs


def test_the_real_macports_log(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["data", "macports", "--from", str(shared_data("macports")), "--out", str(tmp_path / "out"), "--json"]
    )
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    # the data set's own table has 295,267: it cuts by the number of files, we by the number of packages
    assert found["num_users"] == 294
    assert found["num_items"] == 19_022
    assert abs(found["num_events"] - 295_267) < 100


def test_the_real_movielens_log(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["data", "movielens", "--from", str(shared_data("ml-1m")), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    assert "1,000,209 events of 6,040 users, 3,706 items" in result.stdout
    assert f"next: vista prepare {tmp_path}/out/events.parquet" in result.stdout
