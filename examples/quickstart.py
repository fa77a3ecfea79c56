"""From an event log to ranked candidates in Python: the calls behind the commands.

    python examples/quickstart.py

Writes its own small log, and everything else, into a temporary folder.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import polars as pl

import vista


def write_log(path: Path, num_users: int = 60, events_per_user: int = 200) -> None:
    """Everyone has three favourite items among fifty, and views them half of the time."""
    rng = np.random.default_rng(0)
    favourites = rng.integers(0, 50, (num_users, 3))
    picks = favourites[:, rng.integers(0, 3, events_per_user)]
    is_favourite = rng.random(picks.shape) < 0.5
    items = np.where(is_favourite, picks, rng.integers(0, 50, picks.shape))
    times = 1_700_000_000 + np.cumsum(rng.integers(60, 7_200, picks.shape), axis=1)
    users = np.repeat(np.arange(num_users), events_per_user)
    columns = {"user_id": users, "item_id": items.ravel(), "timestamp": times.ravel()}
    pl.DataFrame(columns).with_columns(action=pl.lit("view")).write_parquet(path)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        log, data, run, store = (str(Path(folder) / name) for name in ("events.parquet", "data", "run", "store"))
        write_log(Path(log))
        manifest = vista.prepare(log, data)
        print(f"{manifest.statistics['num_users']} users, {manifest.statistics['num_events']} events")
        trained = vista.train(data, run, size="tiny", max_steps=60, quiet=True)
        print(
            f"model version {trained.version}, tokens {trained.config.model.num_seeds} x {trained.config.model.width}"
        )
        metrics = vista.evaluate(run, data, quiet=True).metrics["next"]
        print(f"test NE {metrics['ne']:.3f}, AUC {metrics['auc']:.3f}")
        vista.summarize(run, data, store, quiet=True)
        answer = vista.rank(run, store, user=7, candidates=[1, 2, 3, 4])
        for item, score in sorted(zip(answer["candidates"], answer["scores"], strict=True), key=lambda pair: -pair[1]):
            print(f"item {item}: {score:.3f}")


if __name__ == "__main__":
    main()
