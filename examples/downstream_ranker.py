"""A ranker that is not ours, with and without our summaries: does its user's long history help it?

    python examples/downstream_ranker.py                    some minutes: a world, a summarizer, two rankers x 3 seeds
    python examples/downstream_ranker.py --data DATA --run RUN      your own prepared data and trained model

The ranker is a plain DCN-v2 (Wang et al., 2021): embeddings of user, item and category, cross layers beside an MLP.
Plugged into it is one block of target attention: the candidate attends to the tokens that `vista export` wrote, joined
by `SummaryFeatures` so that no impression sees its own future. It never sees an event, nor the model that made the
tokens. Everything else is the same in both, so the difference of their NE over seeds is what the tokens are worth.
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


class CrossLayer(nn.Module):
    """x0 * (W x + b) + x, of DCN-v2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        return x0 * self.linear(x) + x


class TargetAttention(nn.Module):
    """The plugged-in block: a candidate (n, d) attends to its user's tokens (n, K, D)."""

    def __init__(self, width: int, token_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, WIDTH)
        self.key, self.value = nn.Linear(token_width, WIDTH), nn.Linear(token_width, WIDTH)

    def forward(self, candidate: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = self.query(candidate), self.key(tokens), self.value(tokens)
        weight = torch.softmax((k @ q[:, :, None]).squeeze(-1) / WIDTH**0.5, dim=-1)
        read = (weight[:, None, :] @ v).squeeze(1)
        return torch.cat([read, read * q], -1)


class Ranker(nn.Module):
    """DCN-v2 on user, item and category; with tokens where ``token_width`` is not 0."""

    def __init__(self, num_users: int, num_items: int, num_categories: int, token_width: int) -> None:
        super().__init__()
        self.user, self.item, self.category = (
            nn.Embedding(size, WIDTH // 2) for size in (num_users, num_items, num_categories)
        )
        for table in (self.user, self.item, self.category):
            nn.init.normal_(table.weight, std=0.05)
        self.attention = TargetAttention(WIDTH, token_width) if token_width else None
        width = 3 * WIDTH // 2 + (2 * WIDTH if token_width else 0)
        self.crosses = nn.ModuleList(CrossLayer(width) for _ in range(2))
        self.deep = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(width + 32, 1)

    def forward(self, user: Tensor, item: Tensor, category: Tensor, tokens: Tensor | None) -> Tensor:
        candidate = torch.cat([self.item(item), self.category(category)], -1)
        x = torch.cat([self.user(user), candidate], -1)
        if self.attention is not None and tokens is not None:
            x = torch.cat([x, self.attention(candidate, tokens)], -1)
        crossed = x
        for cross in self.crosses:
            crossed = cross(x, crossed)
        return self.head(torch.cat([crossed, self.deep(x)], -1)).squeeze(-1)


@dataclass(frozen=True)
class Shown:
    """The impressions of a split, one row each, with the joined summaries of their requests."""

    user: np.ndarray
    item: np.ndarray
    category: np.ndarray
    label: np.ndarray
    request: np.ndarray
    joined: JoinedSummaries

    @classmethod
    def of(cls, data: PreparedData, split: str, features: SummaryFeatures) -> Shown:
        shown, items = data.impressions(split), data.catalogue
        request = np.repeat(np.arange(shown.num_requests), np.diff(shown.offsets))
        has_category = items.features is not None and items.features.shape[1]
        category = items.features[shown.item, 0] if has_category else np.zeros(len(shown.item), np.int64)
        joined = features.join(data.user_ids[shown.user], shown.timestamp_us, shown.num_known)
        return cls(shown.user[request], np.asarray(shown.item), category, shown.label[:, 0], request, joined)

    def score(self, model: Ranker, rows: np.ndarray) -> Tensor:
        columns = [torch.from_numpy(column[rows].astype(np.int64)) for column in (self.user, self.item, self.category)]
        tokens = None
        if model.attention is not None:
            tokens = torch.from_numpy(self.joined[self.request[rows]]["tokens"])
        return model(*columns, tokens)


def fit(train: Shown, validation: Shown, model: Ranker, seed: int, epochs: int) -> None:
    """Adam; the weights of the epoch that was best on the validation split."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    rng = np.random.default_rng(seed)
    best, kept = float("inf"), {}
    for _ in range(epochs):
        order = rng.permutation(len(train.label))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            label = torch.from_numpy(train.label[rows].astype(np.float32))
            loss = nn.functional.binary_cross_entropy_with_logits(train.score(model, rows), label)
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
    rows = np.arange(len(shown.label))
    logits = torch.cat([shown.score(model, rows[start : start + 4096]) for start in rows[::4096]]).double()
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
    categories = int(max(shown.category.max() for shown in (train, validation, test))) + 1
    sizes = (len(data.user_ids), data.catalogue.num_indices, categories)
    results: dict[str, list[tuple[float, float]]] = {"without tokens": [], "with tokens": []}
    for seed in range(seeds):
        for name, found in results.items():
            torch.manual_seed(seed)
            model = Ranker(*sizes, features.facts.width if name == "with tokens" else 0)
            fit(train, validation, model, seed, epochs)
            found.append(measure(test, model))
            print(f"seed {seed}, {name:14}  NE {found[-1][0]:.4f}  AUC {found[-1][1]:.4f}", flush=True)
    without, with_tokens = (np.array(found) for found in results.values())
    for column, metric in enumerate(("NE", "AUC")):
        gain = with_tokens[:, column] - without[:, column]
        error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else float("nan")
        print(f"{metric}: {without[:, column].mean():.4f} without, {with_tokens[:, column].mean():.4f} with tokens; "
              f"paired difference {gain.mean():+.4f} ± {error:.4f} (standard error of {len(gain)} seeds)")  # fmt: skip


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
