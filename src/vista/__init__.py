"""VISTA: a user's whole history as a few hundred summary tokens, kept up to date, stored, and ranked from.

    import vista

    vista.prepare("events.parquet", "DATA")           # an event log to histories and impressions
    vista.train("DATA", "RUN", size="tiny")            # a model
    run = vista.load("RUN")                            # run.summarizer, run.ranker, run.config
    vista.summarize("RUN", "DATA", "STORE")            # every user's tokens into a store
    vista.stream("RUN", "dir:LOG", "STORE", until_end=True)  # events since then, from a log, each exactly once
    vista.export("RUN", "DATA", "SUMMARIES")           # summaries as of the past, to train other models from
    vista.rank("RUN", "STORE", user=7, candidates=[1, 2, 3])
    vista.forget("DATA", "STORE", [7], ["RUN"], item=3)  # as if user 7 had never met item 3

Each call does what the command of the same name does; see vista.api for the arguments.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("vista-recsys")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "evaluate",
    "export",
    "export_model",
    "forget",
    "load",
    "plan",
    "prepare",
    "rank",
    "stream",
    "stream_status",
    "summarize",
    "train",
]

if TYPE_CHECKING:
    from vista.api import (
        evaluate,
        export,
        export_model,
        forget,
        load,
        plan,
        prepare,
        rank,
        stream,
        stream_status,
        summarize,
        train,
    )


def __getattr__(name: str) -> Any:
    # torch and polars take seconds to import: only when something is used
    if name in __all__:
        from vista import api

        return getattr(api, name)
    raise AttributeError(f"module 'vista' has no attribute {name!r}")
