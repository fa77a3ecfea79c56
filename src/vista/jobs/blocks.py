"""Which users are folded together, and in which order: the plan of a bulk run, the same for every engine.

A plan follows from the lengths of the histories and from who is wanted, and from nothing else: what a block holds
changes how matrix products round, so plans that depended on the number of workers would give other bytes. Users of
like length share a block, and the longest histories come first: the end of a run is then many small blocks, which any
number of workers can share evenly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

USERS_AT_ONCE = 256  # of a block; a record of 64 x 64 tokens and its state are some 40 kilobytes
EVENTS_AT_ONCE = 131_072  # of a block, unless one history has more: a second or so of work, and lost when interrupted


@dataclass(frozen=True)
class Block:
    """Users that are folded and committed together: indices (B,) int64, ids (B,) and history lengths (B,) int64."""

    users: np.ndarray
    user_ids: np.ndarray
    lengths: np.ndarray

    @property
    def num_events(self) -> int:
        return int(self.lengths.sum())

    def only(self, rows: np.ndarray) -> Block:
        """Some of its users. rows: indices or a mask."""
        return Block(self.users[rows], self.user_ids[rows], self.lengths[rows])

    def one_by_one(self) -> list[Block]:
        """A block for each user."""
        return [self.only(np.array([row])) for row in range(len(self.users))]


def plan(lengths: np.ndarray, user_ids: np.ndarray, is_wanted: np.ndarray) -> list[Block]:
    """The blocks of the users that are wanted, longest histories first. All arguments (U,), by user index.

    Blocks are cut from all users; those all of whose users are wanted stay as they are, what is wanted of the others is
    cut anew. So a run that goes on after an interruption folds the very blocks that are missing, and gives the bytes
    that it would have given without; and a few users with new events here and there fill blocks together.
    """
    blocks = _cut(np.argsort(-lengths, kind="stable"), lengths)
    whole = [block for block in blocks if is_wanted[block].all()]
    others = [block[is_wanted[block]] for block in blocks if not is_wanted[block].all()]
    chosen = whole + (_cut(np.concatenate(others), lengths) if others else [])
    chosen.sort(key=lambda block: int(lengths[block[0]]), reverse=True)
    return [Block(block, user_ids[block], lengths[block]) for block in chosen]


def _cut(order: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Users in the given order, cut where a block would have too many users or events; never between no users."""
    before = np.concatenate([[0], np.cumsum(lengths[order])])
    cuts, start = [], 0
    while start < len(order):
        fitting = int(np.searchsorted(before, before[start] + EVENTS_AT_ONCE, "right")) - 1
        end = min(max(fitting, start + 1), start + USERS_AT_ONCE)
        cuts.append(order[start:end])
        start = end
    return cuts
