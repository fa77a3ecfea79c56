"""Exported summaries: a folder of Parquet files that any tool reads, and what is known of it.

    OUT/
      part-00000.parquet ...   the summaries of so many users each; a file is there when it is complete
      _export.json             `ExportFacts`; says at the end that all parts are there
      _cold_start.npy          (K, D) float32, the tokens of a user without events
      _tokens.npy              made by `vista.data.features` on first use: all tokens, to be memory-mapped

Columns: user_id; as_of (timestamp, microseconds UTC): everything in the row happened strictly before it; newest
(timestamp): the time of the newest event in the summary, null for none; num_events, span_us: of the events in it;
tokens: K x D numbers, row by row, as a list of fixed size. A user's rows are in order of time; rows of users that were
read together alternate. The file's metadata holds the facts under the key ``vista``.

Shape letters: M summaries, K summary tokens, D width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from vista.errors import DataError, StaleOutput
from vista.files import sync, write_durably

FACTS_FILE, COLD_START_FILE, TOKENS_FILE = "_export.json", "_cold_start.npy", "_tokens.npy"
CODECS: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
}  # what Parquet has a type for
ROW_GROUP_BYTES = 16 << 20  # of tokens: what a writer and a reader hold at a time
MOMENT = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class ExportFacts:
    """What an export holds. data, requests: fingerprints of what it was made from; requests empty: of none."""

    version: str
    as_of: str
    codec: str
    num_tokens: int
    width: int
    num_parts: int
    users_per_part: int
    has_integer_ids: bool
    data: str
    requests: str = ""
    is_complete: bool = False

    def save(self, folder: Path) -> None:
        write_durably(folder / FACTS_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> ExportFacts:
        """Raises StaleOutput where no export was begun, DataError for facts that cannot be read."""
        path = folder / FACTS_FILE
        if not path.exists():
            raise StaleOutput(f"{folder} has no {FACTS_FILE}: no exported summaries; run: vista export")
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); remove {folder} and export again") from error

    def difference(self, other: ExportFacts) -> str:
        """The first fact that differs, in words, or an empty string; completeness aside."""
        for f in fields(self):
            ours, theirs = getattr(self, f.name), getattr(other, f.name)
            if ours != theirs and f.name != "is_complete":
                return f"{f.name} {ours!r}, not {theirs!r}"
        return ""


@dataclass(frozen=True)
class Summaries:
    """M summaries as exported: user_id, as_of_us, newest_us (-1: none), num_events, span_us (M,); tokens (M, K, D)."""

    user_id: np.ndarray
    as_of_us: np.ndarray
    newest_us: np.ndarray
    num_events: np.ndarray
    span_us: np.ndarray
    tokens: np.ndarray


def begin_export(folder: Path, facts: ExportFacts, cold_start: np.ndarray) -> list[int]:
    """Make ``folder`` ready; the parts that are still to be written.

    Raises StaleOutput for a folder with something else in it: other facts, or no export at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / FACTS_FILE).exists():
        difference = ExportFacts.load(folder).difference(facts)
        if difference:
            raise StaleOutput(f"{folder} holds another export: {difference}; remove it, or choose another --out")
    elif any(folder.iterdir()):
        raise StaleOutput(f"{folder} is not empty and holds no export: remove it, or choose another --out")
    else:
        facts.save(folder)
    partial = folder / (COLD_START_FILE + ".partial")
    with partial.open("wb") as file:
        np.save(file, np.asarray(cold_start, np.float32))
    partial.replace(folder / COLD_START_FILE)
    return [part for part in range(facts.num_parts) if not part_path(folder, part).exists()]


def end_export(folder: Path, facts: ExportFacts) -> None:
    """Say that all parts are there."""
    replace(facts, is_complete=True).save(folder)


def part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.parquet"


def write_part(folder: Path, part: int, facts: ExportFacts, blocks: Iterable[Summaries]) -> int:
    """Write one part, row group by row group; it has its name when it is complete. Returns the rows."""
    path = part_path(folder, part)
    partial = path.with_name(f".{path.name}.partial")
    schema = _schema(facts)
    num_rows = 0
    waiting: list[pa.Table] = []
    try:
        with pq.ParquetWriter(partial, schema, compression="none", use_dictionary=["user_id"]) as writer:
            for block in blocks:
                waiting.append(_table(block, facts, schema))
                num_rows += len(block.as_of_us)
                if sum(table.nbytes for table in waiting) >= ROW_GROUP_BYTES:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting = []
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
        sync(partial)
        partial.replace(path)
        sync(folder)
    finally:
        partial.unlink(missing_ok=True)
    return num_rows


def _schema(facts: ExportFacts) -> pa.Schema:
    number = pa.from_numpy_dtype(CODECS[facts.codec])
    names = {"version": facts.version, "as_of": facts.as_of, "codec": facts.codec,
             "num_tokens": facts.num_tokens, "width": facts.width}  # fmt: skip
    columns = [
        ("user_id", pa.int64() if facts.has_integer_ids else pa.string()), ("as_of", MOMENT), ("newest", MOMENT),
        ("num_events", pa.int64()), ("span_us", pa.int64()),
        ("tokens", pa.list_(number, facts.num_tokens * facts.width)),
    ]  # fmt: skip
    return pa.schema(columns, metadata={"vista": json.dumps(names)})


def _table(block: Summaries, facts: ExportFacts, schema: pa.Schema) -> pa.Table:
    tokens = pa.array(_narrow(block.tokens, facts.codec))
    columns: list[Any] = [
        pa.array(block.user_id, schema.field("user_id").type),
        pa.array(block.as_of_us, pa.int64()).cast(MOMENT),
        pa.array(block.newest_us, pa.int64(), mask=block.newest_us < 0).cast(MOMENT),
        pa.array(block.num_events, pa.int64()),
        pa.array(block.span_us, pa.int64()),
        pa.FixedSizeListArray.from_arrays(tokens, type=schema.field("tokens").type),
    ]  # fmt: skip
    return pa.table(columns, schema=schema)


def _narrow(tokens: np.ndarray, codec: str) -> np.ndarray:
    """Tokens as the codec's numbers, flat. Raises DataError for what it cannot hold."""
    if not np.isfinite(tokens).all():
        raise DataError("tokens hold a value that is not finite: the model has diverged; train it again")
    largest = float(np.abs(tokens).max(initial=0.0))
    if largest > float(np.finfo(CODECS[codec]).max):
        raise DataError(f"tokens reach {largest:.6g}, more than {codec} can hold; use --codec float32")
    return tokens.astype(CODECS[codec]).ravel()


def open_export(folder: Path | str) -> tuple[ExportFacts, list[Path]]:
    """Facts and part files of a complete export. Raises StaleOutput for one that is not, or not whole."""
    folder = Path(folder)
    facts = ExportFacts.load(folder)
    parts = [part_path(folder, part) for part in range(facts.num_parts)]
    missing = [path.name for path in parts if not path.exists()]
    if missing or not facts.is_complete:
        raise StaleOutput(
            f"{folder}: the export is not complete ({len(missing)} of {len(parts)} parts are missing); run the same "
            "vista export again: it goes on where it stopped"
        )
    return facts, parts
