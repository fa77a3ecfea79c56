"""What the cells of one set say: does the whole history pay, and up to which length?

A set counts as *lifelong* only if the best model that reads the whole history beats both controls that do not, the same
ranker on recent events and counts cut to as many, by more than three standard errors of NE, paired by seed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vista.benchmark.cells import Cell
from vista.benchmark.entries import choose
from vista.evaluation.metrics import Estimate, mean_and_standard_error, paired_difference

NEEDED_ERRORS = 3.0
RECENT, CUT_COUNTS, ALL_COUNTS = "recent", "counts-64", "counts"
CUT_NAME = re.compile(ALL_COUNTS + r"-(\d+)")


@dataclass(frozen=True)
class Gain:
    """By how much the best full-history entry's NE is below that of a control, paired by seed."""

    control: str
    gain: Estimate

    @property
    def is_sure(self) -> bool:
        return self.gain.in_standard_errors > NEEDED_ERRORS

    @property
    def verb(self) -> str:
        return "is behind" if self.gain.mean < 0 else "beats"

    def __str__(self) -> str:
        distance = replace(self.gain, mean=abs(self.gain.mean))
        errors = f" ({distance.in_standard_errors:.1f} standard errors)" if distance.standard_error >= 0 else ""
        return f"{self.control} by {distance} NE{errors}"


@dataclass(frozen=True)
class Verdict:
    """best: the entry of the lowest NE among those that read the whole history, or empty where there is none; gains:
    over each control that was run with the same seeds."""

    name: str
    best: str
    gains: tuple[Gain, ...]

    @property
    def is_lifelong(self) -> bool:
        return len(self.gains) == 2 and all(gain.is_sure for gain in self.gains)

    def sentence(self) -> str:
        """One sentence for whoever wants to know whether lifelong history pays on this log."""
        if not self.best:
            return f"{self.name}: no entry here reads the whole history; add counts or vista to know whether it pays."
        if not self.gains:
            return f"{self.name}: not enough runs to tell whether the whole history pays."
        if any(math.isnan(gain.gain.mean) for gain in self.gains):
            return f"{self.name}: NE cannot be measured on its test split, where all labels are alike: no verdict."
        verbs = {gain.verb: [str(g) for g in self.gains if g.verb == gain.verb] for gain in self.gains}
        stands = " and ".join(f"{verb} {' and '.join(over)}" for verb, over in verbs.items())
        if any(math.isnan(gain.gain.standard_error) for gain in self.gains):
            return f"{self.name}: with one seed, {self.best} {stands}; run more seeds to know how sure that is."
        says = "the whole history pays here" if self.is_lifelong else "that is not enough to call this set lifelong"
        return f"{self.name}: with the whole history {self.best} {stands}: {says}."


def judge(name: str, cells: Sequence[Cell], training: Mapping[str, Any]) -> Verdict:
    """The verdict on the first task. training: settings that all entries were trained with."""
    full = [entry.name for entry in choose(c.entry for c in cells) if entry.reads_all(training)]
    if not full:
        return Verdict(name, "", ())
    best = min(full, key=lambda entry: mean_and_standard_error(list(scores(cells, entry).values())).mean)
    gains = []
    for control in (RECENT, CUT_COUNTS):
        mine, theirs = scores(cells, best), scores(cells, control)
        common = sorted(mine.keys() & theirs.keys())
        if common:
            gain = paired_difference([theirs[seed] for seed in common], [mine[seed] for seed in common])
            gains.append(Gain(control, gain))
    return Verdict(name, best, tuple(gains))


def scores(cells: Sequence[Cell], entry: str, metric: str = "ne") -> dict[int, float]:
    """A metric of the first task by seed."""
    return {c.seed: c.evaluation.metrics[c.evaluation.tasks[0]][metric] for c in cells if c.entry == entry}


def rewarded_length(cells: Sequence[Cell]) -> int | None:
    """The number of last events from which on counting in more of them no longer helps, by NEEDED_ERRORS.

    0: even the longest cut is beaten by the whole history. None where counts or their cuts were not run, or not with
    seeds enough to tell.
    """
    whole = scores(cells, ALL_COUNTS)
    cuts = {int(found[1]): c.entry for c in cells if (found := CUT_NAME.fullmatch(c.entry))}
    for last, entry in sorted(cuts.items()):
        cut = scores(cells, entry)
        common = sorted(whole.keys() & cut.keys())
        gain = paired_difference([cut[seed] for seed in common], [whole[seed] for seed in common])
        if math.isnan(gain.standard_error):
            return None
        if not gain.in_standard_errors > NEEDED_ERRORS:
            return last
    return 0 if cuts else None
