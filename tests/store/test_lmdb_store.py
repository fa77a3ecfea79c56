"""The embedded engine: the contract of a store, a map that grows, processes side by side, and what can go wrong."""

from __future__ import annotations

import pytest

from tests.contracts.store import StoreContract


class TestLmdbContract(StoreContract):
    @pytest.fixture
    def url(self, tmp_path) -> str:
        return f"lmdb:{tmp_path / 'store'}"


class TestLmdbContractInATinyMap(TestLmdbContract):
    """The same while the map grows every few commits."""

    @pytest.fixture(autouse=True)
    def tiny_map(self, monkeypatch) -> None:
        monkeypatch.setattr("vista.store.lmdb_store.FIRST_MAP_BYTES", 1 << 16)
