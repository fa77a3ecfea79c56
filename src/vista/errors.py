"""Every error the package raises on purpose, as one tree.

    VistaError
    ├── DataError            an input file or prepared data that cannot be used
    │   ├── MissingColumn      a required column is not there
    │   └── StaleOutput        an output folder that is in the way, half-written or changed since it was written
    ├── ConfigError          a setting that is unknown, out of range or contradicts another
    ├── CheckpointError      a run folder that cannot be loaded, or does not match the data
    ├── TrainingError        training cannot go on: a loss that is not finite, a label that never varies
    ├── JobError             the processes of a bulk run cannot be started, or the cluster cannot be used
    ├── StoreError           the summary store cannot be opened, read or written
    │   ├── RecordError        one record is corrupt, too new, or belongs to another model version
    │   └── Superseded         another process has changed what a write was made for; nothing was written
    ├── SourceError          an event log cannot be opened or read
    └── RequestError         a request that the online server cannot answer as asked; has an HTTP status

Each message names the place (file, row, column, parameter, user), the value found there, and what to do about it.
The command line prints the message without a traceback and exits with ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VistaError(Exception):
    """Base of all errors raised on purpose by this package."""

    exit_code = 2


class DataError(VistaError):
    """An input file or a prepared data folder cannot be used."""


class MissingColumn(DataError):
    """A required column is not in the table."""


class StaleOutput(DataError):
    """An output folder is in the way, only half-written, or was changed after it was written."""


class ConfigError(VistaError):
    """A setting is unknown, out of range, or contradicts another setting."""


class CheckpointError(VistaError):
    """A run folder cannot be loaded, or does not match the data it is used with."""


class TrainingError(VistaError):
    """Training cannot go on."""


class JobError(VistaError):
    """The processes of a bulk run cannot be started, or the cluster they are to run on cannot be used."""


class StoreError(VistaError):
    """The summary store cannot be opened, read or written."""


class RecordError(StoreError):
    """One stored record is corrupt, too new for this reader, or belongs to another model version."""


class Superseded(StoreError):
    """A write that was to happen only as long as some records are what they were, and they are not: none of it was."""


class SourceError(VistaError):
    """An event log cannot be opened or read."""


class RequestError(VistaError):
    """A request the online server cannot answer as asked.

    status: of HTTP, from which that of gRPC follows; retry_after_s: when to ask again, where that can help.
    """

    def __init__(self, message: str, status: int = 400, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s


class VistaWarning(UserWarning):
    """Something works, but less well than it could; the message says what to change."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'user_id'?``, or the list of what is known when nothing is near."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is: {', '.join(sorted(known))}" if known else ""
