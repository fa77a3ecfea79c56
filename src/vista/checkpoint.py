"""Run folders: what training leaves behind and everything else starts from.

    RUN/
      config.json             the resolved configuration
      schema.json             what the model takes from its data: tasks, actions, context columns, catalogue fingerprint
      catalogue.safetensors   a copy of the data's catalogue: a run serves without its data
      model.safetensors       the best weights by validation NE; written in one atomic step
      training.safetensors    everything needed to go on training: weights, optimizers, position, carried memory
      popularity.safetensors  where the model reads it: how popular items are; remade by every vista summarize
      log.jsonl               one line per validation
      tensorboard/

The *model version* is a hash of weights, config and catalogue, not of the popularity, which changes: the same content
has the same version wherever it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vista.catalogue import Catalogue
from vista.config import Config, ModelConfig
from vista.errors import CheckpointError
from vista.models.embeddings import ItemTables
from vista.models.model import Model
from vista.models.vista import SequenceModel, make_model
from vista.schema import ContextColumn, Manifest, action_text

POPULARITY = "popularity.safetensors"
COUNTS_VERSION = (
    2  # to be raised where a count or popularity comes to mean something else: models read them by place alone
)
VERSION_FILES = ("model.safetensors", "config.json", "schema.json")  # what a model version is made of
DTYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class ModelSchema:
    """What a model takes from the data it was trained on, beside the catalogue."""

    tasks: tuple[str, ...]
    actions: tuple[Any, ...]
    context: tuple[ContextColumn, ...]
    catalogue_fingerprint: str
    count_features: tuple[str, ...] = ()
    counts_version: int = COUNTS_VERSION

    @classmethod
    def of(cls, manifest: Manifest, catalogue: Catalogue, count_features: tuple[str, ...] = ()) -> ModelSchema:
        return cls(manifest.tasks, manifest.actions, manifest.context, catalogue.fingerprint, count_features)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelSchema:
        """Raises ValueError, KeyError or TypeError for what is not a schema that this version made."""
        values = json.loads(text)
        if values["count_features"] and values.get("counts_version") != COUNTS_VERSION:
            raise ValueError(
                f"{values['count_features'][0]} and its like are not counted as when the model was trained"
            )
        return cls(
            tuple(values["tasks"]),
            tuple(values["actions"]),
            tuple(ContextColumn(**column) for column in values["context"]),
            values["catalogue_fingerprint"],
            tuple(values["count_features"]),
        )

    def action_index(self, actions: list[Any]) -> list[int]:
        """Action values to action indices; 0 for one that training never saw. 4, 4.0, "4" and "4.0" are one."""
        known = {str(value): index + 1 for index, value in enumerate(self.actions)}
        known = {action_text(value): known[str(value)] for value in self.actions} | known
        return [known.get(action_text(value), known.get(str(value), 0)) for value in actions]


def build_model(
    config: ModelConfig, schema: ModelSchema, catalogue: Catalogue, tables: ItemTables | None = None
) -> Model:
    """A fresh model for this data. tables: instead of the catalogue's own."""
    return make_model(
        config,
        tables or ItemTables.of(catalogue),
        num_actions=len(schema.actions),
        num_tasks=len(schema.tasks),
        context=schema.context,
        num_counts=len(schema.count_features),
    )


@dataclass(frozen=True)
class Run:
    """A loaded run folder, ready to score."""

    folder: Path
    config: Config
    schema: ModelSchema
    catalogue: Catalogue
    model: Model
    version: str

    @property
    def sequence_model(self) -> SequenceModel:
        """The model, where it ranks from what a store holds. Raises CheckpointError for one that reads more."""
        model, config = self.model, self.config.model
        if not isinstance(model, SequenceModel) or config.with_counts:
            read = "exact counts" if config.with_counts else f"the last {config.history_events:,} events as they are"
            raise CheckpointError(
                f"{self.folder}: a model of kind {config.model!r} reads {read}, which a store does not hold; train one "
                "with --model vista or --model recent"
            )
        return model

    @property
    def summarizer(self) -> Any:
        """The summarizer of a ``vista`` model, else None."""
        return self.sequence_model.summarizer

    @property
    def ranker(self) -> Any:
        return self.sequence_model.ranker

    def read_popularity(self) -> Tensor | None:
        """The table (I, F) of how popular items are, None where the model reads none.

        Raises CheckpointError when the file is not there, or is one of other items.
        """
        if not self.config.model.has_popularity:
            return None
        path = self.folder / POPULARITY
        if not path.exists():
            raise CheckpointError(f"{path} is not there; vista summarize makes it from the data")
        table = read_tensors(path)[0].get("popularity")
        shape = (self.catalogue.num_indices, len(self.schema.count_features))
        if table is None or table.shape != shape:
            raise CheckpointError(f"{path}: a table of shape {_shape(table)}, not {shape}; run vista summarize")
        return table

    def check_data(self, manifest: Manifest, catalogue: Catalogue, folder: Path) -> None:
        """Raise CheckpointError for data whose items, actions or tasks mean something else than the model's."""
        pairs = {
            "tasks": (self.schema.tasks, manifest.tasks),
            "actions": (self.schema.actions, manifest.actions),
            "catalogue": (self.schema.catalogue_fingerprint, catalogue.fingerprint),
        }
        for what, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise CheckpointError(
                    f"{self.folder} was trained on other data than {folder}: its {what} is {ours!r}, "
                    f"the data's {theirs!r}; use the data it was trained on, or train again"
                )


def start_run(folder: Path, config: Config, schema: ModelSchema, catalogue: Catalogue) -> None:
    """Write what stays the same throughout a run."""
    folder.mkdir(parents=True, exist_ok=True)
    catalogue.save(folder / "catalogue.safetensors")
    write_text(folder / "schema.json", schema.to_json())
    write_text(folder / "config.json", config.to_json())


def write_popularity(folder: Path, table: np.ndarray, at_us: int) -> None:
    """Put the table (I, F) of popularity as of a moment into a run folder, in one atomic step."""
    write_tensors(folder / POPULARITY, {"popularity": torch.from_numpy(table)}, {"at_us": at_us})


def load_run(folder: Path | str, device: str = "cpu") -> Run:
    """Load a run for scoring, in evaluation mode. Raises CheckpointError, saying what is missing or does not fit."""
    folder = Path(folder)
    config, schema, catalogue = load_description(folder)
    path = folder / "model.safetensors"
    if not path.exists():
        raise CheckpointError(
            f"{path} is not there: training has not reached its first validation; go on with --resume"
        )
    model = build_model(config.model, schema, catalogue)
    load_weights(model, read_tensors(path)[0], path)
    model.eval().to(device)
    return Run(folder, config, schema, catalogue, model, model_version(folder))


def load_description(folder: Path) -> tuple[Config, ModelSchema, Catalogue]:
    """Config, schema and catalogue of a run folder."""
    for name in ("config.json", "schema.json", "catalogue.safetensors"):
        if not (folder / name).exists():
            raise CheckpointError(
                f"{folder / name} is not there: not a run folder; run: vista train DATA --out {folder}"
            )
    try:
        config = Config.from_json((folder / "config.json").read_text())
        schema = ModelSchema.from_json((folder / "schema.json").read_text())
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: config.json or schema.json cannot be read ({error}); train again") from error
    catalogue = Catalogue.load(folder / "catalogue.safetensors")
    if catalogue.fingerprint != schema.catalogue_fingerprint:
        raise CheckpointError(
            f"{folder}: catalogue.safetensors has fingerprint {catalogue.fingerprint}, the model was trained with "
            f"{schema.catalogue_fingerprint}; restore the file or train again"
        )
    return config, schema, catalogue


def model_version(folder: Path) -> str:
    """Content hash of a run, 16 hexadecimal characters. The way a model was trained is not part of it.

    Raises CheckpointError where one of its files is not there or cannot be read, as while it is being copied.
    """
    try:
        weights, config, schema = ((folder / name).read_bytes() for name in VERSION_FILES)
        json.loads(schema)
        model = asdict(Config.from_json(config.decode()).model)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); wait until it is whole, or train again") from error
    digest = hashlib.sha256(weights)
    digest.update(json.dumps(model, sort_keys=True).encode())
    digest.update(schema)
    return digest.hexdigest()[:16]


def load_weights(model: torch.nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Put weights into a model; all must fit. Raises CheckpointError naming the first that does not."""
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        ours, theirs = expected.get(name), weights.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            raise CheckpointError(
                f"{path}: parameter {name!r} is {_shape(theirs)} in the file, {_shape(ours)} in the model; "
                "the config was changed after training, or the file belongs to another run"
            )
    model.load_state_dict(weights)


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any] | None = None) -> None:
    """Write a safetensors file in one atomic step: a reader sees the old file or the new one, whole."""
    partial = path.with_name(path.name + ".partial")
    here = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(here, partial, {"facts": json.dumps(facts or {})})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


@dataclass(frozen=True)
class InParts:
    """A tensor that is made while it is written, some rows at a time: it need not fit into memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Iterable[Tensor]  # its rows, from the first to the last


def write_in_parts(path: Path, tensors: dict[str, Tensor | InParts], facts: dict[str, Any] | None = None) -> None:
    """Write what ``write_tensors`` writes, where some tensors come in parts; those by name, one after another."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # so that all lie aligned
    header: dict[str, Any] = {"__metadata__": {"facts": json.dumps(facts or {})}}
    end = 0
    for name in order:
        start, shape, dtype = end, list(tensors[name].shape), tensors[name].dtype
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in (tensors[name] for name in order):
            for part in tensor.parts if isinstance(tensor, InParts) else [tensor]:
                file.write(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``write_tensors`` wrote. Raises CheckpointError when the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
        return load_file(path), facts
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); go back to an earlier copy or train again") from error


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
