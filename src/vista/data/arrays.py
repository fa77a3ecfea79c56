"""Writing the .npy files of prepared data: arrays that grow, checksums, and a disk that fills."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from vista.data.tables import is_full_disk
from vista.errors import DataError


class ArrayWriter:
    """A .npy file that is written row by row, its length known only at the end. row_shape: () for one dimension.

    Leaves numpy's own ``tofile`` aside: on a full disk that says how many values it wrote, not that the disk is full.
    """

    def __init__(self, path: Path, dtype: np.typing.DTypeLike, row_shape: tuple[int, ...] = ()) -> None:
        self.dtype, self.row_shape = np.dtype(dtype), row_shape
        self.length = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        # numpy pads the header so that a longer first dimension fits in its place
        shape = (self.length, *self.row_shape)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        self.length += len(values)

    def close(self) -> None:
        """Write the true length into the header."""
        if self._file.closed:
            return
        end = self._file.tell()
        self._file.seek(0)
        self._write_header()
        num_bytes = self.length * math.prod(self.row_shape) * self.dtype.itemsize
        assert end == self._file.tell() + num_bytes, "the header changed its size"
        self._file.close()

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # what is there is of no use, and on a full disk writing on would fail again
            with suppress(OSError):
                self._file.close()


def save_array(path: Path, array: np.ndarray) -> None:
    """Write one whole array, of any shape, as .npy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.tobytes())


def read_shape(path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of a .npy file."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return shape, dtype


def read_slice(path: Path, first: int, end: int) -> np.ndarray:
    """Rows first .. end - 1 of a .npy file, read rather than mapped.

    Mapped pages count as resident memory for as long as the kernel likes; a pass over a large log should not.
    """
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        (_, *row_shape), _, dtype = np.lib.format.read_array_header_1_0(file)
        width = math.prod(row_shape)
        values = np.fromfile(file, dtype, (end - first) * width, offset=first * width * dtype.itemsize)
        return values.reshape(end - first, *row_shape)


def ragged_rows(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """All positions starts[i] .. starts[i] + lengths[i] - 1, one range after another, as one int64 array."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(np.asarray(starts, np.int64) - (ends - lengths), lengths)


def search_ranges(values: np.ndarray, first: np.ndarray, end: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Per row, the first place in first .. end whose value is not below the row's limit (end where there is none).

    values: ascending within each range. A binary search in many ranges at once.
    """
    low, high = first.copy(), end.copy()
    while (is_open := low < high).any():
        middle = (low + high) // 2
        is_below = np.zeros(len(low), bool)
        is_below[is_open] = values[middle[is_open]] < limit[is_open]
        low = np.where(is_open & is_below, middle + 1, low)
        high = np.where(is_open & ~is_below, middle, high)
    return low


def chunk_bounds(lengths: np.ndarray, target: int) -> Iterator[tuple[int, int]]:
    """Cut rows of given lengths into consecutive ranges of about ``target`` in all; a longer row is its own range."""
    ends = np.cumsum(lengths, dtype=np.int64)
    first = 0
    while first < len(lengths):
        done = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + target, side="right")))
        yield first, last
        first = last


def checksums(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file, by its path relative to the folder."""
    sums = {}
    for path in sorted(paths):
        with path.open("rb") as file:
            sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


@contextmanager
def reporting_full_disk(folder: Path) -> Iterator[None]:
    """Turn whatever a library raises on a full disk into a DataError that says where."""
    try:
        yield
    except Exception as error:
        if is_full_disk(error):
            raise DataError(
                f"{folder}: the disk is full, or a limit on the size of files is reached; nothing was kept. Prepared "
                "data needs about 20 bytes per event and as much again while it is made: free some space or choose "
                "another --out"
            ) from error
        raise
