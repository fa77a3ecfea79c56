"""The engine within a process: the contract of a store, and that a name is all it goes by."""

from __future__ import annotations

import pytest

from tests.contracts.store import V1, StoreContract, fill, tokens_of
from vista.store.contract import open_store


class TestMemoryContract(StoreContract):
    @pytest.fixture
    def url(self, tmp_path) -> str:
        return f"memory:{tmp_path}"


def test_a_name_is_a_store_wherever_it_is_opened_in_the_process(tmp_path):
    with open_store(f"memory:{tmp_path}") as one, open_store(f"memory:{tmp_path}", read_only=True) as same:
        fill(one, V1, b"a")
        assert same.get_many("tokens", [b"a"], V1) == [tokens_of(V1, b"a")]
        with open_store(f"memory:{tmp_path} too") as other:
            assert other.versions() == []
