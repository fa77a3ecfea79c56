"""A ranker that is not ours, with and without our summaries: does its user's long history help it?

    python examples/downstream_ranker.py                    ten minutes: a world, a summarizer, four rankers x 3 seeds
    python examples/downstream_ranker.py --data DATA --run RUN      your own prepared data and trained model

The ranker is a plain DCN-v2 (Wang et al., 2021): embeddings of user, item and category, cross layers beside an MLP.
Plugged into it is one block of target attention: the candidate attends to the tokens that `vista export` wrote, joined
by `SummaryFeatures` so that no impression sees its own future; to what a ranker has without us, the user's newest
events before the impression; to both, each with a block of its own; or to nothing. It never sees the model that made
the tokens. Everything else is the same, so differences of NE over seeds are what the tokens are worth.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import vista
from vista.data import SummaryFeatures
from vista.data.features import JoinedSummaries
from vista.data.histories import PreparedData
from vista.data.worlds import WorldOptions, write_world

WIDTH, BATCH, LEARNING_RATE = 32, 512, 2e-3
WEIGHT_DECAY = 1e-4
RECENT_EVENTS = 64
READS = ((), ("recent events",), ("tokens",), ("recent events", "tokens"))  # what the rankers attend to


class CrossLayer(nn.Module):
    """x0 * (W x + b) + x, of DCN-v2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        return x0 * self.linear(x) + x


class TargetAttention(nn.Module):
    """The plugged-in block: a candidate (n, d) attends to its user's rows (n, K, D); is_there (n, K), None for all."""

    def __init__(self, width: int, row_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, WIDTH)
        self.key, self.value = nn.Linear(row_width, WIDTH), nn.Linear(row_width, WIDTH)

    def forward(self, candidate: Tensor, rows: Tensor, is_there: Tensor | None = None) -> Tensor:
        q, k, v = self.query(candidate), self.key(rows), self.value(rows)
        logit = (k @ q[:, :, None]).squeeze(-1) / WIDTH**0.5
        if is_there is not None:
            logit = logit.masked_fill(~is_there, -1e9)
        read = (torch.softmax(logit, dim=-1)[:, None, :] @ v).squeeze(1)
        return torch.cat([read, read * q], -1)


@dataclass(frozen=True)
class Sizes:
    """How many there are of each, and the width of a summary token."""

    users: int
    items: int
    categories: int
    actions: int
    token_width: int


@dataclass(frozen=True)
class Batch:
    """n impressions: user, item, category (n,); per impression the newest events (n, R) and the tokens (n, K, D)."""

    user: Tensor
    item: Tensor
    category: Tensor
    recent: tuple[Tensor, Tensor, Tensor]  # item (0 where there is none), category, action
    tokens: Tensor | None


class Ranker(nn.Module):
    """DCN-v2 on user, item and category, and on what is read of the user: names of READS."""

    def __init__(self, sizes: Sizes, reads: tuple[str, ...]) -> None:
        super().__init__()
        tables = (nn.Embedding(n, WIDTH // 2) for n in (sizes.users, sizes.items, sizes.categories, sizes.actions))
        self.user, self.item, self.category, self.action = tables
        for table in (self.user, self.item, self.category, self.action):
            nn.init.normal_(table.weight, std=0.05)
        row_widths = {"recent events": 3 * WIDTH // 2, "tokens": sizes.token_width}
        self.blocks = nn.ModuleDict({name: TargetAttention(WIDTH, row_widths[name]) for name in reads})
        width = 3 * WIDTH // 2 + 2 * WIDTH * len(reads)
        self.crosses = nn.ModuleList(CrossLayer(width) for _ in range(2))
        self.deep = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(width + 32, 1)

    def forward(self, batch: Batch) -> Tensor:
        candidate = torch.cat([self.item(batch.item), self.category(batch.category)], -1)
        parts = [self.user(batch.user), candidate]
        if "recent events" in self.blocks:
            item, category, action = batch.recent
            rows = torch.cat([self.item(item), self.category(category), self.action(action)], -1)
            parts.append(self.blocks["recent events"](candidate, rows, item > 0))
        if "tokens" in self.blocks:
            parts.append(self.blocks["tokens"](candidate, batch.tokens))
        x = torch.cat(parts, -1)
        crossed = x
        for cross in self.crosses:
            crossed = cross(x, crossed)
        return self.head(torch.cat([crossed, self.deep(x)], -1)).squeeze(-1)


@dataclass(frozen=True)
class Shown:
    """The impressions of a split, one row each, with the joined summaries of their requests."""

    data: PreparedData
    user: np.ndarray
    item: np.ndarray
    label: np.ndarray
    request: np.ndarray
    num_known: np.ndarray
    joined: JoinedSummaries

    @classmethod
    def of(cls, data: PreparedData, split: str, features: SummaryFeatures) -> Shown:
        shown = data.impressions(split)
        request = np.repeat(np.arange(shown.num_requests), np.diff(shown.offsets))
        joined = features.join(data.user_ids[shown.user], shown.timestamp_us, shown.num_known)
        num_known = np.asarray(shown.num_known)[request]
        return cls(data, shown.user[request], np.asarray(shown.item), shown.label[:, 0], request, num_known, joined)

    def batch(self, rows: np.ndarray, reads: tuple[str, ...]) -> Batch:
        user, item, category = (
            torch.from_numpy(column.astype(np.int64))
            for column in (self.user[rows], self.item[rows], category_of(self.data, self.item[rows]))
        )
        tokens = torch.from_numpy(self.joined[self.request[rows]]["tokens"]) if "tokens" in reads else None
        return Batch(user, item, category, self._recent(rows), tokens)

    def _recent(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """The newest events before each impression."""
        log = self.data.histories
        start = np.asarray(log.offsets)[self.user[rows]][:, None]
        place = start + self.num_known[rows][:, None] - RECENT_EVENTS + np.arange(RECENT_EVENTS)
        is_there, place = place >= start, np.maximum(place, start)
        item, action = log.item[place] * is_there, log.action[place] * is_there
        item, category, action = (
            torch.from_numpy(column.astype(np.int64)) for column in (item, category_of(self.data, item), action)
        )
        return item, category, action


def category_of(data: PreparedData, item: np.ndarray) -> np.ndarray:
    """The first feature of items, 0 where they have none."""
    features = data.catalogue.features
    return features[item, 0] if features is not None and features.shape[1] else np.zeros(item.shape, np.int64)


def fit(train: Shown, validation: Shown, model: Ranker, seed: int, epochs: int) -> None:
    """Adam; the weights of the epoch that was best on the validation split."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    rng, reads = np.random.default_rng(seed), tuple(model.blocks)
    best, kept = float("inf"), {}
    for _ in range(epochs):
        order = rng.permutation(len(train.label))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            label = torch.from_numpy(train.label[rows].astype(np.float32))
            loss = nn.functional.binary_cross_entropy_with_logits(model(train.batch(rows, reads)), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ne = measure(validation, model)[0]
        if ne < best:
            best, kept = ne, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)


@torch.no_grad()
def measure(shown: Shown, model: Ranker) -> tuple[float, float]:
    """NE and AUC."""
    rows, reads = np.arange(len(shown.label)), tuple(model.blocks)
    logits = torch.cat([model(shown.batch(rows[start : start + 4096], reads)) for start in rows[::4096]]).double()
    label = torch.from_numpy(shown.label.astype(np.float64))
    mean = label.mean()
    always_mean = -(mean * mean.log() + (1 - mean) * (1 - mean).log())
    loss = nn.functional.binary_cross_entropy_with_logits(logits, label)
    _, place, ties = logits.unique(return_inverse=True, return_counts=True)
    rank = (ties.cumsum(0) - (ties - 1) / 2)[place]  # tied scores share their mean rank
    positives = label.sum()
    auc = (rank[label > 0].sum() - positives * (positives + 1) / 2) / (positives * (len(label) - positives))
    return float(loss / always_mean), float(auc)


def compare(data: PreparedData, features: SummaryFeatures, seeds: int, epochs: int) -> None:
    train, validation, test = (Shown.of(data, split, features) for split in ("train", "validation", "test"))
    stale = ", ".join(f"{name} {value:.3g}" for name, value in test.joined.staleness().items())
    print(f"{len(train.label):,} impressions to train on, {len(test.label):,} to test; summaries: {stale}", flush=True)
    log, items = data.histories, data.catalogue
    categories = int(category_of(data, np.arange(items.num_indices)).max()) + 1
    sizes = Sizes(len(data.user_ids), items.num_indices, categories, int(log.action.max()) + 1, features.facts.width)
    results: dict[str, list[tuple[float, float]]] = {" and ".join(reads) or "ids alone": [] for reads in READS}
    for seed in range(seeds):
        for reads, (name, found) in zip(READS, results.items(), strict=True):
            torch.manual_seed(seed)
            model = Ranker(sizes, reads)
            fit(train, validation, model, seed, epochs)
            found.append(measure(test, model))
            print(f"seed {seed}, {name:24}  NE {found[-1][0]:.4f}  AUC {found[-1][1]:.4f}", flush=True)
    tell({name: np.array(found) for name, found in results.items()})


def tell(results: dict[str, np.ndarray]) -> None:
    """results: (seeds, 2) NE and AUC by ranker. Means, and what tokens change, paired by seed."""
    for name, found in results.items():
        print(f"{name:24}  NE {found[:, 0].mean():.4f}  AUC {found[:, 1].mean():.4f}")
    for without, with_tokens in (("ids alone", "tokens"), ("recent events", "recent events and tokens")):
        gain = results[with_tokens] - results[without]
        error = gain.std(axis=0, ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else np.full(2, np.nan)
        changes = (f"{m} {gain[:, c].mean():+.4f} ± {error[c]:.4f}" for c, m in enumerate(("NE", "AUC")))
        print(f"tokens beside {without}: {', '.join(changes)} (standard error of {len(gain)} paired seeds)")


def make_world(folder: Path, users: int, steps: int) -> tuple[Path, Path]:
    """The world of `vista demo` and a summarizer for it: a data folder and a run."""
    write_world("lifelong", folder / "world", WorldOptions(users=users, requests=128))
    events, items, impressions = (str(folder / "world" / f"{n}.parquet") for n in ("events", "items", "impressions"))
    vista.prepare(events, folder / "data", items=items, impressions=impressions)
    run = vista.train(folder / "data", folder / "run", size="tiny", max_steps=steps, num_seeds=64, max_epochs=1000)
    print(f"summarizer of {steps} steps, version {run.version}: its own ranker has", end=" ", flush=True)
    metrics = vista.evaluate(folder / "run", folder / "data", quiet=True).metrics["click"]
    print(f"NE {metrics['ne']:.4f}, AUC {metrics['auc']:.4f}", flush=True)
    return folder / "data", folder / "run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="prepared data, instead of a synthetic world")
    parser.add_argument("--run", type=Path, help="a vista model trained on it")
    parser.add_argument("--users", type=int, default=350, help="of the world")
    parser.add_argument("--steps", type=int, default=800, help="of training the summarizer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="of the rankers, at most")
    arguments = parser.parse_args()
    if (arguments.data is None) != (arguments.run is None):
        parser.error("--data and --run belong together")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.data is None:
            arguments.data, arguments.run = make_world(Path(folder), arguments.users, arguments.steps)
        summaries = Path(folder) / "summaries"
        vista.export(arguments.run, arguments.data, summaries, codec="float16", quiet=True)
        data = PreparedData.open(arguments.data)
        compare(data, SummaryFeatures.open(summaries), arguments.seeds, arguments.epochs)


if __name__ == "__main__":
    main()
