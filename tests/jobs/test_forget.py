"""Forgetting: data and store are as if the events had never been, also after a kill at any step."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.jobs.forget_worker import SELECTION, job_in
from tests.training.worlds import SMALL, write_world
from vista import api
from vista.checkpoint import Run, load_run
from vista.config import resolve
from vista.data.forget import PARTIAL, Selection, pending
from vista.data.histories import Histories, PreparedData
from vista.errors import CheckpointError, ConfigError, DataError, StaleOutput, StoreError
from vista.jobs import forget as job
from vista.jobs.fold import summarize_users
from vista.jobs.forget import Journal, absolute_url, forget
from vista.jobs.summarize import summarize
from vista.schema import JOURNAL
from vista.serving.scorer import Scorer
from vista.store.contract import SummaryStore, open_store
from vista.store.lmdb_store import LmdbStore
from vista.store.record import KINDS, Record, decode, encode, user_key
from vista.training.loop import train

CODECS = ("int8", "float16")  # of the two versions
ITEM = 5
SELECTIONS = {
    "item": Selection((103, 107), item=ITEM),
    "before": Selection((103,), before_us=10**15 + 25 * 5 * 10**9),
    "all": Selection((103, 107), everything=True),
}


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """Prepared data, two runs, and a store with the summaries of both and a border record; never changed."""
    folder = tmp_path_factory.mktemp("service")
    data = write_world(folder / "data")
    with open_store(str(folder / "store")) as store:
        for number, codec in enumerate(CODECS):
            settings = SMALL | {"train.max_steps": 4, "train.seed": number, "model.num_seeds": 4}
            run = load_run(train(data, folder / f"run{number}", resolve("tiny", overrides=settings), quiet=True))
            summarize(run, data, store, codec, quiet=True)
            for user in (103, 110):
                border = Record("border", run.version, user_key(user), 1, 1, {"memory_0": np.ones(3, np.float32)})
                store.commit([("border", border.user_key, encode(border))], run.version)
    return folder


@pytest.fixture
def service(origin, tmp_path) -> Path:
    """A copy to forget in."""
    return Path(shutil.copytree(origin, tmp_path / "service"))


def runs_of(folder: Path) -> list[Run]:
    return [load_run(path) for path in sorted(folder.glob("run*"))]


def do(folder: Path, selection: Selection, **options: Any) -> job.ForgetReport:
    return forget(folder / "data", str(folder / "store"), selection, runs_of(folder), quiet=True, **options)


def contents(store: SummaryStore) -> dict[tuple[str, str, bytes], bytes]:
    """Every record, by version, kind and user key."""
    versions = [info.version for info in store.versions()]
    return {(v, kind, key): blob for v in versions for kind in KINDS for key, blob in store.scan(kind, v)}


def stored(folder: Path) -> dict[tuple[str, str, bytes], bytes]:
    with open_store(str(folder / "store"), read_only=True) as store:
        return contents(store)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def columns(data: PreparedData, user: int) -> list[tuple[int, int, int]]:
    """A user's events as (item, action, time)."""
    index, log = data.user_index(user), data.histories
    if index is None:
        return []
    mine = slice(*(int(o) for o in log.offsets[index : index + 2]))
    return list(zip(log.item[mine].tolist(), log.action[mine].tolist(), log.timestamp_us[mine].tolist(), strict=True))


def never_had(data: PreparedData, user: int, selection: Selection) -> list[tuple[int, int, int]]:
    """A user's events but for the selected ones, chosen one by one."""
    item = data.catalogue.first_item + data.catalogue.ids.tolist().index(ITEM)
    return [
        (i, a, us) for i, a, us in columns(data, user)
        if not (selection.everything or (selection.item and i == item) or (selection.before_us or 0) > us)
    ]  # fmt: skip


def fresh_records(run: Run, events: list[tuple[int, int, int]], user: int, codec: str) -> dict[str, bytes]:
    """Tokens and state from a history made here, of one user who never had other events."""
    item, action, times = np.array(events, np.int64).T
    log = Histories(np.array([0, len(events)]), item.astype(np.int32), action.astype(np.int16), times)
    records = summarize_users(run.sequence_model, log, np.array([0]), np.array([user]), run.version)
    return {record.kind: encode(record, codec) for record in records}


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_data_and_store_are_as_if_the_events_had_never_been(origin, service, selection):
    old, before = PreparedData.open(origin / "data"), stored(origin)
    report = do(service, selection)
    data, after = PreparedData.open(service / "data"), stored(service)
    keys = {user_key(user): user for user in selection.users}
    for user in old.user_ids.tolist():
        wanted = never_had(old, user, selection) if user in selection.users else columns(old, user)
        assert columns(data, user) == wanted
        assert user not in selection.users or len(wanted) < len(columns(old, user))
    for run, codec in zip(runs_of(service), CODECS, strict=True):
        for key, user in keys.items():
            left = columns(data, user)
            wanted_records = fresh_records(run, left, user, codec) if left else {}
            assert {
                kind: blob for (v, kind, k), blob in after.items() if (v, k) == (run.version, key)
            } == wanted_records
    others = {place: blob for place, blob in before.items() if place[2] not in keys}
    assert {place: blob for place, blob in after.items() if place[2] not in keys} == others
    assert len(others) == 2 * (2 * (30 - len(keys)) + 1), "tokens and states, and a border record"
    assert report.num_events == sum(len(columns(old, u)) - len(columns(data, u)) for u in selection.users) > 0
    touched = 2 * len(keys)
    assert (report.num_rebuilt, report.num_deleted) == ((0, touched) if selection.everything else (touched, 0))
    with open_store(str(service / "store")) as store:
        assert [info.num_users for info in store.versions()] == [28 if selection.everything else 30] * 2
        (ranking,) = Scorer(runs_of(service)[0], store).rank([103], [[1, 2]], 10**16)
    assert ranking.is_known_user != selection.everything
    assert ranking.num_events == len(columns(data, 103))


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_no_file_of_the_store_holds_the_old_records(origin, service, selection):
    """Whole records, and parts of their tokens, memories and recent events."""
    gone = [(p, blob) for p, blob in stored(origin).items() if p[2] in [user_key(u) for u in selection.users]]
    do(service, selection)
    after = b"".join(stored(service).values())
    before_files, files = (b"".join(files_of(f / "store").values()) for f in (origin, service))
    num_parts = 0
    for _, blob in gone:
        assert blob in before_files
        assert blob not in files
        for start in range(60, len(blob) - 40, 40):
            part = blob[start : start + 40]
            assert part in before_files
            if len(set(part)) > 8 and part not in after:  # else it says nothing, or is in what is left as well
                assert part not in files
                num_parts += 1
    assert num_parts > 20


def test_what_is_forgotten_is_not_in_the_data_files(origin, service):
    """The times of the events are in no file: here each is the only one of its kind."""
    old = PreparedData.open(origin / "data")
    wanted = never_had(old, 103, SELECTIONS["item"])
    gone = [us for item, action, us in columns(old, 103) if (item, action, us) not in wanted]
    do(service, SELECTIONS["item"])
    files = b"".join(files_of(service / "data").values())
    assert gone
    assert not any(np.int64(us).tobytes() in files for us in gone)
    assert all(np.int64(us).tobytes() in files for _, _, us in wanted)


def test_a_second_call_finds_nothing(service):
    do(service, SELECTIONS["item"])
    before, data = stored(service), files_of(service / "data")
    report = do(service, SELECTIONS["item"])
    assert (report.num_events, report.num_requests, report.num_deleted) == (0, 0, 0)
    assert (stored(service), files_of(service / "data")) == (before, data)


def test_a_store_that_still_knows_is_brought_in_line(origin, service):
    """A second store of the same data, or one that a job under way has written to: the records are made anew."""
    do(service, SELECTIONS["item"])
    wanted = stored(service)
    shutil.rmtree(service / "store")
    shutil.copytree(origin / "store", service / "store")
    assert do(service, SELECTIONS["item"]).num_events == 0
    assert stored(service) == wanted


def test_who_is_not_known_has_nothing_to_forget(service):
    before, data = stored(service), files_of(service / "data")
    for selection in (Selection(("nobody",), everything=True), Selection((9,), before_us=10**16)):
        report = do(service, selection)
        assert (report.num_events, report.num_rebuilt, report.num_deleted) == (0, 0, 0)
    assert (stored(service), files_of(service / "data")) == (before, data)


# -- what is refused, with nothing changed


def test_every_version_that_holds_the_user_needs_its_run(service):
    first, second = runs_of(service)
    before, data = stored(service), files_of(service / "data")
    place = service / "data", str(service / "store")
    with pytest.raises(ConfigError, match=rf"version {second.version} holds records of user 103, 107.*--delete-others"):
        forget(*place, SELECTION, [first], quiet=True)
    assert (stored(service), files_of(service / "data")) == (before, data)
    report = forget(*place, SELECTION, [first], delete_others=True, quiet=True)
    assert (report.num_rebuilt, report.num_deleted) == (2, 2)
    assert {p for p in before if p not in stored(service)} >= {
        (second.version, kind, user_key(user)) for user in SELECTION.users for kind in ("tokens", "state")
    }
    with open_store(place[1]) as store:
        store.delete(user_key(110), second.version)
    forget(*place, Selection((110,), item=ITEM), [first], quiet=True)  # not in the second: its run is not needed
    forget(*place, Selection((111,), everything=True), quiet=True)  # nothing to be made anew: no run is needed


def test_what_does_not_match_is_refused(service, tmp_path, monkeypatch):
    runs, data, store = runs_of(service), service / "data", str(service / "store")
    before = stored(service), files_of(data)
    with pytest.raises(StaleOutput, match="is not there"):
        forget(tmp_path / "nowhere", store, SELECTION, runs, quiet=True)
    with pytest.raises(StoreError, match="there is no store"):
        forget(data, str(tmp_path / "nowhere"), SELECTION, runs, quiet=True)
    with pytest.raises(DataError, match="--item 999: not in the catalogue"):
        forget(data, store, Selection((103,), item=999), runs, quiet=True)
    other = write_world(tmp_path / "other")
    text = (other.folder / "manifest.json").read_text()
    (other.folder / "manifest.json").write_text(text.replace("share", "buy"))
    with pytest.raises(CheckpointError, match="trained on other data"):
        forget(other.folder, store, SELECTION, runs, quiet=True)
    small = write_world(tmp_path / "small", num_users=5)
    with pytest.raises(DataError, match=r"does not know user 107, of whom .* holds records"):
        forget(small.folder, store, Selection((107,), item=ITEM), runs, quiet=True)
    assert (stored(service), files_of(data)) == before
    assert not (tmp_path / "nowhere").exists()


def test_records_that_are_not_what_they_must_be_are_found(service, monkeypatch):
    """Another process writes the old record again, behind the back of this one."""
    blobs = {place: blob for place, blob in stored(service).items() if place[2] == user_key(103)}
    do_compact = LmdbStore.compact

    def write_and_compact(store: LmdbStore) -> int:
        for (version, kind, key), blob in blobs.items():
            store.commit([(kind, key, blob)], version)
        return do_compact(store)

    with monkeypatch.context() as patch:
        patch.setattr(LmdbStore, "compact", write_and_compact)
        with pytest.raises(StoreError, match=r"user 103, model version .* did another process write"):
            do(service, SELECTIONS["item"])
    assert pending(service / "data")
    assert do(service, SELECTIONS["item"]).was_pending


def test_a_history_that_is_not_what_it_must_be_is_found(service, monkeypatch):
    """The files were swapped, and then damaged."""
    with monkeypatch.context() as patch:
        patch.setattr(job, "_histories_left", interrupted)
        with pytest.raises(KeyboardInterrupt, match="run it again"):
            do(service, SELECTIONS["item"])
    path = service / "data" / "events" / "action.npy"
    content = bytearray(path.read_bytes())
    content[-60 * 2 * 26] ^= 1  # an event of user 103
    path.write_bytes(bytes(content))
    with pytest.raises((DataError, StaleOutput), match=r"was changed|is not what it was"):
        do(service, SELECTIONS["item"])
    assert pending(service / "data")


def interrupted(*arguments: Any) -> Any:
    raise KeyboardInterrupt


def test_ctrl_c_says_what_was_kept(service, monkeypatch):
    before = files_of(service / "data")
    with monkeypatch.context() as patch:
        patch.setattr("vista.data.forget.copy_rows", interrupted)
        with pytest.raises(KeyboardInterrupt, match="nothing was changed in"):
            do(service, SELECTIONS["item"])
    assert files_of(service / "data") == before
    with monkeypatch.context() as patch:
        patch.setattr(job, "_rebuild", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"has begun \(user 103, 107: item 5\) and is not complete; run it"):
            do(service, SELECTIONS["item"])
    with pytest.raises(StaleOutput, match="run it again"):
        PreparedData.open(service / "data")


def test_a_later_forgetting_completes_the_one_before(origin, service, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(job, "_rebuild", interrupted)
        with pytest.raises(KeyboardInterrupt):
            do(service, SELECTIONS["item"])
    monkeypatch.chdir(tmp_path)
    report = do(service, Selection((110,), everything=True))
    assert (report.num_completed, report.was_pending, report.num_events) == (1, False, 60)
    wanted = Path(shutil.copytree(origin, tmp_path / "wanted"))
    do(wanted, SELECTIONS["item"])
    do(wanted, Selection((110,), everything=True))
    assert stored(service) == stored(wanted)
    assert files_of(service / "data") == files_of(wanted / "data")


def test_the_journal_is_read_as_written():
    journal = Journal(SELECTION, "lmdb:/store", {"103": "ab"}, {"v": {"103": "int8"}}, 1, 2, 3)
    assert Journal.from_json(journal.to_json()) == journal
    assert journal.is_for(Selection(("103", "107"), item="5"), "lmdb:/store")
    assert not journal.is_for(Selection(("103",), item="5"), "lmdb:/store")


def test_a_store_is_found_again_from_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert absolute_url("store") == str(tmp_path / "store")
    assert absolute_url("lmdb:a/b") == f"lmdb:{tmp_path}/a/b"
    assert absolute_url("redis://host:1/2") == "redis://host:1/2"


def test_from_python(service):
    report = api.forget(service / "data", service / "store", [103], [service / "run0", service / "run1"], item=ITEM)
    assert report.num_rebuilt == 2


# -- killed


def worker(*arguments: object) -> list[str]:
    words = [sys.executable, "-m", "tests.jobs.forget_worker", *map(str, arguments)]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def check_kills(origin: Path, place: Path, choose: Callable[[list[str]], list[int]]) -> None:
    """Kill before each of the chosen steps; what others see then; complete it; compare with a run never killed."""
    steps = worker(origin, place)
    wanted = files_of(place / "whole" / "data"), stored(place / "whole")
    numbers = choose(steps)
    assert worker(origin, place, *numbers) == [f"{number} killed" for number in numbers]
    num_refused = 0
    for number in numbers:
        folder, name = place / str(number), f"killed before step {number}, {steps[number]}"
        has_begun = (folder / "data" / JOURNAL).exists()
        try:
            PreparedData.open(folder / "data").impressions("train")
        except StaleOutput:
            assert has_begun, name
            num_refused += 1
        else:
            assert not has_begun, name
        with open_store(str(folder / "store"), read_only=True) as store:  # it serves on, whatever happened
            assert decode(store.get_many("tokens", [user_key(110)], store.published())[0]).num_events == 60
        report = job_in(folder)
        is_done = steps[number:] == ["fsync"]  # the journal is gone, and that is not yet on disk
        assert report.was_pending == (has_begun and not is_done), name
        assert (files_of(folder / "data"), stored(folder)) == wanted, name
        assert sorted(p.name for p in (folder / "store").iterdir() if p.name != "CURRENT")[1:] == [], name
        shutil.rmtree(folder)
    assert num_refused > len(numbers) / 4


def test_killed_at_a_step_of_every_kind(origin, tmp_path):
    """The first and the last step, those around the journal, and one of each kind in each part."""

    def choose(steps: list[str]) -> list[int]:
        begins = steps.index(f"open data/{JOURNAL}.partial")
        swaps = steps.index(f"os.rename data/{PARTIAL}/events/item.npy")
        moves = next(n for n, step in enumerate(steps) if step.startswith("os.mkdir store/2"))
        after_move = next(n for n, step in enumerate(steps) if n > moves and step == "after transaction")
        writes = [n for n in range(swaps, moves) if steps[n] == "after transaction"]
        ends = steps.index(f"os.remove data/{JOURNAL}")
        return sorted({
            begins // 2, begins, begins + 2, begins + 3, swaps + 1, writes[0], writes[-1], moves + 1, after_move - 1,
            *range(after_move, after_move + 8, 2), ends, ends + 1,
        })  # fmt: skip

    check_kills(origin, tmp_path, choose)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_step(origin, tmp_path):
    check_kills(origin, tmp_path, lambda steps: list(range(len(steps))))


def test_the_runs_table_of_popularity_forgets_too(tmp_path, monkeypatch):
    """What only the forgotten events knew of an item is in no table any more, after a kill before that step as well."""
    rng = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(12):
        items = rng.integers(0, 20, 40).tolist() + [99] * (10 if user == 3 else 0)  # nobody else ever met item 99
        times = np.sort(rng.integers(1_600_000_000, 1_630_000_000, len(items))).tolist()
        lines += [f"{user},{item},{time}" for item, time in zip(items, times, strict=True)]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    data, store = tmp_path / "data", str(tmp_path / "store")
    api.prepare(tmp_path / "log.csv", data)
    run = api.train(data, tmp_path / "run", size="tiny", max_steps=2, sketch_slots=64, quiet=True)
    api.summarize(tmp_path / "run", data, store)
    row = int(run.catalogue.encode(np.array([99]))[0])
    before = run.read_popularity()
    monkeypatch.setattr(job, "refresh_popularity", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt, match="not complete"):
        api.forget(data, store, [3], [tmp_path / "run"], everything=True, quiet=True)
    assert torch.equal(run.read_popularity(), before)
    monkeypatch.undo()
    api.forget(data, store, [3], [tmp_path / "run"], everything=True, quiet=True)
    after = run.read_popularity()
    never_met = int(run.catalogue.encode(np.array([123_456]))[0])
    assert not torch.equal(before[row], before[never_met])
    assert torch.equal(after[row], after[never_met])
    assert not torch.equal(after, torch.zeros_like(after)), "others are still known"
