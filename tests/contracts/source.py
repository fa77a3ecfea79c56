"""The contract of an event log (``vista.jobs.sources.contract``), for every one: a test class says how to fill it."""

from __future__ import annotations

import pytest

from vista.errors import SourceError
from vista.jobs.sources.contract import Entry, EventSource


class SourceContract:
    """What every log must do. Fixture ``source``: open, with partitions 0 and 1, perhaps more, but not 5."""

    def add(self, partition: int, values: list[bytes]) -> None:
        raise NotImplementedError("a log's test class has a method `add`")

    def read(self, source: EventSource, number: int) -> list[Entry]:
        """So many entries, and then nothing."""
        found: list[Entry] = []
        while len(found) < number:
            found += source.read(3, 10)
        assert source.read(3, 0.2) == []
        return found

    def test_entries_come_in_order_with_rising_offsets(self, source):
        self.add(0, [b"a%d" % n for n in range(7)])
        self.add(1, [b"b%d" % n for n in range(4)])
        assert source.partitions()[:2] == [0, 1]
        source.start({0: 0, 1: 0})
        found = self.read(source, 11)
        for partition, letter, number in ((0, b"a", 7), (1, b"b", 4)):
            own = [entry for entry in found if entry.partition == partition]
            assert [entry.value for entry in own] == [letter + b"%d" % n for n in range(number)]
            offsets = [offset for entry in own for offset in (entry.offset, entry.next_offset)]
            assert offsets == sorted(offsets)
            assert source.ends()[partition] == own[-1].next_offset

    def test_reading_starts_at_any_offset_again_and_again(self, source):
        self.add(0, [b"%d" % n for n in range(6)])
        source.start({0: 0})
        first = self.read(source, 6)
        for place in (2, 5, 0):
            source.start({0: first[place].offset if place else 0})
            assert self.read(source, 6 - place) == first[place:]
            source.start({0: first[place].next_offset})
            assert self.read(source, 5 - place) == first[place + 1 :]

    def test_what_is_behind_is_counted_and_looked_at_without_reading(self, source):
        self.add(0, [b"%d" % n for n in range(6)])
        source.start({0: 0})
        assert source.num_behind({0: 0, 1: 0}) == {0: 6, 1: 0}
        first = self.read(source, 6)
        assert source.num_behind({0: first[3].next_offset}) == {0: 2}
        assert source.peek(0, first[4].offset) == first[4]
        assert source.peek(0, first[5].next_offset) is None
        self.add(0, [b"6"])
        assert source.num_behind({0: first[3].next_offset}) == {0: 3}
        assert [entry.value for entry in self.read(source, 1)] == [b"6"]

    def test_acknowledging_takes_nothing_away(self, source):
        self.add(0, [b"%d" % n for n in range(4)])
        source.start({0: 0})
        first = self.read(source, 4)
        source.acknowledge({0: first[2].next_offset, 1: 0})
        source.start({0: first[1].offset})
        assert self.read(source, 3) == first[1:]

    def test_only_partitions_that_are_there_can_be_read(self, source):
        with pytest.raises(SourceError, match="there is no partition 5"):
            source.start({5: 0})
        source.start({})
        assert source.read(3, 0) == []
