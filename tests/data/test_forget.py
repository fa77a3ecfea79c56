"""Events removed from prepared data: what is left is what preparing a log gives that never had them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.data.small_logs import SECOND_US, START_S, Request, histories_of, prepared, requests_of, small_log
from vista.data import forget as module
from vista.data.arrays import save_array
from vista.data.forget import Selection, alone, begin, find_removal, swap, write_changed
from vista.data.histories import PreparedData
from vista.data.prepare import verify
from vista.errors import ConfigError, DataError, StaleOutput
from vista.progress import Progress

MOMENT_S = START_S + 150
SELECTIONS = {
    "item": Selection((3,), item=104),
    "item of several": Selection((3, "5", 8), item=111),
    "before": Selection((3,), before_us=MOMENT_S * SECOND_US),
    "before, several": Selection((1, 8), before_us=MOMENT_S * SECOND_US),
    "all": Selection((3,), everything=True),
    "all of the first and the last": Selection((1, 8), everything=True),
}


@pytest.fixture(params=SELECTIONS)
def selection(request: pytest.FixtureRequest) -> Selection:
    return SELECTIONS[request.param]


@pytest.fixture(params=[7, 1_000_000], ids=["in small parts", "at once"])
def _parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", request.param)


def is_selected(selection: Selection, user: Any, item: Any, time_us: int) -> bool:
    """Written apart from the code: by original ids, event by event."""
    if str(user) not in map(str, selection.users):
        return False
    if selection.item is not None:
        return str(item) == str(selection.item)
    return selection.before_us is None or time_us < selection.before_us


def remove(data: PreparedData, selection: Selection) -> PreparedData:
    write_changed(data, find_removal(data, selection), quiet=True)
    swap(data.folder)
    return PreparedData.open(data.folder)


def shown_log(seed: int = 0) -> pl.DataFrame:
    """Impressions of the same users and items, a few per moment, with two labels and a context column."""
    random = np.random.default_rng(seed)
    rows = 300
    user = np.append(3, random.integers(1, 9, rows - 1))
    item = np.append(104, random.integers(100, 120, rows - 1))
    return pl.DataFrame({
        "user_id": user, "item_id": item,
        "timestamp": START_S + random.integers(0, 40, rows) * 10,
        "click": random.integers(0, 2, rows), "buy": random.integers(0, 2, rows),
        "place": random.random(rows), "best_score_click": random.random(rows), "best_score_buy": random.random(rows),
    })  # fmt: skip


def columns(data: PreparedData) -> dict[str, np.ndarray]:
    """All arrays of a data folder, by path."""
    return {str(path.relative_to(data.folder)): np.load(path) for path in sorted(data.folder.rglob("*.npy"))}


@pytest.mark.usefixtures("_parts")
def test_with_given_impressions_it_is_as_if_prepared_without(tmp_path: Path, selection: Selection) -> None:
    """Every array, the users and the statistics."""
    events, shown = small_log(), shown_log()
    rules = {"context": ("place",), "tasks": ("click", "buy"), "keep_duplicates": True,
             "validation_from": str(START_S + 250), "test_from": str(START_S + 320)}  # fmt: skip
    data = prepared(tmp_path, events, impressions=shown, **rules)
    keep = {
        name: [
            not is_selected(selection, user, item, time_s * SECOND_US)
            for user, item, time_s in table.select("user_id", "item_id", "timestamp").iter_rows()
        ]
        for name, table in (("events", events), ("shown", shown))
    }
    assert not all(keep["events"])
    assert not all(keep["shown"])
    wanted = prepared(
        tmp_path, events.filter(keep["events"]), impressions=shown.filter(keep["shown"]),
        catalogue=str(data.folder), **rules,
    )  # fmt: skip
    found = remove(data, selection)
    for name, array in columns(wanted).items():
        np.testing.assert_array_equal(columns(found)[name], array, name)
        assert columns(found)[name].dtype == array.dtype
    assert found.user_ids.tolist() == wanted.user_ids.tolist()
    assert found.manifest.statistics == wanted.manifest.statistics
    assert verify(found.folder) == found.manifest
    assert sorted(p.name for p in found.folder.iterdir()) == sorted(p.name for p in wanted.folder.iterdir())


def left_of(request: Request, selection: Selection, events: list[tuple[Any, Any, int]]) -> Request | None:
    """A request made from events after some of its user's events are removed, or None."""
    if str(request.user) not in map(str, selection.users):
        return request
    if selection.item is None and is_selected(selection, request.user, None, request.time_us):
        return None
    gone = [time_us for item, _, time_us in events if is_selected(selection, request.user, item, time_us)]
    met = {
        item for item, _, time_us in events
        if time_us < request.time_us and not is_selected(selection, request.user, item, time_us)
    }  # fmt: skip
    stay = [
        n for n, (item, source) in enumerate(zip(request.items, request.sources, strict=True))
        if str(item) != str(selection.item) and (source != "history" or item in met)
    ]  # fmt: skip
    if request.positive not in [request.items[n] for n in stay] or len(stay) < 2:
        return None
    names = ("items", "indices", "labels", "sources", "context")
    cut = {name: tuple(getattr(request, name)[n] for n in stay) for name in names}
    return replace(request, **cut, num_known=request.num_known - sum(time_us < request.time_us for time_us in gone))


@pytest.mark.usefixtures("_parts")
def test_requests_made_from_events_go_with_their_positive(tmp_path: Path, selection: Selection) -> None:
    """And negatives from the user's own past with the events that made them so."""
    data = prepared(tmp_path, small_log(items=12), popularity_negatives=1, history_negatives=2)
    histories, requests = histories_of(data), requests_of(data)
    found = remove(data, selection)
    left = [left_of(request, selection, histories[request.user]) for request in requests]
    assert None in left
    if selection.before_us:
        assert any(
            now and now.sources.count("history") < was.sources.count("history")
            for was, now in zip(requests, left, strict=True)
        ), "no negative lost its past"
    assert requests_of(found) == [request for request in left if request is not None]
    wanted = {
        user: [(item, action, us) for item, action, us in events if not is_selected(selection, user, item, us)]
        for user, events in histories.items()
        if not (selection.everything and is_selected(selection, user, None, 0))
    }
    assert histories_of(found) == wanted
    verify(found.folder)


def test_only_what_changes_is_written(tmp_path: Path) -> None:
    data = prepared(tmp_path, small_log())
    before = {path: path.stat().st_ino for path in data.folder.rglob("*") if path.is_file()}
    remove(data, Selection((3,), item=104))
    same = {str(path.relative_to(data.folder)) for path, inode in before.items() if path.stat().st_ino == inode}
    assert {"catalogue.safetensors", "users.parquet"} <= same
    assert not any(name.startswith("events") for name in same)


def test_nothing_to_remove_changes_nothing(tmp_path: Path) -> None:
    data = prepared(tmp_path, small_log())
    before = {path: path.read_bytes() for path in data.folder.rglob("*") if path.is_file()}
    for nothing in (Selection(("nobody",), everything=True), Selection((3,), before_us=1), Selection((99,), item=104)):
        assert find_removal(data, nothing).is_empty
        remove(data, nothing)
    assert {path: path.read_bytes() for path in data.folder.rglob("*") if path.is_file()} == before


def test_a_user_of_whom_a_request_is_left_stays_and_is_cold(tmp_path: Path) -> None:
    """As in `vista prepare`; without requests, the user goes."""
    events = pl.DataFrame({"user_id": [1, 1, 2], "item_id": [5, 6, 5], "timestamp": [START_S + n for n in range(3)]})
    shown = pl.DataFrame({"user_id": [1, 2], "item_id": [6, 6], "timestamp": [START_S + 9] * 2, "click": [0, 1]})
    data = prepared(tmp_path, events, impressions=shown, validation_from="2100-01-01", test_from="2100-01-01")
    found = remove(data, Selection((2,), item=5))
    assert found.user_ids.tolist() == [1, 2]
    assert found.histories.lengths().tolist() == [2, 0]
    assert found.impressions("train").num_known.tolist() == [2, 0]
    assert remove(found, Selection((2,), before_us=(START_S + 100) * SECOND_US)).user_ids.tolist() == [1]


# -- what is refused


@pytest.mark.parametrize("given", [{}, {"item": 1, "before_us": 5}, {"item": 1, "everything": True}])
def test_which_events_is_said_once(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give exactly one of --item, --before and --all"):
        Selection((1,), **given)
    with pytest.raises(ConfigError, match="no user"):
        Selection((), everything=True)


def test_an_item_that_the_catalogue_does_not_hold(tmp_path: Path) -> None:
    data = prepared(tmp_path, small_log())
    with pytest.raises(DataError, match=r"--item 999: not in the catalogue .* share unknown bucket \d+ .*--before"):
        find_removal(data, Selection((3,), item=999))


def test_no_event_left(tmp_path: Path) -> None:
    data = prepared(tmp_path, small_log())
    with pytest.raises(DataError, match=r"no event would be left; remove the folder, and the store"):
        find_removal(data, Selection(tuple(range(1, 9)), everything=True))


def test_a_folder_that_is_being_changed_is_refused(tmp_path: Path) -> None:
    data = prepared(tmp_path, small_log())
    assert data.histories.num_users == 8
    begin(data.folder, "{}")
    with pytest.raises(StaleOutput, match=r"forget.json.*run it again"):
        PreparedData.open(data.folder)
    with pytest.raises(StaleOutput, match="run it again"):
        data.impressions("train")  # opened before, read after


def test_who_opened_the_folder_before_does_not_mix_old_and_new(tmp_path: Path) -> None:
    """A training under way would take the users of new requests for others of the old histories."""
    data = prepared(tmp_path, small_log())
    log = data.histories
    remove(PreparedData.open(data.folder), Selection((3,), everything=True))
    for read in (lambda: data.impressions("train"), lambda: data.user_ids, lambda: PreparedData(*pair(data)).histories):
        with pytest.raises(StaleOutput, match="was changed by vista forget since it was opened"):
            read()
    assert log.num_users == 8  # what it has mapped stays as it was


def pair(data: PreparedData) -> tuple[Path, Any]:
    return data.folder, data.manifest


def test_one_at_a_time(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(DataError, match="another vista forget works here"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepared(tmp_path, small_log())

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_array", full)
    with pytest.raises(DataError, match="the disk is full; nothing was changed"):
        write_changed(data, find_removal(data, Selection((3,), everything=True)), quiet=True)
    verify(data.folder)
    assert not (data.folder / module.PARTIAL).exists()


@pytest.mark.parametrize("shape", [(11,), (11, 3), (11, 0)])
@pytest.mark.parametrize("gone", [[], [0], [10], [2, 3, 4, 8], list(range(11))])
def test_copied_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], gone: list[int]) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 4)
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    save_array(tmp_path / "a.npy", array)
    with Progress("copy", quiet=True) as progress:
        rows = np.array(gone, np.int64)
        module.copy_rows(tmp_path / "a.npy", tmp_path / "b.npy", rows, None, progress)
        module.copy_rows(tmp_path / "a.npy", tmp_path / "c.npy", rows, lambda block, first: block + first, progress)
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), np.delete(array, gone, 0))
    raised = array + (np.arange(11) // 4 * 4).reshape(-1, *[1] * (len(shape) - 1))
    np.testing.assert_array_equal(np.load(tmp_path / "c.npy"), np.delete(raised, gone, 0))
