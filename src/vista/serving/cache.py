"""Decoded tokens of users who were asked about lately: optional, small, and never older than what was acknowledged.

An entry goes when this process writes its user, and every entry with its model version, whose scorer owns the cache.
What other processes write is not seen; ``ttl_s`` bounds for how long.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from vista.store.record import Stored

Decoded = tuple[Stored, np.ndarray]  # a tokens record, and its tokens (K, D) float32


class TokenCache:
    """The ``max_users`` asked about last, each for at most ``ttl_s`` seconds. Threads may share it."""

    def __init__(self, max_users: int, ttl_s: float) -> None:
        self._max_users, self._ttl_s = max_users, ttl_s
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, tuple[float, Decoded]] = OrderedDict()
        self._readings: set[Reading] = set()

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """One look into cache and store. Users written meanwhile are not kept: the store may have answered before."""
        reading = Reading(self)
        with self._lock:
            self._readings.add(reading)
        try:
            yield reading
        finally:
            with self._lock:
                self._readings.remove(reading)

    def forget(self, keys: Iterable[bytes]) -> None:
        """Drop users that have been written. To be called after the write, before it is acknowledged."""
        with self._lock:
            for key in keys:
                self._entries.pop(key, None)
                for reading in self._readings:
                    reading.written.add(key)

    def get(self, key: bytes) -> Decoded | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry[0] < time.monotonic():
                return None
            self._entries.move_to_end(key)
            return entry[1]

    def put(self, key: bytes, decoded: Decoded, reading: Reading) -> None:
        stored, tokens = decoded
        with self._lock:
            if key in reading.written:
                return
            self._entries[key] = time.monotonic() + self._ttl_s, (stored, tokens.copy())
            self._entries.move_to_end(key)
            while len(self._entries) > self._max_users:
                self._entries.popitem(last=False)

    def __len__(self) -> int:
        return len(self._entries)


class Reading:
    """One look into cache and store, and what was written meanwhile."""

    def __init__(self, cache: TokenCache) -> None:
        self._cache = cache
        self.written: set[bytes] = set()

    def get(self, key: bytes) -> Decoded | None:
        return self._cache.get(key)

    def put(self, key: bytes, decoded: Decoded) -> None:
        self._cache.put(key, decoded, self)
