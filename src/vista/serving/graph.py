"""The ranking as a program that torch alone runs: no vista, no store, no Python code of ours.

    DIR/
      model.pt2       torch.export of one function, users and their candidates to scores
      compiled.pt2    on demand, the same compiled (AOTInductor) for processors like this machine's
      metadata.json   what it takes and gives, and how ids, actions and context become its numbers
      items.json      the catalogue's item ids, in order of their item indices

Whoever holds a user's record (docs/record-format.md) can call it. Users, candidates and recent events may be of any
number; all else is the model's. What the function computes is ``Scorer.score``.

Shape letters: B users, K summary tokens, D width, R recent events, C candidates, X context columns, T tasks, P slots of
a sketch.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vista.checkpoint import Run
from vista.errors import CheckpointError, ConfigError, StaleOutput
from vista.models.inputs import Recent
from vista.models.vista import SequenceModel
from vista.schema import NUM_CONTEXT_BUCKETS

MOST_USERS, MOST_CANDIDATES = 4096, 65_536  # of one call: bounds that the program checks
TOLERANCE = 1e-6  # of a probability: the same operators in the same order; other shapes may add up in another
COMPILED = "compiled.pt2"
RECENT = ("recent_item", "recent_action", "recent_timestamp_us", "recent_gap_us")
EXAMPLES = ((1, 1, 1), (2, 7, 3), (5, 64, None))  # users, candidates, recent events (None: all) that are compared


class RankingGraph(nn.Module):
    """What is exported: tensors of B users in, probabilities (B, C, T) out."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        model = copy.deepcopy(run.sequence_model).eval().requires_grad_(False)
        model.decoder = None
        if model.summarizer is not None:
            model.summarizer.layers = nn.ModuleList()  # stage 1: its work is done when tokens are there
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.numel():  # read by nobody, and torch cannot save it
                    module._buffers[name] = buffer.new_zeros(1, 1)
        self.model = model
        popularity = run.read_popularity()
        self.register_buffer("popularity", popularity, persistent=False)

    def forward(
        self,
        tokens: Tensor,
        recent_item: Tensor,
        recent_action: Tensor,
        recent_timestamp_us: Tensor,
        recent_gap_us: Tensor,
        num_events: Tensor,
        at_us: Tensor,
        candidates: Tensor,
        context: Tensor | None = None,
        sketch_entries: Tensor | None = None,
        sketch_decayed: Tensor | None = None,
        sketch_clock: Tensor | None = None,
        trace_words: Tensor | None = None,
        trace_marks: Tensor | None = None,
        sketch_preceding: Tensor | None = None,
        sketch_newest: Tensor | None = None,
        readout: Tensor | None = None,
    ) -> Tensor:
        recent = Recent(recent_item, recent_action, recent_timestamp_us, recent_gap_us)
        counted = (sketch_entries, sketch_decayed, sketch_clock)
        parts = (*counted, trace_words, trace_marks, sketch_preceding, sketch_newest)
        sketch = tuple(part for part in parts if part is not None)
        counts = None if self.popularity is None else self.popularity[candidates]
        logits = self.model.rank_users(tokens, recent, num_events, at_us, candidates, context, sketch, counts, readout)
        return logits.double().sigmoid()

    popularity: Tensor | None


@dataclass(frozen=True)
class Input:
    """One input: its shape in letters and numbers, its type, and what it means."""

    name: str
    shape: tuple[str | int, ...]
    dtype: str
    meaning: str


def inputs_of(run: Run) -> list[Input]:
    """The inputs of a run's graph, in order."""
    model, context = run.sequence_model, run.schema.context
    _, num_tokens, width = model.empty_summary(1).shape
    found = [
        Input("tokens", ("B", num_tokens, width), "float32", "summary tokens, as a tokens record has them, decoded"),
        Input("recent_item", ("B", "R"), "int64", "item indices of the newest events, newest last; 0 pads in front"),
        Input("recent_action", ("B", "R"), "int64", "actions of these, by the list of actions; 0 where not known"),
        Input("recent_timestamp_us", ("B", "R"), "int64", "times of these, microseconds since 1970 UTC; 0 pads"),
        Input("recent_gap_us", ("B", "R"), "int64", "time since the user's event before; -1 for a first one; 0 pads"),
        Input("num_events", ("B",), "int64", "events of the user that the record holds"),
        Input("at_us", ("B",), "int64", "the moment asked about, microseconds since 1970 UTC"),
        Input("candidates", ("B", "C"), "int64", "item indices; 0 pads"),
    ]
    if context:
        found.append(Input("context", ("B", "C", len(context)), "float32", "columns in order, NaN where not given"))
    for part, tensor in sketch_parts(model, 1).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        found.append(Input(part, ("B", *tensor.shape[1:]), dtype, "the sketch, one row per slot; zeros where free"))
    readout = model.state_readout(model.init_state(1))
    if readout is not None:
        found.append(Input("readout", ("B", *readout.shape[1:]), "float32", "what candidates ask, of a tokens record"))
    return found


@torch.no_grad()
def example(run: Run, users: int, candidates: int, recent: int | None, seed: int = 0) -> dict[str, Tensor]:
    """Made inputs by name: numbers of the right kind that stand for nobody. recent: events, None for all."""
    size, made = run.config.model.recent_events if recent is None else recent, torch.Generator().manual_seed(seed)
    letters = {"B": users, "C": candidates, "R": size}
    most = {"recent_item": run.catalogue.num_indices, "candidates": run.catalogue.num_indices,
            "recent_action": len(run.schema.actions) + 1, "num_events": 10**6, "recent_gap_us": 10**9}  # fmt: skip
    found: dict[str, Tensor] = {}
    for one in inputs_of(run):
        shape = [letters.get(n, n) if isinstance(n, str) else n for n in one.shape]
        if one.name in ("tokens", "readout"):
            found[one.name] = torch.randn(*shape, generator=made)  # type: ignore[arg-type]
        elif one.name == "context":
            found[one.name] = torch.randint(0, 100, shape, generator=made).float()  # type: ignore[arg-type]
        elif one.name in most:
            found[one.name] = torch.randint(0, most[one.name], shape, generator=made)  # type: ignore[arg-type]
        elif one.name == "recent_timestamp_us":
            found[one.name] = 10**15 + torch.randint(1, 10**9, shape, generator=made).cumsum(1)  # type: ignore[arg-type]
        elif one.name == "at_us":
            found[one.name] = torch.full(shape, 2 * 10**15)  # type: ignore[arg-type]
    parts = sketch_parts(run.sequence_model, users)
    return found | {name: tensor.clone() for name, tensor in parts.items()}


def sketch_parts(model: SequenceModel, users: int) -> dict[str, Tensor]:
    """Sketches (B, ...) of users without events, by the names of the graph's inputs; nothing without a sketch."""
    names = () if model.sketch is None else model.sketch.names
    return dict(zip(names, model.init_sketch(users), strict=True))


def export_model(run: Run, out: Path, is_compiled: bool = False) -> Path:
    """Write the program, its metadata and the item ids; returns the program's path. is_compiled: compile it, too.

    A program is loaded again and compared with the model before anything is put in its place. Raises StaleOutput
    where ``out`` is there and not empty, ConfigError where nothing can compile, CheckpointError where this torch makes
    a program of other scores.
    """
    if is_compiled and shutil.which(_compiler()) is None:
        raise ConfigError(
            f"there is no C++ compiler {_compiler()!r} to compile with; install one, or leave out --compile"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StaleOutput(f"{out} is there and is not an empty folder: name another one, or remove it")
    graph = RankingGraph(run).eval()
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    path = partial / "model.pt2"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch, about itself
        logging.getLogger("torch.export").setLevel(logging.ERROR)
        program = torch.export.export(
            graph, (), example(run, 3, 5, min(2, run.config.model.recent_events)), dynamic_shapes=_shapes(run),
            strict=False,
        )  # fmt: skip
        torch.export.save(program, path)
        _check_equal(run, graph, torch.export.load(path).module())
        if is_compiled:
            _compile(program, path.with_name(COMPILED))
            _check_equal(run, graph, torch._inductor.aoti_load_package(str(path.with_name(COMPILED))))
    (partial / "items.json").write_text(json.dumps(run.catalogue.ids.tolist()))
    (partial / "metadata.json").write_text(json.dumps(metadata(run, is_compiled), indent=2) + "\n")
    if out.exists():
        out.rmdir()
    partial.replace(out)
    return out / path.name


def _shapes(run: Run) -> dict[str, dict[int, Any]]:
    """Which dimensions of which inputs may be of any size."""
    sizes = {
        "B": torch.export.Dim("users", min=1, max=MOST_USERS),
        "C": torch.export.Dim("candidates", min=1, max=MOST_CANDIDATES),
        "R": torch.export.Dim("recent", min=1, max=max(run.config.model.recent_events, 2)),
    }
    return {one.name: {n: sizes[s] for n, s in enumerate(one.shape) if isinstance(s, str)} for one in inputs_of(run)}


def _compiler() -> str:
    """The C++ compiler that torch calls."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def _compile(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compile a program. Raises CheckpointError."""
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # of many kinds: torch's own, and whatever its compiler's end makes of it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"torch {torch.__version__} could not compile the ranking with {_compiler()}: {reason}; "
            "leave out --compile, or choose another compiler by the variable CXX"
        ) from error


def _check_equal(run: Run, graph: RankingGraph, loaded: Callable[..., Tensor]) -> None:
    for number, (users, candidates, recent) in enumerate(EXAMPLES):
        size = None if recent is None else min(recent, run.config.model.recent_events)
        given = example(run, users, candidates, size, number)
        difference = float((loaded(**given) - graph(**given)).abs().max())
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"{run.folder}: torch {torch.__version__} made a program whose scores differ by {difference:.2g} from "
                "the model's; use another version of torch, or the server"
            )


def metadata(run: Run, is_compiled: bool = False) -> dict[str, Any]:
    """What a caller must know who has no vista."""
    columns = [asdict(column) for column in run.schema.context]
    compiled = {"file": COMPILED, "processor": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads()}  # fmt: skip
    return {
        "model_version": run.version,
        "made_by": {"vista": version_of("vista-recsys"), "torch": torch.__version__},
        "compiled": compiled if is_compiled else None,
        "inputs": [asdict(one) for one in inputs_of(run)],
        "output": {"shape": ["B", "C", "T"], "dtype": "float64", "meaning": "a probability per task"},
        "most": {"B": MOST_USERS, "C": MOST_CANDIDATES, "R": run.config.model.recent_events},
        "tasks": list(run.schema.tasks),
        "actions": [None, *run.schema.actions],
        "context": {"columns": columns, "category_buckets": NUM_CONTEXT_BUCKETS},
        "items": {
            "file": "items.json",
            "first_index": run.catalogue.first_item,
            "unknown": {"first_index": 1, "number": run.catalogue.num_unknown_buckets},
        },
        "hash": "integers: splitmix64; strings: BLAKE2b of the UTF-8 bytes, 8 bytes, little-endian; modulo the number",
    }
