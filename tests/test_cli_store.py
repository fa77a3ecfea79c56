"""``vista store``: what it prints and what it does to a store; bad input leaves everything as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.contracts.store import V1, V2, V3, fill, numbered
from vista.cli.main import app
from vista.store.contract import open_store


def store(*words: object) -> Result:
    return CliRunner().invoke(app, ["store", *map(str, words)], catch_exceptions=False)


@pytest.fixture
def path(tmp_path) -> Path:
    """Three versions: the first published, then the second; the third is not complete."""
    with open_store(str(tmp_path / "store")) as opened:
        for version in (V1, V2):
            fill(opened, version, *numbered(5))
            opened.publish(version)
        fill(opened, V3, *numbered(2), complete=False)
    return tmp_path / "store"


def test_list_shows_versions_users_and_bytes(path):
    rows = json.loads(store("list", path, "--json").stdout)
    assert [row["version"] for row in rows] == [V1, V2, V3]
    assert [row["status"] for row in rows] == ["to roll back to", "published", "not complete"]
    assert [(row["num_users"], row["expected_users"]) for row in rows] == [(5, 5), (5, 5), (2, 2)]
    num_bytes = 5 * len(b"tokens of i:000000 " + V1.encode())
    assert rows[0]["kinds"]["tokens"] == {"records": 5, "bytes": num_bytes}
    table = store("list", path).stdout
    for text in (V1, "published", "to roll back to", "not complete", "5 of 5", "8 x 4", "10", f"{2 * num_bytes - 5}"):
        assert text in table


def test_publish_and_rollback_say_what_they_did(path):
    refused = store("publish", path, V3)
    assert refused.exit_code == 2
    assert "its bulk run has not ended; finish it with vista summarize, or force" in refused.stderr
    assert store("publish", path, V3, "--force").stdout.startswith(f"published version {V3} in {path}; a rollback")
    assert store("rollback", path).stdout == f"rolled back: published version {V2} in {path}\n"
    with open_store(str(path)) as opened:
        assert (opened.published(), opened.previous()) == (V2, V3)
    assert store("publish", path, "no-such-version!").exit_code == 2


def test_gc_says_what_it_removed(path):
    assert store("gc", path, "--keep", 1).stdout == "removed in all: 0 of 3 versions, 0 bytes\n"
    out = store("gc", path).stdout
    assert out.startswith(f"removed version {V3}: 1")
    assert "removed in all: 1 of 3 versions, 1" in out
    assert json.loads(store("gc", path, "--json").stdout) == {}
    with open_store(str(path)) as opened:
        assert [info.version for info in opened.versions()] == [V1, V2]


@pytest.mark.parametrize("words", [["list"], ["publish", V1], ["rollback"], ["gc"]])
def test_a_path_without_a_store_does_not_become_one(tmp_path, words):
    result = store(words[0], tmp_path / "stroe", *words[1:])
    assert result.exit_code == 2
    assert "there is no store" in result.stderr
    assert not (tmp_path / "stroe").exists()


def test_a_url_is_shown_without_its_password():
    result = store("list", "redis://u:secret@127.0.0.1:1")
    assert result.exit_code == 2
    assert "error: redis://u:***@127.0.0.1:1: cannot be opened" in result.stderr
