"""A stream as a process of its own: ``python -m tests.jobs.stream_worker SOURCE STORE DEAD OPTIONS-AS-JSON``.

Its run is the small model of tests/updates/test_apply.py, which follows from a seed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from tests.updates.test_apply import RUN
from vista.jobs.pending import Cadence
from vista.jobs.sources.contract import open_source
from vista.jobs.stream import Stream, StreamOptions, StreamReport, stopped_by_signals
from vista.models.borders import Spacing
from vista.store.contract import open_store
from vista.updates.apply import UpdateOptions


def stream(source: str, store: str, dead: Path, borders: bool = False, **options) -> StreamReport:
    """Stream with the small model; options as StreamOptions has them."""
    update = UpdateOptions(spacing=Spacing() if borders else None)
    if "cadence" in options and isinstance(options["cadence"], dict):
        options["cadence"] = Cadence(**options["cadence"])
    wanted = StreamOptions(dead_letters=dead, begin=True, update=update, **{"quiet": True} | options)
    with open_source(source) as log, open_store(store) as opened:
        made = Stream(RUN, opened, log, wanted)
        with stopped_by_signals(made):
            return made.go()


def start(source: str, store: str, dead: Path, **options) -> subprocess.Popen[str]:
    words = [sys.executable, "-W", "ignore", "-m", "tests.jobs.stream_worker", source, store, str(dead)]
    return subprocess.Popen(
        [*words, json.dumps(options)], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    source, store, dead, options = sys.argv[1:]
    print("begins", flush=True)
    print(stream(source, store, Path(dead), **json.loads(options)).counts, flush=True)
