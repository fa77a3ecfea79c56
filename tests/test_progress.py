"""Progress: the same facts on a terminal and off it, seldom lines off it, nothing when quiet."""

from __future__ import annotations

import io

import pytest

from vista import progress
from vista.progress import Progress, duration, short


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass when the test says so."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == "", "progress belongs to stderr"
    return captured.err.splitlines()


def test_plain_line_every_ten_seconds_and_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("prepare", total=300, unit="events") as bar:
        for _ in range(30):
            clock.now_s += 1
            bar.advance(10)
    assert lines(capsys) == [
        "prepare: 100/300 events (33%)  10 events/s  20s left",
        "prepare: 200/300 events (67%)  10 events/s  10s left",
        "prepare: 300/300 events (100%)  10 events/s  0.0s left",
        "prepare: 300/300 events (100%)  10 events/s  in 30s",
    ]


def test_a_short_run_prints_its_end_only(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("read", unit="rows") as bar:
        clock.now_s += 2
        bar.advance(50_000)
    assert lines(capsys) == ["read: 50k rows  25k rows/s  in 2.0s"]


def test_facts_are_shown_and_taken_away(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", total=10) as bar:
        bar.update(loss=0.61234, best="step 3")
        clock.now_s += 10
        bar.advance(5)
        bar.update(best=None)
    assert lines(capsys) == [
        "train: 5/10 (50%)  0.5/s  10s left  loss 0.6123  best step 3",
        "train: 5/10 (50%)  0.5/s  in 10s  loss 0.6123",
    ]


def test_work_done_before_counts_as_done_but_not_in_the_rate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", total=1000, unit="steps", done=900) as bar:
        clock.now_s += 10
        bar.advance(10)
    assert lines(capsys)[0] == "train: 910/1000 steps (91%)  1 steps/s  1m30s left"


def test_time_left_follows_the_work_where_units_take_differently_long(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("summarize", total=100, unit="events", work=300) as bar:
        clock.now_s += 10
        bar.advance(90, work=100)
        clock.now_s += 20
        bar.advance(10, work=200)
    assert lines(capsys)[:2] == [
        "summarize: 90/100 events (90%)  9 events/s  20s left",
        "summarize: 100/100 events (100%)  3.33 events/s  0.0s left",
    ]


def test_rate_follows_a_change_of_speed(clock: Clock) -> None:
    with Progress("read", total=10_000, quiet=True) as bar:
        for speed in (100, 1):
            for _ in range(60):
                clock.now_s += 1
                bar.advance(speed)
        assert "  1/s" in bar.describe(clock.now_s)


def test_an_error_is_told_apart_from_an_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with Progress("read", total=10) as bar:
            clock.now_s += 1
            bar.advance(3)
            raise ValueError("disk")

    with pytest.raises(ValueError, match="disk"):
        fail()
    assert lines(capsys) == ["read: 3/10 (30%)  3/s  in 1.0s  (not finished)"]


def test_quiet_and_short_inner_progress_say_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("quiet", total=1, quiet=True) as bar:
        clock.now_s += 100
        bar.advance()
    assert lines(capsys) == []
    with Progress("train", total=1):
        with Progress("validate", total=1) as inner:
            clock.now_s += 1
            inner.advance()
        assert lines(capsys) == []
        with Progress("validate", total=2) as inner:
            clock.now_s += 11
            inner.advance()
        assert [line.split(":")[0] for line in lines(capsys)] == ["validate", "validate"]


def test_terminal_gets_a_bar_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress("train", total=10, unit="steps") as bar:
        clock.now_s += 1
        bar.advance(4)
        with Progress("validate", total=7) as inner:
            inner.advance(2)
        bar.advance(6)
    shown = terminal.getvalue()
    for text in ("train", "validate", "10/10 steps (100%)", "10 steps/s", "in 1.0s"):
        assert text in shown
    assert not Progress._active


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (950, "950"), (2000, "2000"), (12_345, "12.3k"), (999_999, "1M"), (4_567_000, "4.57M"),
        (2e9, "2G"), (0.25, "0.25"), (1234.5, "1.23k"),
    ],
)  # fmt: skip
def test_short(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.44, "0.4s"), (12, "12s"), (185, "3m05s"), (7620, "2h07m")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
