"""What leave-one-out trains: the models with their settings, and what was published for them.

The settings are those of Zhai et al. 2024, "Actions Speak Louder than Words", for its public experiments, which were
also used for its SASRec: D = 50, 2 layers of 1 head (HSTU-large: 8 of 2), the newest 200 events, dropout 0.2, AdamW at
0.001 without decay and a second beta of 0.98, 128 users a step, softmax over the next item and 128 others drawn for
each position, temperature 0.05, 101 epochs. Ours: early stopping on a validation item they do not hold out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vista.config import ModelConfig, apply, check_numbers
from vista.data.sequences import Sequences
from vista.errors import ConfigError, nearest

POPULARITY = "popularity"  # the floor: no model, every user gets the items most met
ARCHITECTURES = ("sasrec", "hstu", "vista", "recent")  # what ``model.model`` may be here


@dataclass(frozen=True)
class NextItemTraining:
    """How a next-item model is trained."""

    seed: int = 0
    length: int = 200  # newest events of each user that are targets
    max_epochs: int = 101  # passes over the users
    patience: int = 20  # epochs without a better validation NDCG@10 before stopping
    users_per_step: int = 128
    negatives: int = 128  # items drawn uniformly for each position and step
    temperature: float = 0.05
    learning_rate: float = 1e-3  # AdamW, all weights
    second_beta: float = 0.98
    weight_decay: float = 0.0
    checkpoint_every_s: float = 60.0


@dataclass(frozen=True)
class NextItemConfig:
    """Settings of one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: NextItemTraining = field(default_factory=NextItemTraining)


# What all models share. Dropout is of event vectors and of each layer; VISTA's two stages are as wide as the others.
COMMON: dict[str, Any] = {"model.width": 50, "model.num_heads": 1, "model.dropout": 0.2, "model.encoder_layers": 2}
STAGES: dict[str, Any] = {
    "model.num_heads": 2, "model.segment_events": 32, "model.num_seeds": 32, "model.recent_events": 64,
    "model.ranker_layers": 2, "model.num_layers": 1, "model.memory": "slots", "model.attention": "qla",
    "model.expansion": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One model: its name on the command line and in folders, and the settings that make it."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_trained(self) -> bool:
        return self.name != POPULARITY

    def identity(self, seed: int, overrides: dict[str, Any]) -> dict[str, Any]:
        """Every setting that a run's numbers depend on: all of training, and of the model what is stated here."""
        config = self.config(seed, overrides)
        stated = sorted({**COMMON, **self.settings, **overrides})
        model = {key: getattr(config.model, key.split(".")[1]) for key in stated if key.startswith("model.")}
        return model | {f"train.{key}": value for key, value in asdict(config.train).items()}

    def config(self, seed: int, overrides: dict[str, Any]) -> NextItemConfig:
        """Checked settings of one run. Raises ConfigError."""
        config = apply(NextItemConfig(), {**COMMON, **self.settings, **overrides, "train.seed": seed}, "setting")
        config = apply(config, {"model.history_events": config.train.length}, "setting")
        model = config.model
        check_numbers(model, config.train)
        if model.kind not in ARCHITECTURES or model.with_counts:
            raise ConfigError(f"model.model = {model.model!r}: leave-one-out has {', '.join(ARCHITECTURES)}")
        if model.scope == "full" or model.sketch_slots:
            raise ConfigError("model.scope, model.sketch_slots: leave-one-out has neither scope full nor a sketch")
        if model.candidate_memory != "none":
            raise ConfigError(
                f"model.candidate_memory = {model.candidate_memory!r}: leave-one-out scores no candidates one by one, "
                "so nobody could ask; leave it at none"
            )
        if model.kind == "vista" and model.recent_events < model.segment_events:
            raise ConfigError(
                f"recent_events {model.recent_events} is below segment_events {model.segment_events}: some events "
                "would be in neither the summary nor the recent events; raise it or lower the other"
            )
        return config


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry(POPULARITY),
        Entry("sasrec", {"model.model": "sasrec"}),
        Entry("hstu", {"model.model": "hstu"}),
        Entry("hstu-large", {"model.model": "hstu", "model.encoder_layers": 8, "model.num_heads": 2}),
        Entry("vista", {"model.model": "vista", **STAGES}),
        Entry("recent", {"model.model": "recent", **STAGES}),
    )
}


def choose(names: Iterable[str]) -> list[Entry]:
    """Entries by name, each once. Raises ConfigError for an unknown one."""
    chosen = []
    for name in dict.fromkeys(names):
        if name not in ENTRIES:
            raise ConfigError(f"--models: there is no entry {name!r}{nearest(name, ENTRIES)}")
        chosen.append(ENTRIES[name])
    return chosen


@dataclass(frozen=True)
class Published:
    """Numbers of others, HR@10 and NDCG@10 by entry, on a log that is known by its size."""

    num_users: int
    num_items: int
    num_events: int
    scores: Mapping[str, tuple[float, float]]

    def of(self, sequences: Sequences) -> Mapping[str, tuple[float, float]]:
        """The numbers, if this is that log; else none."""
        size = (sequences.num_users, sequences.num_items, len(sequences.item))
        return self.scores if size == (self.num_users, self.num_items, self.num_events) else {}


PUBLISHED_SET = Published(  # MovieLens-1M, 5-core; Zhai et al. 2024, table 4 (history length 200)
    6040, 3416, 999_611, {"sasrec": (0.2853, 0.1603), "hstu": (0.3097, 0.1720), "hstu-large": (0.3294, 0.1893)}
)
