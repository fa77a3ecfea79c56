"""Requests made from the event log itself, where no log of impressions was kept.

A *burst* (events of one user at one time, or with one burst value) is one request, at the time of its first event. That
event's item is the positive; the burst's other items are neither candidates nor known history. Negatives come from what
had happened by then (`vista.data.negatives`), so everything is as it could have been at that time. A positive that
nobody had met before could not have been a negative either, and would give itself away; such bursts make no request.

Shape letters: R requests, V items, U users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vista.data.arrays import chunk_bounds
from vista.data.negatives import (
    BurstItems,
    FirstMeetings,
    NumNegatives,
    OwnItems,
    Sources,
    draw_negatives,
    shuffle_keys,
)
from vista.data.sort import Chunk, SortedLog
from vista.data.split import RequestTable, mix, request_keys
from vista.progress import Progress
from vista.schema import SOURCES

TASK = "next"
CHUNK_ROWS = 200_000  # requests and items of their bursts that are worked on at a time


@dataclass(frozen=True)
class MadeRules:
    """num_negatives: wanted per request, by source. max_requests: a uniform sample of at most so many.

    new_items: no candidate, the positive neither, is one that the user had met.
    """

    num_negatives: NumNegatives
    max_requests: int
    seed: int
    new_items: bool = False


@dataclass(frozen=True)
class Bursts:
    """Requests to be, sorted by place of their first event, all (R,). first, end: the burst's events in the log."""

    user: np.ndarray
    timestamp_us: np.ndarray
    num_known: np.ndarray
    positive: np.ndarray
    first: np.ndarray
    end: np.ndarray
    key: np.ndarray

    def take(self, rows: np.ndarray | slice) -> Bursts:
        return Bursts(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    @classmethod
    def join(cls, parts: list[Bursts]) -> Bursts:
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in cls.__dataclass_fields__))


@dataclass
class Skipped:
    """Bursts that made no request, and why."""

    unseen_positive: int = 0
    met_positive: int = 0
    over_max_requests: int = 0
    without_negative: int = 0


def make_requests(
    log: SortedLog, user_hash: np.ndarray, category: np.ndarray | None, num_items: int, rules: MadeRules
) -> tuple[RequestTable, Skipped]:
    """Requests and their candidates from the histories.

    user_hash: (U,) uint64 hash of each user's id. category: (V,) int32 per item, 0 = unknown, or None: no categories.
    """
    skipped = Skipped()
    met = FirstMeetings.build(log, OwnItems.build(log), num_items) if rules.new_items else None
    bursts = find_bursts(log, user_hash, num_items, rules, skipped, met)
    sources = Sources.of(log, category, rules.num_negatives, met)
    parts = []
    sizes = 1 + bursts.end - bursts.first
    with Progress("prepare: candidates", total=len(bursts.user), unit="requests") as progress:
        for first, end in chunk_bounds(sizes, CHUNK_ROWS):
            part = bursts.take(slice(first, end))
            parts.append(_candidates(part, BurstItems.read(log, part, num_items), sources, rules))
            progress.advance(end - first)
    return _assemble(bursts, parts, skipped), skipped


def find_bursts(
    log: SortedLog, user_hash: np.ndarray, num_items: int, rules: MadeRules, skipped: Skipped,
    met: FirstMeetings | None,
) -> Bursts:  # fmt: skip
    """The bursts that make a request; a uniform sample of them where there are more than ``max_requests``.

    The sample keeps those with the smallest hash of their key. met: with it, none whose positive the user had met.
    """
    first_seen_us = log.first_seen_us(num_items)
    kept: list[Bursts] = []
    num_found = num_kept = 0
    for chunk in log.chunks():
        found = _bursts_of(chunk, user_hash, first_seen_us, skipped)
        if met is not None:
            was_met = met.were_before(found, np.arange(len(found.user)), found.positive)
            skipped.met_positive += int(was_met.sum())
            found = found.take(~was_met)
        kept.append(found)
        num_found += len(found.user)
        num_kept += len(found.user)
        if num_kept > 2 * rules.max_requests:
            kept = [_sample(Bursts.join(kept), rules)]
            num_kept = len(kept[0].user)
    bursts = _sample(Bursts.join(kept), rules)
    skipped.over_max_requests = num_found - len(bursts.user)
    return bursts


def _sample(bursts: Bursts, rules: MadeRules) -> Bursts:
    if len(bursts.user) <= rules.max_requests:
        return bursts
    chosen = np.argpartition(mix(bursts.key, rules.seed), rules.max_requests)[: rules.max_requests]
    return bursts.take(np.sort(chosen))


def _bursts_of(chunk: Chunk, user_hash: np.ndarray, first_seen_us: np.ndarray, skipped: Skipped) -> Bursts:
    """The chunk's bursts whose positive somebody had met strictly before."""
    num_events = len(chunk.item)
    lengths = np.diff(chunk.offsets)
    user = np.repeat(np.arange(chunk.first_user, chunk.end_user, dtype=np.int32), lengths)
    place = np.arange(num_events)
    is_later = np.ones(num_events, bool)  # than the event before it
    is_later[1:] = chunk.timestamp_us[1:] != chunk.timestamp_us[:-1]
    is_later[chunk.offsets[:-1][lengths > 0]] = True
    moment_start = np.maximum.accumulate(np.where(is_later, place, 0))

    # a burst ends where the next begins or its user ends; events cut off from their burst's first belong to none
    starts = np.flatnonzero(chunk.is_burst_start)
    user_end = chunk.offsets[user[starts] - chunk.first_user + 1]
    ends = np.minimum(np.append(starts[1:], num_events), user_end)
    is_fair = first_seen_us[chunk.item[starts]] < chunk.timestamp_us[starts]
    skipped.unseen_positive += int((~is_fair).sum())
    starts, ends = starts[is_fair], ends[is_fair]
    known = moment_start[starts] - chunk.offsets[user[starts] - chunk.first_user]
    time_us = chunk.timestamp_us[starts]
    key = request_keys(user_hash[user[starts]], time_us, starts - moment_start[starts])
    return Bursts(
        user[starts], time_us, known, chunk.item[starts], starts + chunk.first_event, ends + chunk.first_event, key
    )


@dataclass(frozen=True)
class Candidates:
    """Of some requests, flat: how many each has (R,), and per candidate its item and source."""

    counts: np.ndarray
    item: np.ndarray
    source: np.ndarray


def _candidates(bursts: Bursts, burst_items: BurstItems, sources: Sources, rules: MadeRules) -> Candidates:
    """The positive and its negatives, in random order."""
    source = np.append(SOURCES.index("positive"), sources.of_slot).astype(np.int8)
    item = np.column_stack([bursts.positive, draw_negatives(bursts, burst_items, sources, rules.seed)])
    shuffled = shuffle_keys(bursts.key, item.shape[1], rules.seed)
    shuffled[item < 0] = 2.0  # behind all draws
    order = np.argsort(shuffled, axis=1)
    item, source = np.take_along_axis(item, order, 1), source[order]
    return Candidates((item >= 0).sum(1), item[item >= 0], source[item >= 0])


def _assemble(bursts: Bursts, parts: list[Candidates], skipped: Skipped) -> RequestTable:
    """All requests that have a negative, with their candidates."""
    none = Candidates(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int8))
    counts, item, source = (
        np.concatenate([getattr(p, n) for p in [*parts, none]]) for n in ("counts", "item", "source")
    )
    positive = SOURCES.index("positive")
    table = RequestTable(
        bursts.user, bursts.timestamp_us, bursts.num_known, np.concatenate([[0], np.cumsum(counts)]), item,
        (source == positive).astype(np.int8)[:, None], source, np.zeros((len(item), 0), np.float32),
    )  # fmt: skip
    skipped.without_negative = int((counts < 2).sum())
    return table.take(np.flatnonzero(counts >= 2)) if skipped.without_negative else table
