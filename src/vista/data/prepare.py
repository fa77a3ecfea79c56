"""Event log -> prepared data: `vista prepare`. The steps, and the rules where a log leaves a choice.

1. open the log, check columns and times, list users, items and actions          (`vista.data.events`)
2. partition by user, sort each partition, drop duplicates, cut long histories   (`vista.data.sort`)
3. take requests from the impressions table, or make them from the events        (`vista.data.given`, `.impressions`)
4. split the requests by time; order the catalogue by frequency in training      (`vista.data.split`, `.items`)
5. write the arrays with item indices, the requests, the catalogue, and last the manifest with all checksums

Nothing at or after a request's time reaches what it is scored with: its history ends before it, its negatives are drawn
from what happened before it, and the catalogue knows of counts and embedding rows only what the training period knows.

Shape letters: U users, V items, N events, M impressions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from vista.catalogue import DEFAULT_UNKNOWN_BUCKETS, Catalogue, hash_ids
from vista.data.arrays import ArrayWriter, checksums, reporting_full_disk, save_array
from vista.data.events import Clock, EventColumns, EventLog, TimeRules, format_us
from vista.data.given import ImpressionTable
from vista.data.impressions import TASK, MadeRules, Skipped, make_requests
from vista.data.items import ItemFeatures, ItemTable, build_catalogue, category_name
from vista.data.negatives import NumNegatives
from vista.data.output import new_folder
from vista.data.sort import HistoryRules, Places, SortedLog, Vocabulary, sort_log
from vista.data.split import RequestTable, SplitRules, SplitTimes, save_splits
from vista.errors import ConfigError, DataError, StaleOutput
from vista.schema import SPLITS, ContextColumn, Manifest

DEFAULT_MAX_HISTORY = 1_000_000
EVENTS_PER_PARTITION = 5_000_000  # sorted in memory at a time: 0.5 GB


@dataclass(frozen=True)
class PrepareOptions:
    """Where the tables are, what their columns are called, and which rules hold: the options of ``vista prepare``.

    events, items, impressions    a Parquet or CSV file, a folder of them, or a glob
    user_column ... event_id_column    names in the event log; the first three hold for the other tables too
    time_unit                     s, ms, us or ns; None: inferred from the size of the numbers
    earliest, latest              times outside are refused; None for latest: ten years from now
    item_features                 columns of the items table to use; none named: all that can be features
    category_feature              the item feature that category negatives go by; None: the first
    tasks, context                columns of the impressions table; no task named: every 0/1 column
    max_history                   newest events kept of a longer history
    min_user_events               users with fewer are left out
    max_burst                     larger bursts are left out (None: none is)
    keep_duplicates               keep events that repeat an earlier one (same event id, or same item, time and action)
    popularity_negatives, category_negatives, history_negatives, max_requests    of requests made from events
    new_items                     ... none of whose candidates the user had met
    validation_fraction, test_fraction    shares of the requests, by time ...
    validation_from, test_from    ... or the first moments of these splits
    unknown_buckets               item indices for ids the catalogue does not hold
    catalogue                     a run or prepared data whose item and action indices are to be used, so that a model
                                  trained before can read this log; None: a new catalogue
    """

    events: str
    items: str | None = None
    impressions: str | None = None
    user_column: str = "user_id"
    item_column: str = "item_id"
    timestamp_column: str = "timestamp"
    action_column: str | None = None
    burst_column: str | None = None
    event_id_column: str | None = None
    time_unit: str | None = None
    earliest: str = TimeRules.earliest
    latest: str | None = None
    item_features: tuple[str, ...] = ()
    category_feature: str | None = None
    tasks: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    max_history: int = DEFAULT_MAX_HISTORY
    min_user_events: int = 1
    max_burst: int | None = None
    keep_duplicates: bool = False
    popularity_negatives: int = 4
    category_negatives: int = 4
    history_negatives: int = 0
    new_items: bool = False
    max_requests: int = 2_000_000
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    validation_from: str | None = None
    test_from: str | None = None
    unknown_buckets: int = DEFAULT_UNKNOWN_BUCKETS
    catalogue: str | None = None
    seed: int = 0
    events_per_partition: int = EVENTS_PER_PARTITION

    def __post_init__(self) -> None:
        least = {"max_history": 1, "min_user_events": 1, "max_burst": 1, "max_requests": 1, "unknown_buckets": 1,
                 "events_per_partition": 1, "popularity_negatives": 0, "category_negatives": 0,
                 "history_negatives": 0}  # fmt: skip
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ConfigError(f"{_option(name)} {value}: at least {smallest}")
        if self.impressions is None and (self.tasks or self.context):
            raise ConfigError("--task and --context name columns of the impressions table; give --impressions as well")
        if self.items is None and (self.item_features or self.category_feature):
            raise ConfigError("--item-feature and --category-feature name columns of the items table; give --items")
        wanted = self.popularity_negatives + self.category_negatives + self.history_negatives
        if self.impressions is None and not wanted:
            raise ConfigError("no negatives: a request needs a candidate beside its positive")
        if self.new_items and self.impressions is not None:
            raise ConfigError("--new-items is for requests made from events; leave out --impressions, or --new-items")
        if self.new_items and self.history_negatives:
            raise ConfigError(
                f"--new-items and --history-negatives {self.history_negatives}: those are items the user had met; "
                "leave one of the two out"
            )

    @property
    def columns(self) -> EventColumns:
        return EventColumns(
            self.user_column, self.item_column, self.timestamp_column, self.action_column, self.burst_column,
            self.event_id_column,
        )  # fmt: skip

    @property
    def time_rules(self) -> TimeRules:
        return TimeRules(self.time_unit, self.earliest, self.latest)

    @property
    def history_rules(self) -> HistoryRules:
        return HistoryRules(
            self.max_history, self.min_user_events, self.max_burst, self.keep_duplicates, self.events_per_partition
        )

    def split_rules(self, clock: Clock) -> SplitRules:
        """clock: that of the event log, in which numbers are understood. Raises ConfigError."""
        return SplitRules(
            self.validation_fraction, self.test_fraction,
            None if self.validation_from is None else clock.parse_us(self.validation_from, "--validation-from"),
            None if self.test_from is None else clock.parse_us(self.test_from, "--test-from"),
        )  # fmt: skip


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def prepare(options: PrepareOptions, out: Path) -> Manifest:
    """Prepare an event log as ``out``, which appears only when it is complete.

    Raises DataError and its kinds for what is wrong with the tables, ConfigError for what is wrong with the options,
    and StaleOutput when ``out`` is there and not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StaleOutput(f"{out} is there already: remove it, or choose another --out")
    known = None if options.catalogue is None else KnownIndices.load(Path(options.catalogue))
    log = EventLog.open(options.events, options.columns, options.time_rules)
    split_rules = options.split_rules(log.clock)
    tables = _Tables.read(options, log)
    survey = log.survey()
    actions = survey.actions if known is None else known.actions
    vocabulary = Vocabulary.union(
        [survey.users["user_id"], *tables.user_ids], [survey.items["item_id"], *tables.item_ids],
        action_index(survey.actions, actions),
    )  # fmt: skip
    with reporting_full_disk(out), new_folder(out) as folder:
        places = Places(folder / "events", folder / "scratch")
        places.scratch.mkdir()
        sorted_log = sort_log(log, survey, vocabulary, options.history_rules, places)
        if not sorted_log.num_events:
            raise DataError(
                f"{options.events}: no event is left after the rules ({sorted_log.cuts}); relax --min-user-events or "
                "--max-burst"
            )
        manifest = _write(folder, _Inputs(options, split_rules, log, tables, vocabulary, sorted_log, actions, known))
        shutil.rmtree(places.scratch)
        manifest.save(folder)
    return manifest


@dataclass(frozen=True)
class KnownIndices:
    """What items and actions are called in an earlier run or data folder."""

    catalogue: Catalogue
    actions: tuple[Any, ...]

    @classmethod
    def load(cls, folder: Path) -> KnownIndices:
        """From a run or a prepared data folder. Raises ConfigError for anything else."""
        for name in ("schema.json", "manifest.json"):
            if (folder / name).is_file():
                actions = json.loads((folder / name).read_text())["actions"]
                return cls(Catalogue.load(folder / "catalogue.safetensors"), tuple(actions))
        raise ConfigError(f"--catalogue {folder}: neither a run (schema.json) nor prepared data (manifest.json)")


def action_index(found: Sequence[Any], actions: Sequence[Any]) -> dict[Any, int]:
    """The action index of each value found in the log; 0 = not given, for one that is not among the actions.

    Compared as text, as everywhere: 1 and "1" are one action.
    """
    known = {str(value): index + 1 for index, value in enumerate(actions)}
    return {value: known.get(str(value), 0) for value in found}


@dataclass(frozen=True)
class _Tables:
    """The tables beside the event log, where there are any."""

    items: ItemTable | None
    shown: ImpressionTable | None

    @property
    def user_ids(self) -> list[pl.Series]:
        return [] if self.shown is None else [self.shown.user_id]

    @property
    def item_ids(self) -> list[pl.Series]:
        ids = [] if self.items is None else [self.items.ids]
        return ids if self.shown is None else [*ids, self.shown.item_id]

    @classmethod
    def read(cls, options: PrepareOptions, log: EventLog) -> _Tables:
        items = shown = None
        if options.items is not None:
            items = ItemTable.read(options.items, options.item_column, log.item_type, options.item_features)
            category_name(items.categories, options.category_feature)
        if options.impressions is not None:
            shown = ImpressionTable.read(options.impressions, log, options.time_rules, options.tasks, options.context)
        return cls(items, shown)


@dataclass(frozen=True)
class _Inputs:
    """Everything the last steps work from."""

    options: PrepareOptions
    split_rules: SplitRules
    log: EventLog
    tables: _Tables
    vocabulary: Vocabulary
    sorted_log: SortedLog
    actions: tuple[Any, ...]
    known: KnownIndices | None = None

    @property
    def num_items(self) -> int:
        return len(self.vocabulary.items)


def _write(folder: Path, inputs: _Inputs) -> Manifest:
    """Steps 3 to 5; the manifest, not written yet."""
    features, category = _features(inputs)
    requests, skipped = _requests(inputs, features.categories.get(category or ""))
    times = SplitTimes.choose(requests.timestamp_us, inputs.split_rules)
    split = times.of(requests.timestamp_us)
    if inputs.known is None and not (split == SPLITS.index("train")).any():
        raise DataError(
            f"{inputs.options.events}: no training request: all {requests.num_requests} are at or after "
            f"{format_us(times.validation_from_us)}, where validation begins; give a later --validation-from"
        )
    user_index, user_ids = _kept_users(inputs, requests)
    catalogue, item_index = _catalogue(inputs, requests, times, features)
    _write_items(folder / "events", inputs.sorted_log, item_index)
    lengths = inputs.sorted_log.lengths[user_index >= 0]
    save_array(folder / "events" / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    user_ids.to_frame("user_id").write_parquet(folder / "users.parquet")
    catalogue.save(folder / "catalogue.safetensors")
    counts = save_splits(requests, times, folder / "impressions", user_index, item_index)
    shown = inputs.tables.shown
    statistics = _statistics(inputs.sorted_log, lengths) | counts | asdict(skipped)
    statistics |= {"num_items": catalogue.num_items, "num_rows": catalogue.num_rows}
    written = [p for p in folder.rglob("*") if p.is_file() and "scratch" not in p.relative_to(folder).parts]
    return Manifest(
        tasks=(TASK,) if shown is None else shown.tasks,
        actions=inputs.actions,
        context=_context(inputs, times),
        validation_from_us=times.validation_from_us,
        test_from_us=times.test_from_us,
        statistics=statistics,
        options=_described(inputs, category),
        checksums=checksums(folder, written),
    )


def _features(inputs: _Inputs) -> tuple[ItemFeatures, str | None]:
    """The item features, and the name of the one that counts as category."""
    table = inputs.tables.items
    features = ItemFeatures()
    if table is not None:
        features = ItemFeatures.of(table, inputs.vocabulary.item_codes(table.ids), inputs.num_items)
    return features, category_name(features.categories, inputs.options.category_feature)


def _requests(inputs: _Inputs, category: np.ndarray | None) -> tuple[RequestTable, Skipped]:
    """Requests by codes: those of the impressions table, or made from the events."""
    options = inputs.options
    if inputs.tables.shown is not None:
        requests = inputs.tables.shown.requests(inputs.sorted_log, inputs.vocabulary)
        if options.min_user_events > 1:  # a user who is left out is left out everywhere
            requests = requests.take(np.flatnonzero(inputs.sorted_log.lengths[requests.user] > 0))
        if not requests.num_requests:
            raise DataError(f"{options.impressions}: no impression is left; relax --min-user-events")
        return requests, Skipped()
    wanted = NumNegatives(
        options.popularity_negatives, options.category_negatives if category is not None else 0,
        options.history_negatives,
    )  # fmt: skip
    rules = MadeRules(wanted, options.max_requests, options.seed, options.new_items)
    user_hash = hash_ids(_numpy_ids(inputs.vocabulary.users))
    requests, skipped = make_requests(inputs.sorted_log, user_hash, category, inputs.num_items, rules)
    if not requests.num_requests:
        raise DataError(
            f"{options.events}: no request could be made from {inputs.sorted_log.num_events} events ({skipped}); a "
            "request needs a next event whose item somebody had met before, and another item to compare it with"
        )
    return requests, skipped


def _numpy_ids(ids: pl.Series) -> np.ndarray:
    values = ids.to_numpy()
    return values if values.dtype.kind in "iu" else values.astype(object)


def _kept_users(inputs: _Inputs, requests: RequestTable) -> tuple[np.ndarray, pl.Series]:
    """The index of each user code, (U,) int64, -1 for users left out, and the ids of those who stay.

    Who has no event stays where there are requests to score: such users are real, and cold.
    """
    stays = inputs.sorted_log.lengths > 0
    stays[requests.user] = True
    index = np.where(stays, np.cumsum(stays) - 1, -1)
    return index, inputs.vocabulary.users.filter(pl.Series(stays))


def _catalogue(
    inputs: _Inputs, requests: RequestTable, times: SplitTimes, features: ItemFeatures
) -> tuple[Catalogue, np.ndarray]:
    """The catalogue, known or new, and the item index of each item code, (V,) int32."""
    if inputs.known is not None:
        return inputs.known.catalogue, inputs.known.catalogue.encode(_numpy_ids(inputs.vocabulary.items))
    counts = inputs.sorted_log.item_counts(inputs.num_items, times.validation_from_us)
    is_own = _known_in_training(inputs, requests, times)
    return build_catalogue(inputs.vocabulary.items, counts, is_own, features, inputs.options.unknown_buckets)


def _known_in_training(inputs: _Inputs, requests: RequestTable, times: SplitTimes) -> np.ndarray:
    """(V,) bool: items that were met or shown before validation begins."""
    known = inputs.sorted_log.first_seen_us(inputs.num_items) < times.validation_from_us
    shown_us = np.repeat(requests.timestamp_us, np.diff(requests.offsets))
    known[requests.item[shown_us < times.validation_from_us]] = True
    return known


def _write_items(events: Path, log: SortedLog, item_index: np.ndarray) -> None:
    """item.npy, from codes to item indices."""
    with ArrayWriter(events / "item.npy", np.int32) as writer:
        for chunk in log.chunks():
            writer.append(item_index[chunk.item])


def _context(inputs: _Inputs, times: SplitTimes) -> tuple[ContextColumn, ...]:
    shown = inputs.tables.shown
    return () if shown is None else shown.described_context(shown.timestamp_us < times.validation_from_us)


def _statistics(log: SortedLog, lengths: np.ndarray) -> dict[str, Any]:
    """What there is, and what the rules left out."""
    first, last = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    for chunk in log.chunks():
        first, last = min(first, int(chunk.timestamp_us.min())), max(last, int(chunk.timestamp_us.max()))
    cuts = log.cuts
    return {
        "num_users": len(lengths),
        "num_events": log.num_events,
        "longest_history": int(lengths.max()),
        "mean_history": round(float(lengths.mean()), 2),
        "median_history": float(np.median(lengths)),
        "first_timestamp_us": first,
        "last_timestamp_us": last,
        "num_duplicates_dropped": cuts.duplicates,
        "num_burst_events_dropped": cuts.burst_events,
        "num_short_users_dropped": cuts.short_users,
        "num_short_user_events_dropped": cuts.short_user_events,
        "num_users_cut": cuts.long_users,
        "num_events_cut": cuts.long_user_events,
    }


def _described(inputs: _Inputs, category: str | None) -> dict[str, Any]:
    """How it was prepared: the options, and what was found out."""
    tables = inputs.tables
    return asdict(inputs.options) | {
        "files": [table.path.name for table in inputs.log.tables],
        "timestamps": inputs.log.clock.statement,
        "has_actions": inputs.log.has_actions,
        "unknown_actions": [value for value, index in inputs.vocabulary.action_index.items() if index == 0],
        "category": category,
        "ignored_item_columns": {} if tables.items is None else tables.items.ignored,
        "unused_impression_columns": [] if tables.shown is None else list(tables.shown.unused),
    }


def verify(folder: Path, manifest: Manifest | None = None) -> Manifest:
    """Compare every file of a prepared data folder with its checksum. manifest: the folder's own, where it is known.

    Raises StaleOutput naming the first file that is missing or changed.
    """
    manifest = manifest or Manifest.load(folder)
    missing = [name for name in manifest.checksums if not (folder / name).is_file()]
    if missing:
        raise StaleOutput(f"{folder / missing[0]} is missing; prepare the data again")
    found = checksums(folder, [folder / name for name in manifest.checksums])
    for name, checksum in manifest.checksums.items():
        if found[name] != checksum:
            raise StaleOutput(f"{folder / name} was changed since it was written; prepare the data again")
    return manifest


def summary_lines(manifest: Manifest) -> list[str]:
    """What ``vista prepare`` says of the result."""
    have, options = manifest.statistics, manifest.options
    period = f"{format_us(have['first_timestamp_us'])} to {format_us(have['last_timestamp_us'])}"
    lines = [
        f"{have['num_events']:,} events of {have['num_users']:,} users, {have['num_items']:,} items, "
        f"{len(manifest.actions)} actions; {period}",
        f"timestamps: {options['timestamps']}",
        f"history length: mean {have['mean_history']:,.0f}, median {have['median_history']:,.0f}, "
        f"longest {have['longest_history']:,}",
    ]
    left_out = {
        "duplicates": have["num_duplicates_dropped"],
        f"events of bursts above {options['max_burst']}": have["num_burst_events_dropped"],
        f"events of users with fewer than {options['min_user_events']}": have["num_short_user_events_dropped"],
        f"oldest events of {have['num_users_cut']:,} histories above {options['max_history']:,}": have[
            "num_events_cut"
        ],
    }
    lines += [f"left out: {number:,} {what}" for what, number in left_out.items() if number]
    made = options["impressions"] is None
    lines.append(f"tasks: {', '.join(manifest.tasks)}" + (" (requests made from events)" if made else ""))
    for split, since in zip(SPLITS, (None, manifest.validation_from_us, manifest.test_from_us), strict=True):
        begins = "" if since is None else f", from {format_us(since)}"
        lines.append(
            f"{split}: {have['num_requests'][split]:,} requests, {have['num_impressions'][split]:,} impressions{begins}"
        )
    skipped = {"new to everybody": "unseen_positive", "met before": "met_positive",
               "over --max-requests": "over_max_requests", "without a negative": "without_negative"}  # fmt: skip
    reasons = [f"{have[name]:,} {what}" for what, name in skipped.items() if have[name]]
    if reasons:
        lines.append(f"next events that made no request: {', '.join(reasons)}")
    if options["unknown_actions"]:
        unknown = ", ".join(map(str, options["unknown_actions"]))
        lines.append(f"actions that {options['catalogue']} does not know, taken as not given: {unknown}")
    lines += [f"item column {name!r} is not used: {why}" for name, why in options["ignored_item_columns"].items()]
    if options["unused_impression_columns"]:
        unused = ", ".join(map(repr, options["unused_impression_columns"]))
        lines.append(f"impression columns {unused} are not used; name them with --context or --task")
    return lines
