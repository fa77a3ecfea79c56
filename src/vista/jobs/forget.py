"""`vista forget`: events removed from prepared data and from all that a store holds of them, killed or not.

1. the changed files of the data are written beside the old ones              nothing has happened yet
2. the journal is written into the data folder: whose events, which store     from here on it will be done
3. the files are swapped                                                       (`vista.data.forget` has 1 to 3)
4. in every model version, the users' records are made anew from what is left of their histories, or deleted
5. the store is compacted: no byte of the old records stays in its files
6. histories and records are compared with what a history gives that never had the events; the runs' popularity is
   made anew
7. the journal is removed

Steps 3 to 7 can be done again from any point, and are, by the next call: the journal holds all they need.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vista.checkpoint import Run
from vista.data import forget as prepared
from vista.data.forget import Selection
from vista.data.histories import Histories, PreparedData
from vista.data.prepare import verify
from vista.errors import ConfigError, DataError, RecordError, StoreError
from vista.jobs.fold import summarize_users
from vista.jobs.summarize import refresh_popularity
from vista.progress import Progress
from vista.schema import Manifest
from vista.store.contract import SummaryStore, Write, open_store
from vista.store.record import KINDS, encode, unpack, user_key

DEFAULT_CODEC = "int8"  # of a record that is damaged and does not say its own
Codecs = dict[str, dict[str, str]]  # model version -> user -> codec of the user's records


@dataclass(frozen=True)
class ForgetReport:
    """What was removed from the data, and what became of the records of the users in the store.

    num_rebuilt, num_deleted: pairs of user and model version. num_bytes_freed: of the store's files. was_pending: an
    earlier call had begun it. num_completed: forgettings of other events that had been begun before, completed first.
    """

    num_events: int
    num_requests: int
    num_impressions: int
    num_rebuilt: int
    num_deleted: int
    num_bytes_freed: int
    was_pending: bool = False
    num_completed: int = 0


@dataclass(frozen=True)
class Models:
    """The runs that records can be made anew with, by model version. deletes_others: delete those of other versions."""

    runs: dict[str, Run]
    deletes_others: bool

    def check(self, data: PreparedData) -> None:
        """Raise CheckpointError where a run does not match the data, or has nothing to store."""
        for run in self.runs.values():
            run.check_data(data.manifest, data.catalogue, data.folder)
            assert run.sequence_model is not None

    def check_cover(self, codecs: Codecs, histories: dict[str, Histories], store: str) -> None:
        """Raise ConfigError where records are to be made anew and their run was not given."""
        lacking = {
            version: [user for user in users if histories[user].num_events] for version, users in codecs.items()
            if version not in self.runs
        }  # fmt: skip
        lacking = {version: users for version, users in lacking.items() if users}
        if lacking and not self.deletes_others:
            raise ConfigError(
                f"{store}: model version {', '.join(lacking)} holds records of user {_some(lacking)}, to be made anew "
                "from the events that are left, and its run was not given; name its run folder too, or add "
                "--delete-others to delete these records (the users are a cold start there until vista summarize)"
            )


def _some(users_of: dict[str, list[str]]) -> str:
    users = sorted({user for users in users_of.values() for user in users})
    return ", ".join(users[:3]) + (" and others" if len(users) > 3 else "")


@dataclass(frozen=True)
class Journal:
    """What is being forgotten, as the data folder keeps it until that is complete.

    histories: SHA-256 of what is left of each user's history; codecs: of the records the store held when it began.
    """

    selection: Selection
    store: str
    histories: dict[str, str]
    codecs: Codecs
    num_events: int = 0
    num_requests: int = 0
    num_impressions: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Journal:
        values = json.loads(text)
        selection = values.pop("selection")
        return cls(Selection(**{**selection, "users": tuple(selection["users"])}), **values)

    def is_for(self, selection: Selection, store: str) -> bool:
        return (str(self.selection), self.store) == (str(selection), store)


def forget(
    folder: Path, store: str, selection: Selection, runs: Sequence[Run] = (), delete_others: bool = False,
    quiet: bool = False,
) -> ForgetReport:  # fmt: skip
    """Remove the selected events from the prepared data in ``folder`` and from the store at a URL, and check that.

    Completes first what an earlier call began and did not end. A user that neither knows has nothing to be removed.
    Raises ConfigError for a model version without its run, CheckpointError for a run that does not match the data,
    DataError for an item that cannot be told apart and where no event would be left, StoreError where the result is
    not what it has to be.
    """
    Manifest.read(folder)
    models, store = Models({run.version: run for run in runs}, delete_others), absolute_url(store)
    num_completed = 0
    with prepared.alone(folder):
        text = prepared.pending(folder)
        if text is not None:
            journal = Journal.from_json(text)
            report = _complete(folder, journal, models, quiet, was_pending=True)
            if journal.is_for(selection, store):
                return report
            num_completed = 1
        journal = _begin(folder, store, selection, models, quiet)
        report = _complete(folder, journal, models, quiet)
    return ForgetReport(**{**asdict(report), "num_completed": num_completed})


def absolute_url(url: str) -> str:
    """A store's URL that means the same in every working directory."""
    scheme, colon, path = url.partition(":")
    if not colon or "/" in scheme:
        return os.path.abspath(url)
    return f"lmdb:{os.path.abspath(path)}" if scheme == "lmdb" else url


def _begin(folder: Path, store_url: str, selection: Selection, models: Models, quiet: bool) -> Journal:
    """Steps 1 and 2, after all checks: what is refused has changed nothing."""
    data = PreparedData.open(folder)
    models.check(data)
    removal = prepared.find_removal(data, selection)
    item = selection.item_index(data)
    left = {
        str(user): prepared.without(prepared.user_history(data.histories, data.user_index(user)), selection, item)
        for user in selection.users
    }
    with open_store(store_url, read_only=True) as store:
        codecs = stored_codecs(store, list(left))
    strangers = [user for user in left if data.user_index(user) is None and any(user in u for u in codecs.values())]
    if strangers and not selection.everything:
        raise DataError(
            f"{folder}: does not know user {strangers[0]}, of whom {store_url} holds records; give the data they were "
            "made from, or delete them with --all"
        )
    models.check_cover(codecs, left, store_url)
    journal = Journal(
        selection, store_url, {user: prepared.digest(history) for user, history in left.items()}, codecs,
        len(removal.events), removal.num_requests, removal.num_impressions,
    )  # fmt: skip
    try:
        prepared.write_changed(data, removal, quiet)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"nothing was changed in {folder} and {store_url}") from None
    prepared.begin(folder, journal.to_json())
    return journal


def stored_codecs(store: SummaryStore, users: Sequence[str]) -> Codecs:
    """In each version, the users of whom there is any record, and the codec of theirs."""
    codecs: Codecs = {}
    keys = [user_key(user) for user in users]
    for info in store.versions():
        found = zip(*(store.get_many(kind, keys, info.version) for kind in KINDS), strict=True)
        for user, blobs in zip(users, found, strict=True):
            blob = next((blob for blob in blobs if blob is not None), None)
            if blob is not None:
                codecs.setdefault(info.version, {})[user] = _codec(blob)
    return codecs


def _codec(blob: bytes) -> str:
    try:
        return unpack(blob).codec
    except RecordError:
        return DEFAULT_CODEC


def _complete(folder: Path, journal: Journal, models: Models, quiet: bool, was_pending: bool = False) -> ForgetReport:
    """Steps 3 to 7, from whatever point they had come to."""
    try:
        prepared.swap(folder)
        data = PreparedData(folder, Manifest.read(folder), is_changing=True)
        if was_pending:
            verify(folder, data.manifest)
        models.check(data)
        left = _histories_left(data, journal)
        with open_store(journal.store) as store:
            found = stored_codecs(store, list(left))
            codecs = {v.version: found.get(v.version, {}) | journal.codecs.get(v.version, {}) for v in store.versions()}
            models.check_cover(codecs, left, journal.store)
            num_rebuilt, num_deleted = _rebuild(data, store, codecs, left, models, quiet)
            num_bytes = store.compact()
            _compare(store, codecs, left, models)
        for run in models.runs.values():
            refresh_popularity(run, data)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"forgetting has begun ({journal.selection}) and is not complete; run it again: no other command reads "
            f"{folder} until then"
        ) from None
    prepared.end(folder)
    return ForgetReport(
        journal.num_events, journal.num_requests, journal.num_impressions, num_rebuilt, num_deleted, num_bytes,
        was_pending,
    )  # fmt: skip


def _histories_left(data: PreparedData, journal: Journal) -> dict[str, Histories]:
    """The users' histories in the changed data. Raises DataError for one that is not what was to be left."""
    left = {user: prepared.user_history(data.histories, data.user_index(user)) for user in journal.histories}
    for user, history in left.items():
        if prepared.digest(history) != journal.histories[user]:
            raise DataError(
                f"{data.folder}: the history of user {user} is not what it was without the events ({journal.selection})"
                "; the files were changed by something else: prepare the data again, without these events"
            )
    return left


def _rebuild(
    data: PreparedData, store: SummaryStore, codecs: Codecs, left: dict[str, Histories], models: Models, quiet: bool
) -> tuple[int, int]:
    """Make the users' records anew in all versions; how many users and versions were rebuilt, and how many deleted."""
    num_rebuilt = num_deleted = 0
    total = sum(left[user].num_events for users in codecs.values() for user in users)
    with Progress("forget: store", total=total, unit="events", quiet=quiet) as progress:
        for version, users in codecs.items():
            for user, codec in users.items():
                key, index, run = user_key(user), data.user_index(user), models.runs.get(version)
                if index is None or run is None or not left[user].num_events:
                    store.delete(key, version)
                    num_deleted += 1
                else:
                    if store.get_many("border", [key], version) != [None]:
                        store.delete(key, version)
                    store.commit(_records(run, data.histories, index, user, codec), version)
                    num_rebuilt += 1
                progress.advance(left[user].num_events)
    return num_rebuilt, num_deleted


def _records(run: Run, histories: Histories, index: int, user: str, codec: str) -> list[Write]:
    """One user's records, read alone: what others a block holds changes the rounding of matrix products."""
    ids = np.array([user], object)
    records = summarize_users(run.sequence_model, histories, np.array([index]), ids, run.version)
    return [(r.kind, r.user_key, encode(r, codec)) for r in records]


def _compare(store: SummaryStore, codecs: Codecs, left: dict[str, Histories], models: Models) -> None:
    """Raise StoreError where records are not those of a history, here in memory, that never had the events."""
    for version, users in codecs.items():
        for user, codec in users.items():
            run, wanted = models.runs.get(version), dict.fromkeys(KINDS)
            if run is not None and left[user].num_events:
                wanted |= {kind: blob for kind, _, blob in _records(run, left[user], 0, user, codec)}
            found = {kind: store.get_many(kind, [user_key(user)], version)[0] for kind in KINDS}
            if found != wanted:
                raise StoreError(
                    f"user {user}, model version {version}: the stored records are not those of a history without the "
                    "events; did another process write to the store? Stop it, then run vista forget again"
                )
