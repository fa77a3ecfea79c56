"""Training of a next-item model: resumable to the bit, stopped by validation, the best epoch kept.

    FOLDER/model.safetensors      the weights of the best validation NDCG@10
    FOLDER/training.safetensors   all that going on needs: weights, optimizer, place, learning curve
    FOLDER/log.jsonl              the learning curve, one line per epoch

Whatever is random in a step (dropout, items drawn) comes from the seed and the number of the step, and the order of
users from the seed and the epoch: there is no state of a random generator to be kept.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vista.benchmark.leave_one_out.entries import NextItemConfig
from vista.benchmark.leave_one_out.ranking import by_model, rank_all
from vista.benchmark.leave_one_out.split import LeaveOneOut, Part
from vista.checkpoint import load_weights, read_tensors, write_tensors, write_text
from vista.data.sequences import Sequences
from vista.errors import TrainingError
from vista.evaluation.metrics import Metrics
from vista.models.losses import sampled_softmax
from vista.models.next_item import NextItemModel, make_next_item_model
from vista.progress import Progress
from vista.training.state import pack_optimizers, stop_on_interrupt, under, unpack_optimizers

CHOSEN_BY = "ndcg@10"
PAIRS_AT_ONCE = {"cpu": 32 * 200 * 200, "cuda": 4096 * 200 * 200}  # of events of one user: what a pass holds in memory
STEPS_OF_A_SEED = 2**32


@dataclass
class Place:
    """Where training stands. curve: one record per epoch; sum, count: of the losses of the epoch under way."""

    step: int = 0
    elapsed_s: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def best(self) -> dict[str, float]:
        """The record of the best epoch."""
        return max(self.curve, key=lambda record: record[CHOSEN_BY])

    @property
    def epochs_without_gain(self) -> int:
        return len(self.curve) - int(self.best["epoch"]) if self.curve else 0


class NextItemTrainer:
    """A model, its optimizer and its place in the data."""

    def __init__(self, sequences: Sequences, config: NextItemConfig, folder: Path, device: str = "cpu") -> None:
        self.config, self.folder, self.device = config, folder, device
        reads = config.model.history_events if config.model.kind in ("sasrec", "hstu") else None
        self.split = LeaveOneOut(sequences, config.train.length, reads)
        torch.manual_seed(config.train.seed)
        self.model: NextItemModel = make_next_item_model(config.model, sequences.num_items).to(device)
        settings = config.train
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=settings.learning_rate,
            betas=(0.9, settings.second_beta), weight_decay=settings.weight_decay,
        )  # fmt: skip
        self.place = Place()
        self.steps_per_epoch = math.ceil(sequences.num_users / settings.users_per_step)
        self.restore()

    def is_over(self) -> bool:
        """Whether the last epoch is done, or validation has not gained for long enough."""
        settings = self.config.train
        return len(self.place.curve) >= settings.max_epochs or self.place.epochs_without_gain >= settings.patience

    def run(self, quiet: bool = False) -> None:
        """Train to the end. Ctrl-C ends after the step under way, with a checkpoint."""
        total, saved_s = self.config.train.max_epochs * self.steps_per_epoch, time.monotonic()
        progress = Progress("train", total=total, unit="steps", quiet=quiet, done=self.place.step)
        with progress, stop_on_interrupt() as interrupted:
            while not self.is_over():
                started = time.monotonic()
                self.train_step()
                progress.advance(1)
                if self.place.step % self.steps_per_epoch == 0:
                    progress.update(**self.end_epoch())
                self.place.elapsed_s += time.monotonic() - started
                if self.is_over() or interrupted() or time.monotonic() - saved_s > self.config.train.checkpoint_every_s:
                    self.save()
                    saved_s = time.monotonic()
                if interrupted():
                    raise KeyboardInterrupt(f"checkpoint of step {self.place.step} kept in {self.folder}")

    def train_step(self) -> None:
        """One optimizer step on the next users."""
        settings, place = self.config.train, self.place
        torch.manual_seed(settings.seed * STEPS_OF_A_SEED + place.step)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        users = self._users()
        count = int(np.minimum(self.split.num_read(users, "train"), settings.length).sum())
        loss = sum((self._backward(part, count) for part in self._parts(users)), 0.0)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {place.step + 1}: lower train.learning_rate ({settings.learning_rate}); "
                f"the best weights so far are in {self.folder}"
            )
        self.optimizer.step()
        place.step += 1
        place.loss_sum += loss
        place.loss_count += 1

    def end_epoch(self) -> dict[str, float]:
        """Validate, note the epoch, keep the weights if they are the best; what progress shows of it."""
        place = self.place
        loss = place.loss_sum / place.loss_count
        place.loss_sum, place.loss_count = 0.0, 0
        record = {"epoch": len(place.curve) + 1, "loss": loss, **self.measure("validation")}
        place.curve.append(record)
        if place.best is record:
            facts = {"epoch": record["epoch"], CHOSEN_BY: record[CHOSEN_BY]}
            write_tensors(self.folder / "model.safetensors", self.weights(), facts)
        write_text(self.folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in place.curve))
        return {"epoch": len(place.curve), "loss": loss, "hr@10": record["hr@10"], "ndcg@10": record["ndcg@10"]}

    def measure(self, part: Part) -> Metrics:
        """The full ranking of a part, with the weights as they are."""
        self.model.eval()
        return rank_all(self.split, part, by_model(self.split, part, self.model, self.device), quiet=True)

    def measure_best(self) -> Metrics:
        """The full ranking of the test part, with the weights of the best epoch."""
        path = self.folder / "model.safetensors"
        load_weights(self.model, self._with_buffers(read_tensors(path)[0]), path)
        return self.measure("test")

    def weights(self) -> dict[str, Tensor]:
        """Parameters by name, a shared one once: the event embedding belongs to two stages."""
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def save(self) -> None:
        """Write all that going on needs, in one atomic step."""
        tensors = {f"model.{name}": t for name, t in self.weights().items()} | pack_optimizers([self.optimizer])
        write_tensors(self.folder / "training.safetensors", tensors, vars(self.place))

    def restore(self) -> None:
        """Go on from ``training.safetensors``, where it is there."""
        path = self.folder / "training.safetensors"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            return
        tensors, facts = read_tensors(path)
        self.place = Place(**facts)
        load_weights(self.model, self._with_buffers(under("model.", tensors)), path)
        unpack_optimizers([self.optimizer], tensors)

    def _with_buffers(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The names under which a shared parameter stands as well, which ``load_weights`` asks for."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        every = self.model.named_parameters(remove_duplicate=False)
        return {name: weights[names[id(p)]] for name, p in every if names[id(p)] in weights}

    def _users(self) -> np.ndarray:
        """Of the step that comes next."""
        settings = self.config.train
        epoch, step = divmod(self.place.step, self.steps_per_epoch)
        order = np.random.default_rng([settings.seed, epoch]).permutation(self.split.sequences.num_users)
        return order[step * settings.users_per_step :][: settings.users_per_step]

    def _parts(self, users: np.ndarray) -> Iterator[np.ndarray]:
        """Users of like length together, as many as fit into memory at once: little padding, and the same gradient."""
        lengths = self.split.num_read(users, "train")
        order = np.argsort(-lengths, kind="stable")
        users, lengths = users[order], np.minimum(lengths[order], self.config.train.length)
        most = PAIRS_AT_ONCE["cuda" if self.device.startswith("cuda") else "cpu"]
        start = 0
        while start < len(users) and lengths[start]:
            size = max(1, most // int(lengths[start]) ** 2)
            yield users[start : start + size]
            start += size

    def _backward(self, users: np.ndarray, count: int) -> float:
        """Add the gradient of some users' share of the loss, which is the mean over ``count`` positions."""
        settings = self.config.train
        batch, target = self.split.batch(users, "train")
        query = self.model(batch.to(self.device))
        shape = (len(target), settings.negatives)
        drawn = torch.randint(1, self.split.sequences.num_items + 1, shape, device=self.device)
        loss = (
            sampled_softmax(query, self.model.item_vectors(), target.to(self.device), drawn, settings.temperature)
            / count
        )
        loss.backward()
        return float(loss.detach())


def load_curve(folder: Path) -> list[dict[str, Any]]:
    """The learning curve of a run so far; nothing where there is none yet."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
