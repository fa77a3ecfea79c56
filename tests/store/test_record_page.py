"""docs/record-format.md gives the numbers and the words of the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from tests.models.worlds import histories
from tests.updates.test_apply import make_run
from vista.config import _CHOICES, resolve
from vista.records import to_records
from vista.store import record

PAGE = (Path(__file__).parents[2] / "docs" / "record-format.md").read_text()


def table(title: str, column: str) -> list[dict[str, str]]:
    """The rows of the table under a heading whose first line names a column."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    start = next(place for place, row in enumerate(rows) if column in row)
    return [dict(zip(rows[start], row, strict=True)) for row in rows[start + 2 :] if len(row) == len(rows[start])]


SIZES = table("Bytes per user", "memory")


def test_the_page_has_both_sizes() -> None:
    assert [(row["K"], row["D"]) for row in SIZES] == [("64", "64")] * 4 + [("256", "128")] * 4
    assert {row["memory"].strip("`") for row in SIZES} == set(_CHOICES["model.memory"])


def records_of(row: dict[str, str], memory: str, asked: str = "none") -> list[record.Record]:
    """Tokens and state of one user with more events than are recent, at the size of a row."""
    size = {"64": "small", "128": "base"}[row["D"]]
    config = resolve(size, overrides={"model.num_seeds": int(row["K"])}).model
    assert config.width == int(row["D"])
    names = ("num_seeds", "width", "recent_events", "segment_events", "num_layers", "num_heads")
    model = make_run(memory, candidate_memory=asked, **{n: getattr(config, n) for n in names}).sequence_model
    state = model.extend(model.init_state(1), histories([config.recent_events + 1]))
    return to_records(model, state, [1234567], "0123456789abcdef")


@pytest.mark.parametrize("row", SIZES, ids=lambda row: f"{row['K']} x {row['D']} {row['memory']}")
def test_bytes_per_user(row: dict[str, str]) -> None:
    tokens, cold = records_of(row, row["memory"].strip("`"))
    assert len(record.encode(cold)) == int(row["state"])
    for title, value in row.items():
        for codec in set(re.findall(r"\w+", title)) & set(record.CODECS):
            assert len(record.encode(tokens, codec)) == int(value), codec


def test_bytes_of_what_candidates_ask() -> None:
    rows = table("Bytes per user", "candidate memory")
    assert [row["candidate memory"].strip("`") for row in rows] == ["sum", "ridge", "delta"]
    for row in rows:
        without, asked = (records_of(row, "slots", a) for a in ("none", row["candidate memory"].strip("`")))
        more = [len(record.encode(b)) - len(record.encode(a)) for a, b in zip(without, asked, strict=True)]
        assert more == [int(row["tokens: more"]), int(row["state: more, beside `slots`"])]


def test_codecs_and_their_limits() -> None:
    rows = table("Codecs", "codec")
    assert [row["codec"].split("`")[1] for row in rows] == list(record.CODECS)
    for row, largest in zip(rows, record.LARGEST.values(), strict=True):
        assert float(row["largest value"]) == pytest.approx(largest, rel=1e-3)


def test_reasons_for_refusing_are_those_of_the_code() -> None:
    source = inspect.getsource(record)
    reasons = [
        text for row in table("What a reader refuses", "found") for text in re.findall("`(.+?)`", row["message begins"])
    ]
    assert len(reasons) == 11
    assert [text for text in reasons if text not in source] == []
