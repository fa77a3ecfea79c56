"""The training loop: one readable pass, resumable to the bit (on one machine, with one number of threads).

Two optimizers: AdamW for dense weights, a sparse Adam for the item rows (only the rows a step touched move). The
learning rates warm up linearly and fall as a cosine to the last step, or to the end of the time budget if that comes
first.

A step is computed in portions: one after another, and, under ``torchrun``, in several processes at once. Their
gradients are added up, so that the step is the same but for rounding.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from vista.batches.feeds import make_feed, users_up_to
from vista.batches.plans import Feed
from vista.batches.portions import Portion, SharedStep, Sharer, ahead, share_out
from vista.batches.timelines import MemoryCarry, TimelineWalk
from vista.checkpoint import (
    ModelSchema,
    build_model,
    load_description,
    load_weights,
    read_tensors,
    start_run,
    write_in_parts,
    write_popularity,
    write_tensors,
    write_text,
)
from vista.config import Config, TrainConfig
from vista.data.histories import PreparedData
from vista.data.popularity import latest_table
from vista.devices import GENERATORS, device_of, generator_states, set_generators
from vista.errors import CheckpointError, ConfigError, StaleOutput, TrainingError
from vista.evaluation.metrics import normalized_entropy
from vista.evaluation.scoring import score
from vista.models.batch import Output
from vista.models.head import CountsEncoder
from vista.models.losses import multi_task_loss
from vista.progress import Progress
from vista.training.averaging import WeightAverage
from vista.training.processes import Processes, join_others
from vista.training.sharded import build_sharded, shards_of
from vista.training.state import pack_optimizers, stop_on_interrupt, under, unpack_optimizers

# What a run that is resumed may have otherwise than it began: how long it goes on, and what changes no step.
CHANGEABLE = (
    "max_steps", "max_epochs", "time_budget_s", "patience", "validate_every_steps", "checkpoint_every_s", "steps_ahead",
    "portions_per_step",
)  # fmt: skip
FACTS = ("log_loss", "reconstruction", "auxiliary_log_loss", "loss")  # of a step; a model need not have all


@dataclass
class Position:
    """Where training stands; saved with every checkpoint. data: fingerprint of the data in which that place is."""

    data: str = ""
    step: int = 0
    elapsed_s: float = 0.0
    best_ne: float = math.inf
    best_step: int = 0
    validations_without_gain: int = 0
    walk: dict[str, Any] | None = None


@dataclass
class Feeds:
    """The data of training and of validation."""

    train: Feed
    validation: Feed


def train(
    data: PreparedData,
    out: Path,
    config: Config,
    resume: bool = False,
    quiet: bool = False,
    shard_items: bool = False,
    device: torch.device | str = "cpu",
) -> Path:
    """Train a model on prepared data into the run folder ``out``; returns it.

    Ctrl-C ends after the step under way, with a checkpoint; ``resume`` goes on from the last one and gives the
    weights an uninterrupted run would have given (but for a time budget, which counts seconds), with another number of
    processes up to rounding; of its settings those in CHANGEABLE may be others. In the processes that torchrun starts,
    all must be called alike; the first one writes.
    shard_items: each of them holds a part of the item table only, which is built for CPUs. device: where this process
    computes (`vista.devices.chosen_device`); the run folder is the same, and another device may go on with it.
    Raises StaleOutput when ``out`` holds a run and ``resume`` is not set, TrainingError for labels that never vary and
    for a loss that is not finite.
    """
    check_labels(data)
    processes = join_others()
    trainer = _prepare(data, out, config, resume, processes, shard_items, torch.device(device))
    trainer.run(quiet or not processes.is_first)
    processes.collect(None)  # what the first one wrote is there for all of them
    return out


def _prepare(
    data: PreparedData, out: Path, config: Config, resume: bool, processes: Processes, shard_items: bool,
    device: torch.device,
) -> Trainer:  # fmt: skip
    """A trainer that is ready to run, from the beginning or from the run folder's checkpoint."""
    if shard_items and device.type != "cpu":
        raise ConfigError(f"--shard-items is built for CPUs, and the device is {device}; leave one of the two out")
    torch.manual_seed(config.train.seed)
    feeds, count_names = make_feeds(data, config)
    schema = ModelSchema.of(data.manifest, data.catalogue, count_names)
    if shard_items:
        model = build_sharded(config, schema, data.catalogue, processes)
    else:
        model = build_model(config.model, schema, data.catalogue)

    def begin() -> None:
        if resume:
            _check_run(out, config, schema)
            write_text(out / "config.json", config.to_json())
        elif (out / "config.json").exists():
            raise StaleOutput(f"{out} already holds a run; add --resume to go on with it, or choose another --out")
        else:
            start_run(out, config, schema, data.catalogue)
            if config.model.has_popularity:
                write_popularity(out, *latest_table(data))

    processes.first(begin)
    trainer = Trainer(model.to(device), feeds, config, out, processes)
    if resume:
        trainer.restore()
        if trainer.position.data != data.manifest.fingerprint:
            raise CheckpointError(
                f"{out}: {data.folder} was changed since it was started (vista forget, or prepared again), and its "
                "place in the data means nothing now: train anew"
            )
    else:
        trainer.measure_counts()
    trainer.position.data = data.manifest.fingerprint
    return trainer


def _check_run(out: Path, config: Config, schema: ModelSchema) -> None:
    """Raise CheckpointError where a run folder was started with other settings or on other data."""
    saved, saved_schema, _ = load_description(out)
    for part, free in (("model", ()), ("train", CHANGEABLE)):
        before, now = (asdict(getattr(whole, part)) for whole in (saved, config))
        for name in sorted(before.keys() - set(free)):
            if before[name] != now[name]:
                raise CheckpointError(
                    f"{out}: was started with {part}.{name} {before[name]!r}, and {now[name]!r} is asked for; resume "
                    f"with the same settings (only {', '.join(CHANGEABLE)} may change), or train into another --out"
                )
    if saved_schema != schema:
        raise CheckpointError(f"{out}: was started on other data, or another preparation of it; resume with that")


def check_labels(data: PreparedData) -> None:
    """Refuse what cannot be learned from: no training impressions, no validation, or a task with one label only."""
    for split in ("train", "validation"):
        label = data.impressions(split).label
        if not len(label):
            raise TrainingError(f"{data.folder}: the {split} split has no impressions; prepare with other split times")
        for task, mean in zip(data.manifest.tasks, label.mean(0).tolist(), strict=True):
            if mean in (0.0, 1.0):
                raise TrainingError(
                    f"{data.folder}: task {task!r} is {int(mean)} in all {len(label)} {split} impressions; "
                    "there is nothing to learn: check the label column, or drop the task"
                )


def make_feeds(data: PreparedData, config: Config) -> tuple[Feeds, tuple[str, ...]]:
    """Feeds of the train and validation splits, and the names of the count features if the model reads them."""
    train, names = make_feed(data, config, "train")
    validation, _ = make_feed(data, config, "validation")
    users = users_up_to(validation, config.train.validation_requests, config.train.seed)
    return Feeds(replace(train, train=True), replace(validation, users=users)), names


class Trainer:
    """A model, its optimizers and its place in the data; of one of the processes that train together."""

    def __init__(self, model: Any, feeds: Feeds, config: Config, out: Path, processes: Processes | None = None) -> None:
        self.model, self.feeds, self.config, self.out = model, feeds, config, out
        self.device = device_of(model)
        self.processes = processes or Processes()
        self.shards, self.sharded_names = shards_of(model)
        self.processes.spread(t for name, t in model.state_dict().items() if name not in self.sharded_names)
        if not self.processes.is_first:  # dropout of its own
            torch.manual_seed(_seed_of(config.train.seed, self.processes.rank, 0))
        self.optimizers = make_optimizers(model, config.train)
        self.average = WeightAverage(model, config.train.average_steps)
        self.position, self.carry = Position(), MemoryCarry()
        self.total_steps = self._count_steps()
        self.writer = SummaryWriter(str(out / "tensorboard")) if self.processes.is_first else None
        self.sums: dict[str, float] = {}
        self.steps_summed = 0

    def _count_steps(self) -> int:
        requests = TimelineWalk(self.feeds.train).num_requests
        per_epoch = math.ceil(requests / self.config.train.requests_per_step)
        return min(self.config.train.max_steps, per_epoch * self.config.train.max_epochs)

    def measure_counts(self) -> None:
        """Before the first step: by what exact counts are standardised, as requests of some users have them."""
        encoder = next((module for module in self.model.modules() if isinstance(module, CountsEncoder)), None)
        if encoder is None:
            return
        settings, feed = self.config.train, self.feeds.train
        users = users_up_to(feed, settings.validation_requests, settings.seed)
        with encoder.measuring():
            score(self.model, replace(feed, users=users), "measure counts", quiet=True)
        if self.shards:
            self.shards.finish()
        self.processes.spread(encoder.buffers())

    # -- the loop

    def run(self, quiet: bool = False) -> None:
        """Train to the end: last step or epoch, time budget, or no better validation for long enough."""
        if not self._is_over():  # a finished run that is resumed makes no step that an uninterrupted one would not
            self._run(quiet)
            if self.position.best_step == 0:  # nothing was ever better than infinity: keep what there is
                with self.average.applied():
                    self._keep_best()
        if self.writer is not None:
            self.writer.close()

    def _run(self, quiet: bool) -> None:
        settings, checkpoint_s = self.config.train, time.monotonic()
        progress = Progress("train", total=self.total_steps, unit="steps", quiet=quiet, done=self.position.step)
        stop = stop_on_interrupt(is_patient=self.processes.number > 1)
        with progress, stop as interrupted, closing(self._steps()) as steps:
            started, before = time.monotonic(), self.position.elapsed_s
            for step in steps:
                self.train_step(step)
                progress.advance(1)
                now = time.monotonic()
                self.position.elapsed_s, is_due, is_interrupted = self._agree(
                    before + now - started, now - checkpoint_s > settings.checkpoint_every_s, interrupted()
                )
                if self._is_over() or self.position.step % settings.validate_every_steps == 0:
                    with self.average.applied():
                        progress.update(**self._validate())
                if self._is_over() or is_interrupted or is_due:
                    self.save()
                    checkpoint_s = time.monotonic()
                if is_interrupted:
                    raise KeyboardInterrupt(f"checkpoint of step {self.position.step} kept in {self.out}")
                if self._is_over():
                    break

    def _agree(self, elapsed_s: float, is_due: bool, is_interrupted: bool) -> tuple[float, bool, bool]:
        """The first process's clock and whether a checkpoint is due by it; whether any process is to stop."""
        mine = [elapsed_s, is_due] if self.processes.is_first else [0.0, 0.0]
        elapsed_s, due, stop = self.processes.sum([*mine, is_interrupted])
        return elapsed_s, due > 0, stop > 0

    def _steps(self) -> Generator[SharedStep, None, None]:
        settings, processes = self.config.train, self.processes
        sharer = Sharer(self.feeds.train, processes.rank, settings.portions_per_step)
        walk = TimelineWalk(self.feeds.train, settings.seed, processes.number)
        if self.position.walk is not None:
            walk.resume(self.position.walk)
        there = (step.to(self.device) for step in sharer.steps(walk))
        with closing(ahead(there, settings.steps_ahead)) as steps:
            for step in steps:
                self.position.walk = step.position
                if step.is_empty:
                    self._pass_over(step)
                else:
                    yield step

    @torch.no_grad()
    def _pass_over(self, shared: SharedStep) -> None:
        """Fold a batch that holds events but no impression: memory grows, and there is nothing to learn from."""
        for step in (portion.step for portion in shared.portions):
            memory = self.model.init_memory(len(step.users))
            if memory:
                _, memory = self.model.prepare(step.batch, self.carry.gather(step, memory))
            self.carry.keep(step, memory)
        if self.shards:
            self.shards.finish()

    def _is_over(self) -> bool:
        budget = self.config.train.time_budget_s
        has_stalled = self.position.validations_without_gain >= self.config.train.patience
        return has_stalled or self.position.step >= self.total_steps or 0 < budget <= self.position.elapsed_s

    def train_step(self, step: SharedStep) -> None:
        """One optimizer step on one batch."""
        settings = self.config.train
        self.model.train()
        factor = self._rate_factor()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        if self.shards:
            self.shards.fetch([portion.step.batch for portion in step.portions])
        facts = self._sum_facts([self._backward(portion) for portion in step.portions])
        if not math.isfinite(facts["loss"]):
            users = [user for portion in step.portions for user in portion.step.users]
            raise TrainingError(
                f"the loss is {facts['loss']} at step {self.position.step + 1} (users {users[:5]} ...): lower "
                f"dense_lr ({settings.dense_lr}) or embedding_lr ({settings.embedding_lr}), or look for absurd context "
                f"values; the last good weights are in {self.out}"
            )
        dense, *tables = ([p for group in o.param_groups for p in group["params"]] for o in self.optimizers)
        if self.shards:
            self.shards.push()
        self.processes.sum_gradients(dense, [] if self.shards else [p for table in tables for p in table])
        length = float(nn.utils.clip_grad_norm_(dense, settings.clip_norm))
        if not math.isfinite(length):
            raise TrainingError(
                f"the gradient is {length} long at step {self.position.step + 1}, the loss {facts['loss']:.3g}: lower "
                f"dense_lr ({settings.dense_lr}), or look for absurd context values; the last good weights are in "
                f"{self.out}"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.position.step += 1
        self.average.update(self.position.step)
        for name, value in facts.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps_summed += 1

    def _backward(self, portion: Portion) -> dict[str, float]:
        """Add a portion's gradients to those of the step; what its loss is made of."""
        step = portion.step
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bfloat16"):
            output = self.model(step.batch, self.carry.gather(step, self.model.init_memory(len(step.users))))
        loss, facts = self._loss(portion, output)
        if loss.requires_grad:
            loss.backward()
        self.carry.keep(step, output.memory)
        return facts

    def _loss(self, portion: Portion, output: Output) -> tuple[Tensor, dict[str, float]]:
        """A portion's share in the loss of its step, and what it is made of."""
        batch, parts = portion.step.batch, {}
        loss = output.logits.new_zeros(())
        if portion.impressions:
            parts["log_loss"] = multi_task_loss(output.logits, batch.label, batch.is_valid) * portion.impressions
            loss = loss + parts["log_loss"]
        if output.reconstruction is not None:
            parts["reconstruction"] = output.reconstruction.mean() * portion.windows
            loss = loss + self.config.train.reconstruction_weight * parts["reconstruction"]
        if output.auxiliary is not None and portion.impressions:
            auxiliary = multi_task_loss(output.auxiliary, batch.label, batch.is_valid) * portion.impressions
            parts["auxiliary_log_loss"] = auxiliary
            loss = loss + auxiliary
        return loss, {name: float(part.detach()) for name, part in (parts | {"loss": loss}).items()}

    def _sum_facts(self, of_portions: list[dict[str, float]]) -> dict[str, float]:
        """Over the portions of all processes; those that nobody has are left out."""
        values = [[facts.get(name, 0.0) for facts in of_portions] for name in FACTS]
        is_there = [any(name in facts for facts in of_portions) for name in FACTS]
        total = self.processes.sum([sum(v) for v in values] + [float(there) for there in is_there])
        return {name: total[i] for i, name in enumerate(FACTS) if total[len(FACTS) + i]}

    def _rate_factor(self) -> float:
        settings, step = self.config.train, self.position.step
        done = step / self.total_steps
        if settings.time_budget_s > 0:
            done = max(done, self.position.elapsed_s / settings.time_budget_s)
        warm = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
        return warm * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    # -- validation and checkpoints

    def _validate(self) -> dict[str, float]:
        impression, probability = self._score()
        label = self.feeds.validation.impressions.label[impression]
        ne = float(np.mean([normalized_entropy(label[:, t], probability[:, t]) for t in range(label.shape[1])]))
        facts = {name: value / max(self.steps_summed, 1) for name, value in self.sums.items()} | {"validation_ne": ne}
        self.sums, self.steps_summed = {}, 0
        self._log(facts)
        if ne < self.position.best_ne:
            self.position.best_ne, self.position.best_step = ne, self.position.step
            self.position.validations_without_gain = 0
            self._keep_best()
        else:
            self.position.validations_without_gain += 1
        return facts

    def _score(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and probabilities of the validation impressions, each process scoring users of its own."""
        feed, processes = self.feeds.validation, self.processes
        users, requests = np.unique(feed.impressions.user, return_counts=True)
        users, mine, _ = np.intersect1d(users, feed.with_requests(), return_indices=True)
        own = users[share_out(requests[mine], processes.number) == processes.rank]
        scores = score(self.model, replace(feed, users=own), "validate", quiet=True)
        if self.shards:
            self.shards.finish()
        found = processes.collect((scores.impression, scores.probability))
        impression, probability = (np.concatenate(columns) for columns in zip(*found, strict=True))
        order = np.argsort(impression)
        return impression[order], probability[order]

    def _log(self, facts: dict[str, float]) -> None:
        if self.writer is None:
            return
        for name, value in facts.items():
            self.writer.add_scalar(name, value, self.position.step)
        with (self.out / "log.jsonl").open("a") as file:
            line = {"step": self.position.step, "elapsed_s": round(self.position.elapsed_s, 1), **facts}
            file.write(json.dumps(line) + "\n")

    def _keep_best(self) -> None:
        facts = {"step": self.position.step, "validation_ne": self.position.best_ne}
        self._write(self.out / "model.safetensors", self.model.state_dict(), facts)

    def _write(self, path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write a file of the run folder: the first process does, with the others' rows where they hold some."""
        if self.shards is None:
            if self.processes.is_first:
                write_tensors(path, tensors, facts)
            return
        sharded = {name: self.shards.whole(tensors[name]) for name in sorted(tensors.keys() & self.sharded_names)}
        if self.processes.is_first:
            write_in_parts(path, tensors | sharded, facts)
        else:
            for whole in sharded.values():
                for _ in whole.parts:
                    pass

    def _own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the tensors of a checkpoint those that this process holds."""
        if self.shards is None:
            return tensors
        return tensors | {name: self.shards.own(tensors[name]) for name in tensors.keys() & self.sharded_names}

    def save(self) -> None:
        """Write all that going on needs, in one atomic step: the first process for all of them."""
        of_processes = self.processes.collect((self.carry.state(), generator_states(self.device)))
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        tensors |= pack_optimizers(self.optimizers)
        tensors |= {f"average.{name}": t for name, t in self.average.state().items()}
        for rank, (carried, generators) in enumerate(of_processes):
            tensors |= {f"carry.{name}": t for name, t in carried.items()}
            tensors |= {f"{name}{_suffix(rank)}": t for name, t in generators.items()}
        facts = vars(self.position) | {"sums": self.sums, "steps_summed": self.steps_summed}
        self._write(self.out / "training.safetensors", tensors, facts)

    def restore(self) -> None:
        """Go on from ``training.safetensors``. Raises CheckpointError when it is not there or does not fit."""
        path = self.out / "training.safetensors"
        if not path.exists():
            raise CheckpointError(f"{path} is not there: nothing to resume; remove {self.out} and start again")
        tensors, facts = read_tensors(path)
        tensors = self._own(tensors)
        self.sums, self.steps_summed = facts.pop("sums"), facts.pop("steps_summed")
        self.position = Position(**facts)
        load_weights(self.model, under("model.", tensors), path)
        unpack_optimizers(self.optimizers, tensors)
        self.average.load(under("average.", tensors))
        self.carry.load(under("carry.", tensors), self._own_users(), self.device)
        rank = self.processes.rank
        saved = {name: tensors[name + _suffix(rank)] for name in GENERATORS if name + _suffix(rank) in tensors}
        if not set_generators(saved, self.device):  # it was saved by fewer processes, or on another device
            torch.manual_seed(_seed_of(self.config.train.seed, rank, self.position.step))

    def _own_users(self) -> set[int]:
        """Users under way whose memory this process carries."""
        walk = TimelineWalk(self.feeds.train, self.config.train.seed, self.processes.number)
        if self.position.walk is not None:
            walk.resume(self.position.walk)
        return {lane.user for lane in walk.lanes if lane.process == self.processes.rank}


def _suffix(rank: int) -> str:
    return f".{rank}" if rank else ""


def _seed_of(seed: int, rank: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0])


def make_optimizers(model: nn.Module, settings: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for dense weights (decay on matrices only), sparse Adam for embedding tables with sparse gradients."""
    sparse = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.sparse}
    dense = [p for p in model.parameters() if id(p) not in sparse]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in dense if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in dense if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=settings.dense_lr)]
    tables = [p for p in model.parameters() if id(p) in sparse]
    if tables:
        optimizers.append(torch.optim.SparseAdam(tables, lr=settings.embedding_lr))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers
