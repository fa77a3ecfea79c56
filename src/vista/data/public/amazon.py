"""Amazon product reviews of 2014, 5-core: users and products with five reviews and more. Histories are short.

Read from the files as published, packed or not: ``reviews_CATEGORY_5.json.gz``, one JSON object a line, and
``meta_CATEGORY.json.gz``, one Python literal a line. An event is a review, its action the number of stars, its time the
day. A product's category is the last one on its last path, which is what the field's papers take.
"""

from __future__ import annotations

import ast
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from vista.data.public.folder import write_dataset
from vista.errors import DataError
from vista.progress import Progress

ROWS_AT_ONCE = 200_000
FIRST_S, LAST_S = 788_918_400, 1_420_070_400  # 1995-01-01 .. 2015-01-01, the years of the collection
SCHEMA = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "action": pl.String}


@dataclass(frozen=True)
class AmazonOptions:
    """category: which of the published parts, as its file is called."""

    category: str = "Electronics"


def convert_amazon(out: Path, source: Path, options: AmazonOptions | None = None) -> dict[str, Any]:
    """Convert a copy into a new folder; what is in its dataset.json.

    source: the folder that holds both files. Raises DataError for a file that is missing or ends early, and for a line
    that is not as published, naming it.
    """
    options = options or AmazonOptions()
    reviews, meta = (_find(source, name) for name in (f"reviews_{options.category}_5", f"meta_{options.category}"))
    events = _events(reviews).sort("user_id", "timestamp", maintain_order=True)
    items = events.select("item_id").unique().join(_categories(meta), on="item_id", how="left").sort("item_id")
    described = {"source": source.resolve().name, "category": options.category}
    name = f"amazon-{options.category.lower()}"
    return write_dataset(out, name, {"events": events, "items": items}, described)


def _find(source: Path, name: str) -> Path:
    for path in (source / f"{name}.json.gz", source / f"{name}.json"):
        if path.is_file():
            return path
    raise DataError(f"{source}: neither {name}.json.gz nor {name}.json; fetch both files of the category of 2014")


def _events(path: Path) -> pl.DataFrame:
    frames, rows = [pl.DataFrame(schema=SCHEMA)], []
    for number, line in _lines(path, "reviews"):
        rows.append(_read(path, number, line, _review))
        if len(rows) == ROWS_AT_ONCE:
            frames.append(pl.DataFrame(rows, schema=SCHEMA, orient="row"))
            rows = []
    return pl.concat([*frames, pl.DataFrame(rows, schema=SCHEMA, orient="row")])


def _review(line: str) -> tuple[str, str, int, str]:
    review = json.loads(line)
    time_s, stars = review["unixReviewTime"], review["overall"]
    if not (isinstance(time_s, int) and FIRST_S <= time_s <= LAST_S):
        raise ValueError(f"unixReviewTime {time_s!r} is not in 1995 .. 2014 in epoch seconds")
    return str(review["reviewerID"]), str(review["asin"]), time_s, f"{stars:g}"


def _categories(path: Path) -> pl.DataFrame:
    """item_id and category of every product that names one; one row each."""
    rows = [_read(path, number, line, _product) for number, line in _lines(path, "products")]
    found = pl.DataFrame(rows, schema={"item_id": pl.String, "category": pl.String}, orient="row")
    return found.unique("item_id", keep="first", maintain_order=True)


def _product(line: str) -> tuple[str, str | None]:
    product = ast.literal_eval(line)
    paths = product.get("categories") or [[]]
    return str(product["asin"]), (paths[-1][-1] if paths[-1] else None)


def _read(path: Path, number: int, line: str, parse: Callable[[str], Any]) -> Any:
    """What a line says. Raises DataError naming it where it says something else."""
    try:
        return parse(line)
    except KeyError as error:
        raise DataError(f"{path}, line {number}: no field {error}; is it the file of 2014 as published?") from error
    except (ValueError, TypeError, SyntaxError, AttributeError, IndexError) as error:
        raise DataError(f"{path}, line {number}: {error}; is it the file of 2014 as published?") from error


def _lines(path: Path, unit: str) -> Iterator[tuple[int, str]]:
    """The lines that hold something, numbered from 1. Raises DataError for an archive that ends early."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with (
            opener(path, "rt", encoding="utf-8") as file,
            Progress(f"amazon: {path.name}", unit=unit) as progress,
        ):
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
                progress.advance()
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read to its end ({error}); it is damaged or truncated, fetch it again"
        ) from error
