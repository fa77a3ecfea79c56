"""How many of the best items of the whole catalogue the first stage of `recommend` lets through, and what it saves.

    python bench/recommend.py RUN STORE [--k 10,100] [--users 100] [--seed 0] [--out FILE.json]

For each user the best k items by scoring every item stand beside the best k of those that the first stage chose, at
the same moment: recall is the share of the former among the latter. Scores are the same in both, so what is lost is
lost by the first stage. Processor time is taken per user, both ways in turn, and shown as a ratio. Users are drawn
from those the store holds; `seen` is what `exclude_seen` does: the items the state names may not be recommended, which
is the harder case.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vista.checkpoint import load_run
from vista.progress import Progress
from vista.serving.context import ContextReader
from vista.serving.deployment import Model
from vista.serving.options import Limits
from vista.serving.recommend import Recommended, Recommender
from vista.serving.requests import Filters, RecommendAsk
from vista.serving.scorer import Scorer, UserSummaries
from vista.store.contract import SummaryStore, open_store
from vista.store.record import unpack

HASHED = b"h:"  # keys that an id cannot be read from


def drawn_users(store: SummaryStore, version: str, count: int, seed: int) -> list[tuple[Any, int]]:
    """User ids and the time of the newest event of each. Raises SystemExit where no user can be drawn."""
    found = [(key, unpack(blob, version).as_of_us) for key, blob in store.scan("tokens", version)]
    known = [(key[2:].decode(), at_us) for key, at_us in found if not key.startswith(HASHED)]
    if not known:
        raise SystemExit(f"the store holds no user of version {version}; run: vista summarize")
    rng = np.random.default_rng(seed)
    return [known[place] for place in rng.permutation(len(known))[:count]]


def timed(recommender: Recommender, summaries: UserSummaries, ask: RecommendAsk) -> tuple[Recommended, float]:
    start = time.process_time()
    found = recommender.recommend(summaries, ask, recommender.choice(ask.filters), False, float("inf"))
    return found, time.process_time() - start


def measure(model: Model, users: list[tuple[Any, int]], ks: list[int], filters: Filters) -> dict[str, Any]:
    """Recall at each k (mean and standard error over users), share of the catalogue scored, and ratio of time."""
    limits = Limits()
    exact = Recommender(model, replace(limits, max_exact_items=sys.maxsize))
    staged = Recommender(model, replace(limits, max_exact_items=0))
    recall: dict[int, list[float]] = {k: [] for k in ks}
    scored, ratios = [], []
    with Progress("recommend", total=len(users), unit="users") as progress:
        for user, at_us in users:
            summaries = model.scorer.read([user])
            ask = RecommendAsk(user, max(ks), at_us + 1, filters)
            whole, whole_s = timed(exact, summaries, ask)
            some, some_s = timed(staged, summaries, ask)
            for k in ks:
                best = whole.index[:k]
                recall[k].append(float(np.isin(best, some.index[:k]).mean()) if len(best) else 1.0)
            scored.append(some.num_scored / max(whole.num_scored, 1))
            ratios.append(some_s / whole_s)
            progress.advance()
    return {
        "recall": {k: (float(np.mean(own)), float(np.std(own, ddof=1) / len(own) ** 0.5)) for k, own in recall.items()},
        "share_scored": float(np.median(scored)),
        "time_ratio": float(np.median(ratios[1:])),  # the first pays for what all share
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("store")
    parser.add_argument("--k", default="10,100")
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    run, ks = load_run(options.run), [int(k) for k in options.k.split(",")]
    with open_store(options.store, read_only=True) as store:
        model = Model(run, Scorer(run, store), ContextReader.of(run.schema))
        users = drawn_users(store, run.version, options.users, options.seed)
        found = {
            name: measure(model, users, ks, Filters(exclude_seen=name == "unseen only"))
            for name in ("all", "unseen only")
        }
    print(f"{run.catalogue.num_items:,} items, {len(users)} users")
    for name, row in found.items():
        recalls = "  ".join(f"recall@{k} {mean:.3f} ± {error:.3f}" for k, (mean, error) in row["recall"].items())
        print(f"{name:12} {recalls}  scored {row['share_scored']:.3f}  time {row['time_ratio']:.3f}")
    if options.out:
        options.out.write_text(json.dumps({"items": run.catalogue.num_items, "users": len(users), **found}, indent=2))
    return found


if __name__ == "__main__":
    main()
