"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere.

    with Progress("prepare", total=num_events, unit="events") as progress:
        for block in blocks:
            ...
            progress.advance(len(block))

A terminal gets one line that is redrawn; a file, a pipe or a CI log gets a line at most every ``PLAIN_INTERVAL_S``
seconds and one at the end. Both show the same: done of total, rate, time left, and facts such as the loss. Needs no
other module of the package, and rich only where there is a terminal.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.progress

PLAIN_INTERVAL_S = 10.0  # often enough to see that it lives, seldom enough for a log file
REDRAW_INTERVAL_S = 0.1  # the eye sees no more; keeps advance() cheap
RATE_WINDOW_S = 30.0  # rate and time left look back this far, so that they follow a change of speed
MIN_RATE_S = 1e-3  # shorter than this, a rate says nothing


class Progress:
    """Shows how far a piece of work has come.

    total: units of work in all, or None where that is not known. done: units that were done before (a resumed run):
    they count as done but not in the rate. work: what is still to do in a measure that takes more evenly long than
    units do; time left follows it. quiet: show nothing.

    Progress inside Progress (validation within training) adds a line of its own to the terminal while it runs;
    elsewhere it stays silent unless it takes longer than ``PLAIN_INTERVAL_S``.
    """

    _active: list[Progress] = []  # noqa: RUF012 (shared on purpose: the progress under way in this process, outermost first)

    def __init__(
        self, label: str, total: int | None = None, unit: str = "", quiet: bool = False, done: int = 0,
        work: int | None = None,
    ) -> None:  # fmt: skip
        self.label, self.total, self.unit, self.quiet = label, total, unit, quiet
        self.done = self._done_before = done
        self._work = total - done if work is None and total is not None else work  # still to do
        self._facts: dict[str, Any] = {}
        self._start_s = self._shown_s = time.monotonic()
        self._samples: deque[tuple[float, int, int]] = deque([(self._start_s, done, self._work or 0)])
        self._bar: _Bar | None = None
        self._printed = False

    def __enter__(self) -> Progress:
        self._start_s = self._shown_s = time.monotonic()
        self._samples = deque([(self._start_s, self.done, self._work or 0)])
        if not self.quiet and is_terminal():
            outer = next((p._bar for p in reversed(Progress._active) if p._bar), None)
            self._bar = _Bar(self.label, self.total, outer)
            self._show(self._start_s)
        Progress._active.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Progress._active.remove(self)
        now_s = time.monotonic()
        if self._bar is not None:
            self._bar.show(self.done, self.total, self.describe(now_s, ended=True))
            self._bar.close()
            self._bar = None
        elif not self.quiet and (self._printed or not Progress._active):
            self._print(self.describe(now_s, ended=True) + ("" if kind is None else "  (not finished)"))

    def advance(self, units: int = 1, work: int | None = None, **facts: Any) -> None:
        """Say that so many more units are done, how much work that was, and what goes with them (as ``update``)."""
        self.done += units
        if self._work is not None:
            self._work = max(self._work - (units if work is None else work), 0)
        self.update(**facts)

    def update(self, **facts: Any) -> None:
        """Show facts beside the progress, such as ``loss=0.61``; a value of None takes its fact away."""
        if facts:
            self._facts = {name: value for name, value in {**self._facts, **facts}.items() if value is not None}
        self._tick()

    def describe(self, now_s: float, ended: bool = False) -> str:
        """One line without the label: done, share, rate, time left (or taken, when ended), facts."""
        rate = self._rate(now_s, ended)
        unit = f" {self.unit}" if self.unit else ""
        parts = [short(self.done) + (f"/{short(self.total)}" if self.total is not None else "") + unit]
        if self.total:
            parts[0] += f" ({self.done / self.total:.0%})"
        if rate:
            parts.append(f"{short(rate)}{unit}/s")
        if ended:
            parts.append(f"in {duration(now_s - self._start_s)}")
        elif self._work is not None and (speed := self._speed(now_s)):
            parts.append(f"{duration(self._work / speed)} left")
        parts += [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                  for name, value in self._facts.items()]  # fmt: skip
        return "  ".join(parts)

    def _rate(self, now_s: float, ended: bool) -> float:
        """Units per second: over the whole run once it has ended, before that over the last ``RATE_WINDOW_S``."""
        since_s, done_then = (self._start_s, self._done_before) if ended else self._samples[0][:2]
        return (self.done - done_then) / (now_s - since_s) if now_s - since_s > MIN_RATE_S else 0.0

    def _speed(self, now_s: float) -> float:
        """Work per second over the last ``RATE_WINDOW_S``."""
        since_s, _, work_then = self._samples[0]
        return (work_then - (self._work or 0)) / (now_s - since_s) if now_s - since_s > MIN_RATE_S else 0.0

    def _tick(self) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s >= (REDRAW_INTERVAL_S if self._bar is not None else PLAIN_INTERVAL_S):
            self._show(now_s)

    def _show(self, now_s: float) -> None:
        self._shown_s = now_s
        if self._bar is not None:
            self._bar.show(self.done, self.total, self.describe(now_s))
        elif not self.quiet:
            self._print(self.describe(now_s))
        self._samples.append((now_s, self.done, self._work or 0))
        while len(self._samples) > 2 and now_s - self._samples[1][0] > RATE_WINDOW_S:
            self._samples.popleft()

    def _print(self, line: str) -> None:
        self._printed = True
        print(f"{self.label}: {line}", file=sys.stderr, flush=True)


class _Bar:
    """One line of a rich progress display: of its own, or one more line in the display of an outer bar."""

    def __init__(self, label: str, total: int | None, outer: _Bar | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._owns_display = outer is None
        self._display: rich.progress.Progress = outer._display if outer is not None else Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[line]}", markup=False),
            console=Console(stderr=True), redirect_stdout=sys.stdout.isatty(),
        )  # fmt: skip
        self._task = self._display.add_task(label, total=total, line="")
        if self._owns_display:
            self._display.start()

    def show(self, done: int, total: int | None, line: str) -> None:
        self._display.update(self._task, completed=done, total=total, line=line)

    def close(self) -> None:
        if self._owns_display:
            self._display.stop()
        else:
            self._display.remove_task(self._task)


def is_terminal() -> bool:
    """Whether stderr can show a line that is redrawn."""
    return bool(sys.stderr) and sys.stderr.isatty()


def short(number: float) -> str:
    """A number in at most five characters and a unit prefix: 950, 2000, 12.3k, 4.57M."""
    if number == int(number) and abs(number) < 10_000:
        return f"{number:.0f}"
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:  # what would round to 1000 takes the next prefix
            return f"{number / size:.3g}{prefix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Seconds as 0.4s, 12s, 3m05s or 2h07m."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest}s"
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"
