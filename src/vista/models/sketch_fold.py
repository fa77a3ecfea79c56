"""How a sketch takes in histories: segment after segment, in tables that are changed in place, in main memory.

What of a segment does not depend on what was before it is worked out for all segments at once (`Sketch.parts`). The
rest is small steps, each on the rows of a few keys: numpy, whose calls cost a third of torch's. All users of a step are
taken together. Nothing is rounded but products and sums of the decayed numbers, each user's in the order of time, so
that no bit depends on who else is there.

Shape letters: B users, G segments, S events in a segment, J levels, n rows: keys that segments of one step have,
W slots of a bucket, F half-lives, N predecessors kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vista.models.memory import Running
from vista.models.traces import later_rivals, oldest_way
from vista.ops.order import SegmentOrder

if TYPE_CHECKING:
    from vista.models.sketch import Level, Sketch

KEY, COUNT, PLACE, SECOND = range(4)  # columns of an entry
UNKNOWN = -1  # to a segment by itself, the predecessor of its first event
DECAY_BITS = 12  # of one table; two of them and whole half-lives: ages in steps of 2^-24 half-lives
MAX_HALVINGS = 149  # 2^-149 is the smallest float32
NEWEST = 2**31 - 1  # the place of what must not make room


@dataclass(frozen=True)
class Rows:
    """The keys of segments at one level, in the order of steps, users and places.

    user (n,) int64; entry (n, 4) int32, places counted within the segment; decayed (n, F); slot (n,) int64: the first
    of the key's bucket; preceding (n, N) int16, of items alone; step_start (steps + 1,): the rows of each step.
    """

    user: np.ndarray
    entry: np.ndarray
    decayed: np.ndarray
    slot: np.ndarray
    preceding: np.ndarray
    step_start: np.ndarray

    def of_step(self, step: int) -> Rows:
        """Those of one step, copied where the fold changes them."""
        some = slice(self.step_start[step], self.step_start[step + 1])
        entry, decayed, preceding = (rows[some].copy() for rows in (self.entry, self.decayed, self.preceding))
        return Rows(self.user[some], entry, decayed, self.slot[some], preceding, self.step_start)


class SketchFold:
    """The running value of B users as numpy arrays, (B, ...) each, and how the segments of a step change them."""

    def __init__(self, sketch: Sketch, running: Running) -> None:
        self.sketch, self.device = sketch, running[0].device
        self.tables = [t.detach().cpu().numpy().copy() for t in running]
        self.entries, self.decayed, self.clock, *others = self.tables
        self.traces = None if sketch.traces is None else (sketch.traces, others[0], others[1])
        self.preceding: np.ndarray | None = others[-2] if sketch.num_predecessors else None
        self.newest: np.ndarray | None = others[-1] if sketch.num_predecessors else None
        self.is_met = np.zeros(self.entries.shape[:2], bool)  # by the segment under way; all False between levels
        self.left_of = [t.cpu().numpy() for t in (sketch.left_whole, sketch.left_coarse, sketch.left_fine)]
        self.steps_per_s = sketch.steps_per_s.cpu().numpy()

    def fold(self, parts: Running, order: SegmentOrder, keep: bool) -> tuple[Running, Running]:
        """All segments, whose parts (G, ...) ``Sketch.parts`` gives, one after another.

        Returns the running value after each of them (G, ...), nothing unless ``keep``, and after the last, (B, ...).
        """
        place = np.arange(len(order.user)) if order.place is None else order.place.numpy()
        bounds = np.concatenate([[0], np.cumsum(order.sizes)]).astype(np.int64)
        user = order.user.numpy()[place]
        entries, decayed, clock, *preceding = (t.detach().cpu().numpy()[place] for t in parts)
        levels = [
            self._rows(level, user, bounds, entries[:, j], decayed[:, j], preceding[:1] if j == 0 else [])
            for j, level in enumerate(self.sketch.levels)
        ]
        after = [np.empty((len(place), *t.shape[1:]), t.dtype) for t in self.tables] if keep else []
        for step in range(len(order.sizes)):
            some = slice(bounds[step], bounds[step + 1])
            self._step([rows.of_step(step) for rows in levels], user[some], clock[some])
            if self.newest is not None:
                self.newest[user[some]] = preceding[1][some]
            for kept, table in zip(after, self.tables, strict=False):
                kept[place[some]] = table[user[some]]
        return self._tensors(after), self._tensors(self.tables)

    def _tensors(self, arrays: list[np.ndarray]) -> Running:
        return tuple(torch.from_numpy(array).to(self.device) for array in arrays)

    def _rows(
        self,
        level: Level,
        user: np.ndarray,
        bounds: np.ndarray,
        entries: np.ndarray,
        decayed: np.ndarray,
        preceding: list[np.ndarray],
    ) -> Rows:
        """Of entries (G, S, 4), decayed (G, S, F) and, where there are any, preceding (G, S, N) those with a key.

        user (G,); bounds of the steps' segments.
        """
        segment, at = entries[..., KEY].nonzero()
        entry = entries[segment, at]
        slot = level.bucket(torch.from_numpy(entry[:, KEY].astype(np.int64))).numpy()
        decayed = decayed[segment, at].astype(self.decayed.dtype)
        kept = preceding[0][segment, at] if preceding else np.zeros((len(entry), 0), np.int16)
        return Rows(user[segment], entry, decayed, slot, kept, np.searchsorted(segment, bounds))

    def _step(self, levels: list[Rows], user: np.ndarray, clock: np.ndarray) -> None:
        """One segment of each of some users (U,): clock (U, 2): its events, and the second of the last."""
        before = self.clock[:, 0].copy()
        if self.traces is not None:
            traces, words, marks = self.traces
            traces.begin(words, marks, user, before[user].astype(np.int64), clock[:, 1])
        self.clock[user, 0] += clock[:, 0]
        for level, rows in zip(self.sketch.levels, levels, strict=True):
            rows.entry[:, PLACE] += before[rows.user]
            unknown = self._insert(level, rows)
            if level.feature is None:
                self.clock[:, 1] += np.bincount(unknown, minlength=len(self.clock)).astype(np.int32)

    def _insert(self, level: Level, rows: Rows) -> np.ndarray:
        """Put the rows of a step into a level.

        Those that have an entry are added to it. The others take the slots of the bucket that the segment did not meet,
        free ones and those met longest ago first; where even these are too few, the newest get them. Returns the users
        of keys that were not known, one for each.
        """
        user, entry, decayed = rows.user, rows.entry, rows.decayed
        slots = rows.slot[:, None] + np.arange(level.ways)
        held = self.entries[user[:, None], slots]
        is_way = held[..., KEY] == entry[:, KEY, None]
        has_entry = is_way.any(1)
        slot = rows.slot + is_way.argmax(1)
        again, new = has_entry.nonzero()[0], (~has_entry).nonzero()[0]
        enters, unknown = new, user[new]
        if level.ways > 1 and len(new):
            self.is_met[user[again], slot[again]] = True
            is_met = self.is_met[unknown[:, None], slots[new]]
            self.is_met[user[again], slot[again]] = False
            turn = later_rivals(unknown * self.sketch.num_slots + rows.slot[new])
            way = oldest_way(np.where(is_met, NEWEST, held[new][..., PLACE]), turn)
            has_room = turn < level.ways - is_met.sum(1)
            slot[new] += way
            enters = new[has_room]
            if self.traces is not None and level.feature is None:
                unknown = self._recall(rows, new)
                self._leave(user[new], np.where(has_room[:, None], held[new, way], entry[new]))
        old, old_decayed = self.entries[user[again], slot[again]], self.decayed[user[again], slot[again]]
        if self.preceding is not None and level.feature is None:
            self._precede(rows, again, slot, np.concatenate([again, enters]))
        entry[again, COUNT] += old[:, COUNT]
        decayed[again] += old_decayed * self._left(entry[again, SECOND].astype(np.int64) - old[:, SECOND])
        written = np.concatenate([again, enters])
        self.entries[user[written], slot[written]] = entry[written]
        self.decayed[user[written], slot[written]] = decayed[written]
        return unknown

    def _recall(self, rows: Rows, new: np.ndarray) -> np.ndarray:
        """Add what traces know of new rows to them, and take those out; returns the users of rows that have none."""
        assert self.traces is not None
        (traces, words, marks), user = self.traces, rows.user[new]
        num_events, key = (column.astype(np.int64) for column in (self.clock[user, 0], rows.entry[new, KEY]))
        found, count, second = traces.take(words, marks, user, num_events, key)
        row = new[found]
        left = self._left(rows.entry[row, SECOND].astype(np.int64) - second)
        rows.entry[row, COUNT] += count.astype(np.int32)
        rows.decayed[row] += left * count[:, None].astype(left.dtype)
        is_unknown = np.ones(len(new), bool)
        is_unknown[found] = False
        return user[is_unknown]

    def _precede(self, rows: Rows, again: np.ndarray, slot: np.ndarray, written: np.ndarray) -> None:
        """Put the predecessors of a step's rows into their slots, before what entries met ``again`` have; rows' counts
        are still of the segment alone. """  # fmt: skip
        assert self.preceding is not None
        assert self.newest is not None
        user, kept = rows.user, rows.preceding
        kept = np.where(kept == UNKNOWN, self.newest[user], kept)
        num_kept = kept.shape[1]
        num_own = np.minimum(rows.entry[again, COUNT], num_kept)[:, None]
        both = np.concatenate([kept[again], self.preceding[user[again], slot[again]]], 1)
        place = np.arange(num_kept)
        kept[again] = np.take_along_axis(both, np.where(place < num_own, place, num_kept + place - num_own), 1)
        self.preceding[user[written], slot[written]] = kept[written]

    def _leave(self, user: np.ndarray, entry: np.ndarray) -> None:
        """Entries (n, 4) of users (n,) that find or keep no room become traces; free slots, of key 0, do not."""
        assert self.traces is not None
        traces, words, _ = self.traces
        some = entry[:, KEY] > 0
        user, (key, count, place) = user[some], entry[some, :SECOND].T.astype(np.int64)
        traces.put(words, user, self.clock[user, 0].astype(np.int64), key, count, place)

    def _left(self, age_s: np.ndarray) -> np.ndarray:
        """2^(-age / half-life) of ages (n,), (n, F): what ``Sketch.left`` says of tensors."""
        steps = (np.maximum(age_s, 0)[:, None] * self.steps_per_s).astype(np.int64)
        whole, coarse, fine = self.left_of
        mask = 2**DECAY_BITS - 1
        left = whole[np.minimum(steps >> (2 * DECAY_BITS), MAX_HALVINGS)]
        return (left * (coarse[(steps >> DECAY_BITS) & mask] * fine[steps & mask])).astype(self.decayed.dtype)
