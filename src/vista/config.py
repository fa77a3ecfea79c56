"""Settings: one typed place for all of them, with a sentence and a unit each.

A config is resolved once (size preset, then a TOML file, then single overrides), checked, and saved in the checkpoint.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from vista.errors import ConfigError, nearest

MODELS = ("vista", "recent", "counts", "mean", "din", "sim", "twin", "sasrec", "hstu")
WITH_COUNTS = "+counts"  # behind the name of a model

Settings = TypeVar("Settings")  # a frozen dataclass with the parts ``model`` and ``train``


@dataclass(frozen=True)
class ModelConfig:
    """What the network is. Letters in brackets are the shape letters of docs/conventions.md."""

    model: str = "vista"  # one of MODELS; with "+counts" behind it, the head reads exact counts as well
    attention: str = (
        "qla"  # how events attend to events: qla, or softmax (within the segment; over all with scope full)
    )
    memory: str = (
        "slots"  # what seeds read: slots (running softmax per seed), sum (the paper's phi(K)^T V), ridge or delta
    )
    candidate_memory: str = (
        "none"  # what candidates ask directly, beside the tokens: none, sum, ridge or delta (of the first layer)
    )
    scope: str = (
        "segment"  # segment: segment-causal, streams; full: the paper's operator over all events (S = infinity)
    )
    segment_events: int = 64  # [S] events folded into memory at a time; also how often a summary is refreshed
    num_layers: int = 1  # [L] summarizer layers
    num_seeds: int = 64  # [K] summary tokens per user
    width: int = 64  # [D]
    num_heads: int = 4  # [H]; the head width E is width / num_heads
    sketch_slots: int = 0  # items the sketch has room for (exact counts beside the summary, per candidate); 0: none
    sketch_traces: int = 0  # items beyond these of which the sketch keeps a trace of 4 bytes: count and rough age
    sketch_predecessors: int = 0  # newest meetings with an item of which the sketch keeps what came before; 0: none
    popularity_hours: int = 24  # beside a sketch: hours between two tables of how popular items are; 0: none
    recent_events: int = 128  # [R] newest raw events given to the ranker; at least the largest staleness in events
    history_events: int = 1024  # [R] newest raw events that models without a summary (docs/baselines.md) read
    top_k: int = 128  # models sim and twin: events that the search leaves to the exact stage
    search: str = "hard"  # model sim: hard (events of the candidate's category) or soft (largest inner product)
    encoder_layers: int = 2  # models sasrec and hstu: layers of the encoder
    ranker_layers: int = 2  # target attention blocks
    expansion: int = 2  # hidden width of the gated units, in multiples of width
    head_width: int = 64  # hidden width of the task heads
    dropout: float = 0.0  # share of what the ranker adds, and of the vectors its head reads, dropped in training
    count_predecessors: int = 0  # counts: newest meetings with an item of which what came before is known; 0: none
    count_last_events: int = 0  # model counts: count in the last so many events only; 0: in the whole history
    decoder_layers: int = 1  # blocks of the reconstruction decoder (training only)

    @property
    def kind(self) -> str:
        """The model without ``+counts``."""
        return self.model.removesuffix(WITH_COUNTS)

    @property
    def with_counts(self) -> bool:
        """Whether exact counts are read."""
        return self.model.endswith("counts")

    @property
    def has_sketch(self) -> bool:
        """Whether the state holds exact counts beside the memory."""
        return self.kind == "vista" and self.num_seeds > 0 and self.scope != "full" and self.sketch_slots > 0

    @property
    def has_candidate_memory(self) -> bool:
        """Whether candidates ask a memory directly, beside the tokens."""
        return self.kind == "vista" and self.num_seeds > 0 and self.scope != "full" and self.candidate_memory != "none"

    @property
    def has_popularity(self) -> bool:
        """Whether candidates come with the popularity that the run's table has; exact counts have it themselves."""
        return self.has_sketch and not self.with_counts and self.popularity_hours > 0

    @property
    def raw_events(self) -> int:
        """[R] newest events before a request that the model reads as they are; counts read the time of the newest."""
        return {"vista": self.recent_events, "recent": self.recent_events, "counts": 1}.get(
            self.kind, self.history_events
        )


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained."""

    seed: int = 0
    max_steps: int = 2000  # optimizer steps
    max_epochs: int = 20  # passes over the training requests
    time_budget_s: float = 0.0  # stop after this many seconds of training; 0: no limit
    requests_per_step: int = 512  # requests (each with all its candidates) in a step, about
    segments_per_step: int = 128  # most segments of one step, all lanes together: bounds memory where requests are rare
    portions_per_step: int = 1  # computed one after another, gradients added: the same step with less memory
    steps_ahead: int = 2  # batches built ahead in a thread while the model computes; 0: none
    users_per_step: int = 8  # least users among the requests of a step, while so many are open
    open_users: int = 64  # users under way in training, from whom those of a step are drawn
    window_segments: int = 16  # longest stretch of one history that gradients flow through, in segments
    max_stale_segments: int = 1  # a training request uses a summary up to this many segments older than the newest
    dense_lr: float = 3e-3  # AdamW, dense weights
    embedding_lr: float = 1e-2  # sparse Adam, embedding tables
    weight_decay: float = 1e-2  # dense weights only
    average_steps: int = 100  # validated and kept: the average of the weights over about so many steps; 0: the newest
    warmup_steps: int = 50
    clip_norm: float = 1.0  # largest norm of the dense gradient
    reconstruction_weight: float = 1.0  # of the reconstruction loss (paper: 1.0); 0 leaves it out
    reconstruction_events: int = 32  # events of one reconstruction window
    precision: str = "float32"  # float32, or bfloat16 autocast
    validate_every_steps: int = 100
    validation_requests: int = 20_000  # most requests scored at each validation
    patience: int = 6  # validations without a better NE before stopping
    checkpoint_every_s: float = 60.0


@dataclass(frozen=True)
class Config:
    """A resolved configuration: what is saved as config.json in a run folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Config:
        values = json.loads(text)
        return apply(
            cls(), {f"{part}.{k}": v for part in ("model", "train") for k, v in values[part].items()}, "config"
        )


# One dial. Widths, heads, seeds and window grow together; experts override single settings in a file. With the sketch,
# the state of a user who met thousands of items is 64 KB at most with tiny and small, and 0.3 MB with base; each
# categorical feature of items adds up to 3.6 KB.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model.width": 32, "model.num_heads": 2, "model.num_seeds": 32, "model.segment_events": 32,
        "model.recent_events": 64, "model.ranker_layers": 1, "model.head_width": 32,
        "model.sketch_slots": 768, "model.sketch_traces": 5248, "model.sketch_predecessors": 4,
    },
    "small": {"model.sketch_slots": 512, "model.sketch_traces": 3200, "model.sketch_predecessors": 4},
    "base": {
        "model.width": 128, "model.num_heads": 4, "model.num_seeds": 128, "model.segment_events": 128,
        "model.recent_events": 256, "model.num_layers": 2, "model.ranker_layers": 3, "model.head_width": 256,
        "model.sketch_slots": 1024, "model.sketch_traces": 8192, "model.sketch_predecessors": 4,
    },
}  # fmt: skip

_CHOICES = {
    "model.model": (*MODELS, *(name + WITH_COUNTS for name in MODELS if name != "counts")),
    "model.search": ("hard", "soft"),
    "model.attention": ("qla", "softmax"),
    "model.memory": ("sum", "slots", "ridge", "delta"),
    "model.candidate_memory": ("none", "sum", "ridge", "delta"),
    "model.scope": ("segment", "full"),
    "train.precision": ("float32", "bfloat16"),
}


def resolve(
    size: str | None = "small", file: Path | None = None, overrides: dict[str, Any] | None = None,
    begun: Config | None = None,
) -> Config:  # fmt: skip
    """Preset, then file (TOML with tables [model] and [train]), then overrides such as ``{"model.width": 32}``.

    begun: settings of a run that goes on; what nothing else says is as it is there. size: None for no preset.
    Raises ConfigError for an unknown size, key or choice, a wrong type, and settings that contradict one another.
    """
    config = begun or Config()
    if size is not None:
        if size not in SIZES:
            raise ConfigError(f"--size {size!r}: unknown{nearest(size, SIZES)}")
        config = apply(config, SIZES[size], f"size {size}")
    if file is not None:
        config = apply(config, _read_toml(file), str(file))
    config = apply(config, overrides or {}, "override")
    _check(config)
    return config


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """``model.width=32`` to {"model.width": "32"}. Raises ConfigError where there is no ``=``."""
    parsed = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair!r}: write it as --set model.width=32")
        parsed[key.strip()] = value.strip()
    return parsed


def setting_key(name: str) -> str:
    """``width`` to ``model.width``: no name stands in both parts. Raises ConfigError for an unknown one."""
    known = {f.name: part for part, kind in (("model", ModelConfig), ("train", TrainConfig)) for f in fields(kind)}
    if name not in known:
        raise ConfigError(f"unknown setting {name!r}{nearest(name, known)}")
    return f"{known[name]}.{name}"


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: not a readable TOML file ({error})") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {name!r} stands outside a table; put it under [model] or [train]")
    return {f"{name}.{key}": value for name, table in tables.items() for key, value in table.items()}


def apply(config: Settings, values: dict[str, Any], place: str) -> Settings:
    """Settings in parts ``model`` and ``train`` with dotted keys replaced; text is read as the type of its setting."""
    known = {f"{part}.{f.name}": type(getattr(getattr(config, part), f.name))
             for part in ("model", "train") for f in fields(getattr(config, part))}  # fmt: skip
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{place}: unknown setting {key!r}{nearest(key, known)}")
        part, name = key.split(".")
        changed = replace(getattr(config, part), **{name: _typed(key, value, known[key], place)})
        config = replace(config, **{part: changed})  # type: ignore[type-var]
    return config


def _typed(key: str, value: Any, kind: type, place: str) -> Any:
    try:
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        result = kind(int(float(value))) if kind is int else kind(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{place}: {key} = {value!r} is not {kind.__name__}") from None
    if key in _CHOICES and result not in _CHOICES[key]:
        raise ConfigError(f"{place}: {key} = {value!r}{nearest(str(value), _CHOICES[key])}")
    return result


def check_numbers(model: ModelConfig, train: Any) -> None:
    """Raise ConfigError for a number below 0, one that is 0 and must not be, and a width that heads do not divide."""
    for part in (model, train):
        for f in fields(part):
            value = getattr(part, f.name)
            may_be_zero = f.name in _MAY_BE_ZERO
            if isinstance(value, int | float) and (value < 0 or (value == 0 and not may_be_zero)):
                raise ConfigError(f"{f.name} = {value}: must be {'0 or more' if may_be_zero else 'above 0'}")
    if model.dropout >= 1:
        raise ConfigError(f"dropout = {model.dropout}: a share, below 1")
    if model.width % model.num_heads:
        raise ConfigError(f"width {model.width} is not a multiple of num_heads {model.num_heads}")


def _check(config: Config) -> None:
    model, train = config.model, config.train
    check_numbers(model, train)
    needed = model.segment_events * (1 + train.max_stale_segments)
    if model.kind == "vista" and model.recent_events < needed:
        raise ConfigError(
            f"recent_events {model.recent_events} is below segment_events x (1 + max_stale_segments) = {needed}: "
            "some events would be in neither the summary nor the recent events; raise it or lower the others"
        )
    if model.kind in ("sim", "twin") and model.top_k > model.history_events:
        raise ConfigError(
            f"top_k {model.top_k} is above history_events {model.history_events}: the search of {model.kind} has no "
            "more events than that to choose from; raise history_events or lower top_k"
        )


_MAY_BE_ZERO = {
    "seed", "time_budget_s", "average_steps", "steps_ahead", "max_stale_segments", "weight_decay", "warmup_steps",
    "reconstruction_weight", "dropout", "num_seeds", "count_last_events", "sketch_slots",
    "sketch_traces", "sketch_predecessors", "count_predecessors", "popularity_hours",
}  # fmt: skip
