"""Exported summaries are those of training and of the store, at every border; interrupted exports go on."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from tests.jobs.test_summarize import history, make_run
from tests.training.worlds import SMALL, write_world
from vista.batches.feeds import make_feed
from vista.batches.timelines import MemoryCarry, TimelineWalk
from vista.checkpoint import Run
from vista.cli.main import app
from vista.data import SummaryFeatures
from vista.data.histories import PreparedData
from vista.errors import CheckpointError, ConfigError, StaleOutput
from vista.jobs import export as job
from vista.jobs.export import ExportOptions, export
from vista.jobs.summarize import summarize
from vista.store.contract import open_store
from vista.store.record import decode, user_key

SEGMENT = SMALL["model.segment_events"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PreparedData:
    return write_world(tmp_path_factory.mktemp("world") / "data")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Run:
    return make_run(data, tmp_path_factory.mktemp("run") / "run")


def every_row(folder) -> pl.DataFrame:
    return pl.read_parquet(folder / "part-*.parquet")


@torch.no_grad()
def tokens_of_evaluation(run: Run, data: PreparedData, split: str) -> dict[tuple[int, int], np.ndarray]:
    """What the ranker reads for each request of a split, by (user id, time)."""
    feed, _ = make_feed(data, run.config, split)
    carry, found = MemoryCarry(), {}
    for step in TimelineWalk(feed):
        prepared, last = run.model.prepare(step.batch, carry.gather(step, run.model.init_memory(len(step.users))))
        carry.keep(step, last)
        border = step.batch.requests.summary
        users = np.array(step.users)[step.batch.borders.lane[border].numpy()]
        for user, time_us, row in zip(users, step.batch.requests.timestamp_us.tolist(), border.tolist(), strict=True):
            found[int(data.user_ids[user]), time_us] = prepared.tokens[row].numpy()
    return found


def test_times_are_to_the_bit_what_evaluation_reads(data, run, tmp_path):
    """The requests of one split, asked for by a table: the same walk, the same numbers."""
    test = data.impressions("test")
    table = pl.DataFrame({"user_id": data.user_ids[test.user], "timestamp": test.timestamp_us})
    table.write_parquet(tmp_path / "asked.parquet")
    export(run, data, tmp_path / "out", ExportOptions("times", tmp_path / "asked.parquet"), quiet=True)
    joined = SummaryFeatures.open(tmp_path / "out").join(table["user_id"], test.timestamp_us)
    expected = tokens_of_evaluation(run, data, "test")
    assert (joined.row >= 0).all()
    for row, key in enumerate(zip(table["user_id"].to_list(), test.timestamp_us.tolist(), strict=True)):
        np.testing.assert_array_equal(joined[row]["tokens"], expected[key])


@pytest.mark.parametrize(
    "changes", [{}, {"model__memory": "sum", "model__num_layers": 2}, {"model__scope": "full"}], ids=str
)
def test_the_newest_border_is_what_the_store_holds(data, tmp_path, changes):
    """Another batch of users: the same numbers within the rounding of a matrix product."""
    run = make_run(data, tmp_path / "run", **changes)
    export(run, data, tmp_path / "out", quiet=True)
    joined = SummaryFeatures.open(tmp_path / "out", data).join(data.user_ids, np.full(len(data.user_ids), 10**17))
    with open_store(str(tmp_path / "store")) as store:
        summarize(run, data, store, codec="float32", quiet=True)
        blobs = store.get_many("tokens", [user_key(user) for user in data.user_ids.tolist()], run.version)
    stored = np.stack([decode(blob).arrays["tokens"] for blob in blobs])
    np.testing.assert_allclose(joined[:]["tokens"], stored, rtol=2e-5, atol=2e-5)
    lengths = data.histories.lengths()
    assert joined[:]["age_events"].tolist() == (lengths % SEGMENT).tolist()


def test_every_border_is_what_reading_up_to_it_gives(data, run, tmp_path):
    export(run, data, tmp_path / "out", quiet=True)
    table = every_row(tmp_path / "out")
    assert len(table) == int((data.histories.lengths() // SEGMENT).sum())
    model = run.sequence_model
    for row in table.filter(pl.col("user_id") == int(data.user_ids[3])).iter_rows(named=True):
        events = history(data, 3, row["num_events"])
        with torch.no_grad():
            tokens = model.state_tokens(model.extend(model.init_state(1), events))[0].flatten()
        np.testing.assert_allclose(row["tokens"], tokens, rtol=2e-5, atol=2e-5)
        assert row["span_us"] == int(events.timestamp_us[-1] - events.timestamp_us[0])
    times = table.select(pl.col("as_of", "newest").cast(pl.Int64))
    assert (times["as_of"] == times["newest"] + 1).all()


def test_borders_give_each_request_the_summary_that_times_give(data, run, tmp_path):
    """Two ways to the same features; only what is needed is written."""
    everything = export(run, data, tmp_path / "all", quiet=True)
    export(run, data, tmp_path / "times", ExportOptions("times"), quiet=True)
    test = data.impressions("test")
    ids, times = data.user_ids[test.user], test.timestamp_us
    pl.DataFrame({"user_id": ids, "timestamp": times}).write_csv(tmp_path / "asked.csv")
    options = ExportOptions("borders", tmp_path / "asked.csv")
    needed = export(run, data, tmp_path / "needed", options, quiet=True)
    assert 0 < needed.num_rows < everything.num_rows
    a, b, c = (SummaryFeatures.open(tmp_path / name).join(ids, times)[:] for name in ("all", "times", "needed"))
    np.testing.assert_allclose(a["tokens"], b["tokens"], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(c["tokens"], b["tokens"], rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(a["num_events"], b["num_events"])
    np.testing.assert_array_equal(b["num_events"], test.num_known // SEGMENT * SEGMENT)


def test_the_file_says_what_it_is(data, run, tmp_path):
    export(run, data, tmp_path / "out", ExportOptions(codec="float16"), quiet=True)
    schema = pq.read_schema(tmp_path / "out" / "part-00000.parquet")
    assert run.version in schema.metadata[b"vista"].decode()
    assert schema.names == ["user_id", "as_of", "newest", "num_events", "span_us", "tokens"]
    assert schema.field("tokens").type.list_size == 4 * 16
    assert str(schema.field("as_of").type) == "timestamp[us, tz=UTC]"


def test_an_interrupted_export_goes_on_and_shows_no_half_file(data, run, tmp_path, monkeypatch):
    options = ExportOptions(users_per_part=8)
    export(run, data, tmp_path / "whole", options, quiet=True)
    summaries, calls = job._summaries, 0

    def fail_in_the_third(*arguments):
        nonlocal calls
        calls += 1
        for block in summaries(*arguments):
            yield block
            if calls == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "_summaries", fail_in_the_third)
        with pytest.raises(KeyboardInterrupt, match="2 of 4 parts kept"):
            export(run, data, tmp_path / "cut", options, quiet=True)
    names = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert names == ["_cold_start.npy", "_export.json", "part-00000.parquet", "part-00001.parquet"]
    kept = (tmp_path / "cut" / "part-00000.parquet").stat().st_mtime_ns
    report = export(run, data, tmp_path / "cut", options, quiet=True)
    assert (report.num_parts, report.num_kept) == (4, 2)
    assert (tmp_path / "cut" / "part-00000.parquet").stat().st_mtime_ns == kept
    assert every_row(tmp_path / "cut").equals(every_row(tmp_path / "whole"))


def test_another_export_is_not_mixed_in(data, run, tmp_path):
    export(run, data, tmp_path / "out", quiet=True)
    with pytest.raises(StaleOutput, match="codec 'float32', not 'float16'"):
        export(run, data, tmp_path / "out", ExportOptions(codec="float16"), quiet=True)
    with pytest.raises(StaleOutput, match="holds no export"):
        export(run, data, data.folder, quiet=True)
    with pytest.raises(ConfigError, match="--codec 'int8'"):
        export(run, data, tmp_path / "new", ExportOptions(codec="int8"), quiet=True)
    with pytest.raises(ConfigError, match="did you mean 'borders'"):
        export(run, data, tmp_path / "new", ExportOptions("border"), quiet=True)
    with pytest.raises(CheckpointError, match="without summary tokens"):
        export(make_run(data, tmp_path / "recent", model__model="recent"), data, tmp_path / "new", quiet=True)
    assert not (tmp_path / "new").exists()


def test_from_the_command_line(data, run, tmp_path):
    asked = tmp_path / "asked.csv"
    asked.write_text("user,at\n103,1000000000\n103,1900000000\nnobody,1900000000\n")
    words = ["export", str(run.folder), "--data", str(data.folder), "--out", str(tmp_path / "out"), "--as-of", "times",
             "--requests", str(asked), "--user-column", "user", "--timestamp-column", "at"]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "exported 2 summaries" in result.stdout
    assert "1 requests are of users the data does not know" in result.stdout
    before, after = SummaryFeatures.open(tmp_path / "out").join([103, 103], np.array([10**15, 19 * 10**14]))[:][
        "num_events"
    ]
    assert (before, after) == (0, 60 // SEGMENT * SEGMENT)
