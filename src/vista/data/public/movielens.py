"""MovieLens: people rate films. The log that most published tables use; its histories are short.

Read from a local copy, in the form GroupLens publishes (``ratings.dat`` and ``movies.dat``, or ``ratings.csv`` and
``movies.csv``) or as Parquet (``events.parquet`` with user_id, item_id, rating, ts), or downloaded. A user's ratings
come in sittings of many a minute, entered from memory: the log is about taste, not about the order of consumption.

The licence of MovieLens forbids passing the data on; what is converted is for your own research.
"""

from __future__ import annotations

import tempfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from vista.data.public.folder import read_columns, write_dataset
from vista.errors import ConfigError, DataError, nearest
from vista.progress import Progress

URL = "https://files.grouplens.org/datasets/movielens/{variant}.zip"
VARIANTS = ("ml-latest-small", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m", "ml-latest")
NO_GENRE = "(no genres listed)"
CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60
SEPARATOR = "::"  # of the .dat files


@dataclass(frozen=True)
class MovielensOptions:
    """variant: what to download where there is no local copy.

    exact_times: leave out users with a time that is not exact (a column ts_src that is not 0 for one of their ratings).
    """

    variant: str = "ml-1m"
    exact_times: bool = False

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ConfigError(f"--variant {self.variant!r}: unknown{nearest(self.variant, VARIANTS)}")


def convert_movielens(out: Path, source: Path | None = None, options: MovielensOptions | None = None) -> dict[str, Any]:
    """Convert a copy into a new folder; what is in its dataset.json.

    source: a folder as GroupLens or the Parquet form has it; without it the data is downloaded and removed afterwards.
    Raises DataError for a source that is none of these, for a failed download, and when no rating is left.
    """
    options = options or MovielensOptions()
    if source is None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".movielens-", dir=out.parent) as folder:
            ratings, films = _read(download(options.variant, Path(folder)))
        name = options.variant
    else:
        ratings, films = _read(source)
        name = source.resolve().name
    described: dict[str, Any] = {"source": name, "exact_times": options.exact_times}
    tables: dict[str, pl.LazyFrame | pl.DataFrame] = {"events": _events(ratings, options), "items": _items(films)}
    return write_dataset(out, "movielens", tables, described)


def download(variant: str, folder: Path) -> Path:
    """Fetch and unpack one variant; its folder. Raises DataError, saying what to do without a network."""
    url, archive = URL.format(variant=variant), folder / "archive.zip"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, archive.open("wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            with Progress(f"movielens: {variant}", total=size or None, unit="bytes") as progress:
                while chunk := response.read(CHUNK_BYTES):
                    file.write(chunk)
                    progress.advance(len(chunk))
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(
            f"cannot download {url}: {reason}. Fetch it elsewhere, unpack it, and give --from FOLDER"
        ) from error
    except zipfile.BadZipFile as error:
        raise DataError(f"{url} is not a zip archive ({error}); try again, or give --from FOLDER") from error
    archive.unlink()
    folders = [path for path in folder.iterdir() if path.is_dir()]
    if len(folders) != 1:
        raise DataError(f"{url}: {len(folders)} folders in the archive, expected one; give --from FOLDER")
    return folders[0]


def _read(source: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Ratings (user_id, item_id, rating as text, ts, and pos, ts_src where known) and films (item_id, genres)."""
    if (source / "events.parquet").is_file():
        return _ratings_parquet(source / "events.parquet"), _films(source)
    if (source / "ratings.csv").is_file():
        ratings = read_columns(source / "ratings.csv", ("userId", "movieId", "rating", "timestamp"))
        ratings = ratings.rename({"userId": "user_id", "movieId": "item_id", "timestamp": "ts"})
        return ratings.with_columns(_as_text(pl.col("rating"))), _films(source)
    if (source / "ratings.dat").is_file():
        ratings = _dat(source / "ratings.dat", ("user_id", "item_id", "rating", "ts"))
        whole = [pl.col(name).cast(pl.Int64) for name in ("user_id", "item_id", "ts")]
        return ratings.with_columns(*whole, _as_text(pl.col("rating").cast(pl.Float64))), _films(source)
    raise DataError(
        f"{source}: no ratings.csv, ratings.dat or events.parquet; give the unpacked folder of a MovieLens archive"
    )


def _as_text(rating: pl.Expr) -> pl.Expr:
    """4.0 as "4", 4.5 as "4.5"."""
    return rating.cast(pl.Float64).cast(pl.String).str.strip_suffix(".0").alias("rating")


def _ratings_parquet(path: Path) -> pl.DataFrame:
    ratings = read_columns(path, ("user_id", "item_id", "ts"))
    if "rating" in ratings.columns:
        return ratings.with_columns(_as_text(pl.col("rating")))
    if "rating_x2" in ratings.columns:
        return ratings.with_columns(_as_text(pl.col("rating_x2").cast(pl.Float64) / 2)).drop("rating_x2")
    raise DataError(f"{path}: neither a column rating nor rating_x2; is it the right file?")


def _films(source: Path) -> pl.DataFrame:
    """item_id and genres, separated by a bar."""
    if (source / "items.parquet").is_file():
        return read_columns(source / "items.parquet", ("item_id", "genres")).select("item_id", "genres")
    if (source / "movies.csv").is_file():
        films = read_columns(source / "movies.csv", ("movieId", "genres"))
        return films.select(pl.col("movieId").alias("item_id"), "genres")
    if (source / "movies.dat").is_file():
        films = _dat(source / "movies.dat", ("item_id", "title", "genres"))
        return films.select(pl.col("item_id").cast(pl.Int64), "genres")
    raise DataError(f"{source}: no movies.csv, movies.dat or items.parquet; give the whole unpacked folder")


def _dat(path: Path, columns: tuple[str, ...]) -> pl.DataFrame:
    """A table with ``::`` between columns, UTF-8 or Latin 1. Raises DataError naming the first line that is not one."""
    content, rows = path.read_bytes(), []
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):  # other ends of lines may stand in a title
        cells = line.rstrip("\r").split(SEPARATOR)
        if len(cells) != len(columns):
            raise DataError(
                f"{path}, row {number}: {len(cells)} columns, expected {len(columns)} ({', '.join(columns)})"
            )
        rows.append(cells)
    return pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row")


def _events(ratings: pl.DataFrame, options: MovielensOptions) -> pl.DataFrame:
    """In order of user and time, in epoch milliseconds.

    Where the order within a user is known better than the times (a column pos), it rules: no event lies before the one
    in front of it, and events of one second are a millisecond apart, so that each is a moment of its own.
    """
    if options.exact_times and "ts_src" in ratings.columns:
        ratings = ratings.filter((pl.col("ts_src") == 0).all().over("user_id"))
    time_ms = pl.col("ts").cast(pl.Int64) * 1000
    if "pos" in ratings.columns:
        ratings = ratings.sort("user_id", "pos", maintain_order=True).with_columns(
            time_ms=time_ms.cum_max().over("user_id")
        )
        place = pl.int_range(pl.len()).over("user_id", "time_ms")
        ratings = ratings.with_columns(pl.col("time_ms") + place)
    else:
        ratings = ratings.with_columns(time_ms=time_ms).sort("user_id", "time_ms", maintain_order=True)
    return ratings.select(
        pl.col("user_id").cast(pl.Int64),
        pl.col("item_id").cast(pl.Int64),
        pl.col("time_ms").alias("timestamp"),
        pl.col("rating").alias("action"),
    )


def _items(films: pl.DataFrame) -> pl.DataFrame:
    """item_id, category (the first genre), and 0 or 1 for each genre."""
    listed = films.select(pl.col("item_id").cast(pl.Int64), pl.col("genres").fill_null(NO_GENRE).str.split("|"))
    genres = listed["genres"].explode().unique().sort().to_list()
    has = [pl.col("genres").list.contains(genre).cast(pl.Int8).alias(_column(genre)) for genre in genres]
    return listed.select("item_id", pl.col("genres").list.first().alias("category"), *has).sort("item_id")


def _column(genre: str) -> str:
    """``Children's`` to ``genre_childrens``."""
    kept = "".join(letter for letter in genre.lower() if letter.isalnum() or letter in " -")
    return "genre_" + kept.strip().replace(" ", "_").replace("-", "_")
