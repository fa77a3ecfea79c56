"""Longer than trained: a model trained on histories of one length, evaluated on histories of other lengths.

    python bench/length.py [--train-events 2000] [--lengths 2000 8000 32000 128000] [--seeds 0 1 2] [--out FOLDER]

The default world is *lifelong*: lifelong favourites, recent taste and old likes. What it asks about is as likely at any
length, and shares of the history, not counts, decide; recent events alone cannot tell most of it, as the control
`recent` shows. Every length has the same number of users and requests, and is prepared with the catalogue of the run,
as a service does with the events of a new day.

Prints NE and AUC of the test split at each length (mean and standard error over seeds), for each model, and draws
them. With --out a call that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from vista.checkpoint import Run, load_run
from vista.config import resolve
from vista.data.histories import PreparedData
from vista.data.prepare import PrepareOptions, prepare
from vista.data.worlds import WorldOptions, write_world
from vista.evaluation.evaluate import evaluate
from vista.training.loop import train

TASK = "click"
TEST_SHARE = 0.2


def make_data(
    folder: Path, events: int, arguments: argparse.Namespace, run: Run | None
) -> tuple[PreparedData, dict[str, float]]:
    """The world at one length, prepared for ``run`` or anew, and the best NE of all events and of the recent ones."""
    users = arguments.train_users if run is None else arguments.users
    settings = dict(pair.split("=", 1) for pair in arguments.world_set)
    options = WorldOptions(users=users, events=events, requests=arguments.requests, settings=settings)
    described = write_world(arguments.world, folder / "world", options)
    tables = {name: str(folder / "world" / f"{name}.parquet") for name in ("events", "items", "impressions")}
    rules = PrepareOptions(
        tables["events"], tables["items"], tables["impressions"], test_fraction=TEST_SHARE,
        catalogue=None if run is None else str(run.folder),
    )  # fmt: skip
    prepare(rules, folder / "data")
    scores = described["tasks"][TASK]
    best = {"best_ne": scores["best"]["ne"], "recent_only_ne": scores["recent_only_best"]["ne"]}
    return PreparedData.open(folder / "data"), best


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row per model, seed and length; rows that an earlier call with these settings has written are kept."""
    trained_on, _ = make_data(folder / "train", arguments.train_events, arguments, None)
    rows = earlier_rows(arguments)
    prepared: dict[int, tuple[PreparedData, dict[str, float]]] = {}
    for model in arguments.models:
        for seed in arguments.seeds:
            if {r["events"] for r in rows if (r["model"], r["seed"]) == (model, seed)} >= set(arguments.lengths):
                continue
            config = resolve("tiny", overrides=overrides(model, seed, arguments))
            run = load_run(train(trained_on, folder / f"{model}-{seed}", config))
            for length in arguments.lengths:
                if length not in prepared:
                    prepared[length] = make_data(folder / str(length), length, arguments, run)
                data, best = prepared[length]
                metrics = evaluate(run, data).metrics[TASK]
                rows.append({"model": model, "seed": seed, "events": length, **best,
                             "ne": metrics["ne"], "auc": metrics["auc"]})  # fmt: skip
                print(f"{model:>6} seed {seed} {length:>8,} events: NE {metrics['ne']:.4f}, "
                      f"AUC {metrics['auc']:.4f}", flush=True)  # fmt: skip
            save(rows, arguments)
    return rows


def described(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that rows depend on."""
    left_out = {"out", "models", "seeds", "lengths", "threads"}
    return {name: value for name, value in vars(arguments).items() if name not in left_out}


def earlier_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    path = None if arguments.out is None else arguments.out / "length.json"
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    return found["rows"] if found["settings"] == described(arguments) else []


def save(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"settings": described(arguments), "rows": rows}, indent=1) + "\n"
        (arguments.out / "length.json").write_text(text)


def overrides(model: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    named = {"model.model": "recent"} if model == "recent" else {"model.memory": model}
    given = dict(pair.split("=", 1) for pair in arguments.set)
    return {**named, "train.seed": seed, "train.max_steps": arguments.steps, "train.max_epochs": 1000,
            "train.validate_every_steps": 200, "train.patience": 100} | given  # fmt: skip


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: one row per length, NE and AUC of each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = ["| events | best NE | best from recent events | " + "".join(f"{m}: NE | {m}: AUC |" for m in models),
             "|---" * (3 + 2 * len(models)) + "|"]  # fmt: skip
    for length in dict.fromkeys(row["events"] for row in rows):
        cells = []
        for model in models:
            mine = [row for row in rows if row["model"] == model and row["events"] == length]
            for metric in ("ne", "auc"):
                mean, error = spread([row[metric] for row in mine])
                cells.append(f"{mean:.4f} ± {error:.4f}")
        one = next(row for row in rows if row["events"] == length)
        lines.append(f"| {length:,} | {one['best_ne']:.4f} | {one['recent_only_ne']:.4f} | " + " | ".join(cells) + " |")
    return lines


def draw(rows: list[dict[str, Any]], train_events: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    lengths = list(dict.fromkeys(row["events"] for row in rows))
    for model in dict.fromkeys(row["model"] for row in rows):
        points = [spread([r["ne"] for r in rows if r["model"] == model and r["events"] == n]) for n in lengths]
        axes.errorbar(lengths, [p[0] for p in points], [p[1] for p in points], fmt="o-", capsize=3, label=model)
    for key, line, label in (
        ("recent_only_ne", "k:", "best from the last 128 events"),
        ("best_ne", "k--", "best possible"),
    ):
        axes.plot(lengths, [next(r[key] for r in rows if r["events"] == n) for n in lengths], line, label=label)
    axes.axvline(train_events, color="gray", linewidth=1, label="trained at")
    axes.set(xscale="log", xlabel="events in the history", ylabel="NE (1 = knows nothing)")
    axes.set_title("Longer than trained")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", default="lifelong")
    parser.add_argument("--world-set", nargs="*", default=[], help="settings of the world, as in touched=24")
    parser.add_argument("--train-events", type=int, default=2_000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2_000, 8_000])
    parser.add_argument("--users", type=int, default=60, help="at each length that is evaluated")
    parser.add_argument("--train-users", type=int, default=400)
    parser.add_argument("--requests", type=int, default=60, help="of each user")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--models", nargs="+", default=["slots", "recent"], help="a memory, or recent: no summary")
    parser.add_argument("--set", nargs="*", default=[], help="other settings, as in model.num_seeds=64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for length.json and length.png")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    print("\n" + "\n".join(table(rows)))
    if arguments.out is not None:
        draw(rows, arguments.train_events, arguments.out / "length.png")


if __name__ == "__main__":
    main()
