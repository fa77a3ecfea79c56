"""What each codec costs in NE and AUC, and saves in bytes: rate and distortion of stored tokens.

    python bench/codecs.py [--tokens 16 32 64] [--widths 32] [--seeds 0 1 2] [--steps 600] [--out FOLDER]

Makes the world of `vista demo`, trains one run per number of tokens K, width D and seed, and evaluates it on the test
split once per codec: all summary tokens go through records of that codec before the ranker reads them; nothing else
changes. Beside it: the same model with the tokens of a user without events, which is what losing all of a token would
cost. Bytes are those of the tokens record of a user with full recent events. Runs whose rows are in FOLDER already are
not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vista
from vista.benchmark.axes import changed_tokens, stored
from vista.checkpoint import Run
from vista.data.histories import PreparedData
from vista.data.worlds import WorldOptions, write_world
from vista.demo import SETTINGS, SIZE, WORLD, WORLD_OPTIONS
from vista.evaluation.evaluate import evaluate
from vista.records import to_records
from vista.store.record import CODECS, Record, encode, user_key

NOTHING = "no tokens"  # every user's are those of an empty history
Change = Callable[[Tensor], Tensor]


def prepare(folder: Path, world: WorldOptions) -> PreparedData:
    write_world(WORLD, folder / "world", world)
    events, items, impressions = (str(folder / "world" / f"{n}.parquet") for n in ("events", "items", "impressions"))
    vista.prepare(events, folder / "data", items=items, impressions=impressions)
    return PreparedData.open(folder / "data")


def changes(run: Run) -> dict[str, Change]:
    with torch.no_grad():
        empty = run.sequence_model.empty_summary(1)
    found: dict[str, Change] = {codec: lambda tokens, codec=codec: stored(tokens, codec) for codec in CODECS}
    return found | {NOTHING: lambda tokens: empty.expand_as(tokens)}


def bytes_per_user(run: Run) -> dict[str, int]:
    """Of the tokens record, by codec."""
    model = run.sequence_model
    record, _ = to_records(model, model.init_state(1), [1234567], run.version)
    recent = {name: np.zeros(run.config.model.recent_events, a.dtype) for name, a in record.arrays.items()
              if name.startswith("recent")}  # fmt: skip
    full = Record("tokens", run.version, user_key(1234567), 1, 1, record.arrays | recent)
    return {codec: len(encode(full, codec)) for codec in CODECS} | {NOTHING: 0}


def measure(
    folder: Path, data: PreparedData, num_tokens: int, width: int, seed: int, steps: int
) -> list[dict[str, Any]]:
    settings = {"num_seeds": num_tokens, "width": width, "seed": seed, "max_steps": steps}
    fixed = {name.split(".")[1]: value for name, value in SETTINGS.items()}
    run = vista.train(data.folder, folder / f"{num_tokens}-{width}-{seed}", SIZE, quiet=True, **(fixed | settings))
    task, size, rows = data.manifest.tasks[0], bytes_per_user(run), []
    for codec, change in changes(run).items():
        with changed_tokens(run, change):
            metrics = evaluate(run, data, quiet=True).metrics[task]
        rows.append({"tokens": num_tokens, "width": width, "seed": seed, "steps": steps, "codec": codec,
                     "bytes": size[codec], "ne": metrics["ne"], "auc": metrics["auc"]})  # fmt: skip
        exact = rows[0]
        print(f"K {num_tokens:4} D {width:4} seed {seed} {codec:10} {size[codec]:7,} bytes  NE {metrics['ne']:.5f} "
              f"({metrics['ne'] - exact['ne']:+.6f})  AUC {metrics['auc']:.5f} "
              f"({metrics['auc'] - exact['auc']:+.6f})", flush=True)  # fmt: skip
    return rows


def lost(rows: list[dict[str, Any]], codec: str, metric: str) -> list[float]:
    """What a codec changes in a metric, run by run, beside float32."""
    exact = {(r["tokens"], r["width"], r["seed"]): r[metric] for r in rows if r["codec"] == "float32"}
    return [r[metric] - exact[r["tokens"], r["width"], r["seed"]] for r in rows if r["codec"] == codec]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    total, difference = figure.subplots(1, 2)
    shapes = list(dict.fromkeys((r["tokens"], r["width"]) for r in rows))
    for k, d in shapes:
        mine = [r for r in rows if (r["tokens"], r["width"]) == (k, d)]
        size = {r["codec"]: r["bytes"] for r in mine}
        means = [np.mean([r["ne"] for r in mine if r["codec"] == codec]) for codec in CODECS]
        total.plot([size[codec] for codec in CODECS], means, "o-", label=f"K {k}, D {d}")
        changes = [max(np.mean(np.abs(lost(mine, codec, "ne"))), 1e-8) for codec in CODECS[1:]]
        difference.loglog([size[codec] for codec in CODECS[1:]], changes, "o", label=f"K {k}, D {d}")
        for codec, change in zip(CODECS[1:], changes, strict=True):
            difference.annotate(codec, (size[codec], change), fontsize=7)
    total.set(
        xlabel="bytes per user", ylabel="NE, mean of the seeds", title="float32 (right) to int8 (left)", xscale="log"
    )
    difference.set(xlabel="bytes per user", ylabel="abs(NE - NE of float32)", title="What the codec changes")
    for axes in (total, difference):
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--widths", type=int, nargs="+", default=[32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, help="folder for codecs.json and codecs.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = arguments.out and arguments.out / "codecs.json"
    rows = json.loads(file.read_text()) if file and file.exists() else []
    made = {tuple(row[name] for name in ("width", "tokens", "seed", "steps")) for row in rows}
    wanted = product(arguments.widths, arguments.tokens, arguments.seeds, [arguments.steps])
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(Path(folder), WORLD_OPTIONS)
        for width, num_tokens, seed, steps in (run for run in wanted if run not in made):
            rows += measure(Path(folder), data, num_tokens, width, seed, steps)
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(rows, indent=2) + "\n")
    for codec in (*CODECS[1:], NOTHING):
        worst = {metric: max(map(abs, lost(rows, codec, metric))) for metric in ("ne", "auc")}
        print(f"{codec:10} changes NE by at most {worst['ne']:.6f} and AUC by {worst['auc']:.6f} over all runs")
    if file:
        plot(rows, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
