"""docs/record-format.md gives the numbers and the words of the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from tests.models.worlds import histories
from tests.updates.test_apply import make_run
from vista.config import resolve
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
    assert [(row["K"], row["D"]) for row in SIZES] == [("64", "64")] * 2 + [("256", "128")] * 2


@pytest.mark.parametrize("row", SIZES, ids=lambda row: f"{row['K']} x {row['D']} {row['memory']}")
def test_bytes_per_user(row: dict[str, str]) -> None:
    size = {"64": "small", "128": "base"}[row["D"]]
    config = resolve(size, overrides={"model.num_seeds": int(row["K"])}).model
    assert config.width == int(row["D"])
    names = ("num_seeds", "width", "recent_events", "segment_events", "num_layers", "num_heads")
    model = make_run(row["memory"].strip("`"), **{name: getattr(config, name) for name in names}).sequence_model
    state = model.extend(model.init_state(1), histories([config.recent_events + 1]))
    tokens, cold = to_records(model, state, [1234567], "0123456789abcdef")
    assert len(record.encode(cold)) == int(row["state"])
    for title, value in row.items():
        for codec in set(re.findall(r"\w+", title)) & set(record.CODECS):
            assert len(record.encode(tokens, codec)) == int(value), codec


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
