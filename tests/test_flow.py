"""Days of a small service, by its commands alone: a log becomes a ranking, and the next day's events change it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from vista.cli.main import app
from vista.data.histories import PreparedData

DAY_S = 86_400
FIRST_DAY_S = 1_700_000_000
TINY = ["--size", "tiny", "--max-steps", "12", "--set", "model.popularity_hours=0"]


def vista(*words: object) -> str:
    """Standard output of a command that must end well."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, f"{' '.join(map(str, words))}: {result.output} {result.exception!r}"
    return result.stdout


def events(num_users: int, num_events: int, seed: int, start_s: int) -> pl.DataFrame:
    """Users u0 .. who each view three favourites and buy now and then."""
    rng = np.random.default_rng(seed)
    favourites = np.random.default_rng(7).integers(0, 30, (1000, 3))[:num_users]
    item = np.take_along_axis(favourites, rng.integers(0, 3, (num_users, num_events)), 1)
    other = rng.random(item.shape) < 0.3
    item = np.where(other, rng.integers(0, 30, item.shape), item)
    time_s = start_s + np.sort(rng.choice(DAY_S, item.shape), 1)
    return pl.DataFrame({
        "user_id": [f"u{user}" for user in np.repeat(np.arange(num_users), num_events)],
        "item_id": [f"item {i}" for i in item.ravel()],
        "timestamp": time_s.ravel(),
        "action": np.where(rng.random(item.size) < 0.2, "buy", "view"),
    })  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run and a filled store."""
    folder = tmp_path_factory.mktemp("service")
    events(40, 120, 0, FIRST_DAY_S).write_parquet(folder / "day1.parquet")
    vista("prepare", folder / "day1.parquet", "--out", folder / "data")
    vista("train", folder / "data", "--out", folder / "run", *TINY)
    vista("summarize", folder / "run", "--data", folder / "data", "--store", folder / "store")
    return folder


def ranking(service: Path, user: str, candidates: str, store: str = "store") -> dict[str, Any]:
    out = vista("rank", service / "run", "--store", service / store, "--user", user, "--candidates", candidates,
                "--at", "2023-11-20T00:00:00", "--json")  # fmt: skip
    return json.loads(out)


def test_every_command_says_what_comes_next(service: Path) -> None:
    out = vista("prepare", service / "day1.parquet", "--out", service / "again")
    assert out.splitlines()[-1] == f"next: vista train {service / 'again'} --out RUN"


def test_evaluate_gives_all_metrics_as_json(service: Path) -> None:
    out = json.loads(vista("evaluate", service / "run", "--data", service / "data", "--json"))
    (evaluation,) = out["evaluations"]
    assert {"ne", "log_loss", "auc", "gauc", "calibration"} <= evaluation["metrics"]["next"].keys()
    assert out["best_possible"] is None


def test_rank_answers_in_the_order_asked(service: Path) -> None:
    answer = ranking(service, "u3", "item 1,item 2,item 29")
    assert answer["candidates"] == ["item 1", "item 2", "item 29"]
    assert answer["known_user"] is True
    assert answer["known_candidates"] == [True, True, True]
    assert all(0 < score < 1 for score in answer["scores"])
    alone = ranking(service, "u3", "item 2")
    assert alone["scores"][0] == pytest.approx(answer["scores"][1], rel=1e-5)


def test_who_is_not_known_gets_the_cold_start_answer(service: Path) -> None:
    answer = ranking(service, "nobody", "item 1,never seen")
    assert answer["known_user"] is False
    assert answer["known_candidates"] == [True, False]
    assert answer["num_events"] == 0
    assert answer["scores"] == ranking(service, "somebody else", "item 1,never seen")["scores"]


def test_the_next_day_with_the_same_model(service: Path) -> None:
    """All events until now, prepared with the run's catalogue: only users with new events are summarized again."""
    first = events(40, 120, 0, FIRST_DAY_S)
    new = events(10, 20, 1, FIRST_DAY_S + DAY_S).with_columns(pl.col("item_id").replace("item 3", "a new item"))
    pl.concat([first, new]).write_parquet(service / "both.parquet")
    vista("prepare", service / "both.parquet", "--catalogue", service / "run", "--out", service / "data2")
    data, before = PreparedData.open(service / "data2"), PreparedData.open(service / "data")
    assert data.catalogue.fingerprint == before.catalogue.fingerprint
    assert data.manifest.actions == before.manifest.actions
    old = before.user_index("u3")
    now = data.user_index("u3")
    assert old is not None
    assert now is not None
    known = slice(*before.histories.offsets[old : old + 2])
    longer = data.histories.item[data.histories.offsets[now] : data.histories.offsets[now + 1]]
    assert np.array_equal(longer[:120], before.histories.item[known])
    unknown_bucket = int(data.catalogue.encode(["a new item"])[0])
    assert unknown_bucket < data.catalogue.first_item
    assert unknown_bucket in data.histories.item
    scores = ranking(service, "u3", "item 1,item 2")["scores"]
    untouched = ranking(service, "u30", "item 1,item 2")["scores"]
    out = vista("summarize", service / "run", "--data", service / "data2", "--store", service / "store")
    assert out.startswith("summarized 10 users")
    assert ranking(service, "u3", "item 1,item 2")["scores"] != scores
    assert ranking(service, "u3", "item 1,item 2")["num_events"] == 140
    assert ranking(service, "u30", "item 1,item 2")["scores"] == untouched  # no popularity: what others did is not read


def test_a_catalogue_that_is_none(service: Path) -> None:
    result = CliRunner().invoke(
        app, ["prepare", str(service / "day1.parquet"), "--catalogue", str(service), "--out", str(service / "no")]
    )
    assert result.exit_code == 2
    assert "neither a run" in result.stderr
    assert not (service / "no").exists()


def test_data_of_another_catalogue_is_refused(service: Path) -> None:
    events(40, 60, 5, FIRST_DAY_S).with_columns(pl.col("item_id") + " of another shop").write_parquet(
        service / "other.parquet"
    )
    vista("prepare", service / "other.parquet", "--out", service / "other")
    result = CliRunner().invoke(
        app, ["summarize", str(service / "run"), "--data", str(service / "other"), "--store", str(service / "x")]
    )
    assert result.exit_code == 2
    assert "trained on other data" in result.stderr


def test_a_user_is_forgotten(service: Path, tmp_path: Path) -> None:
    """An item, then everything; the ranking is that of somebody who was never there."""
    for name in ("data", "store"):
        shutil.copytree(service / name, tmp_path / name)
    place = ["--data", tmp_path / "data", "--store", tmp_path / "store", "--user", "u5"]
    first = PreparedData.open(service / "data")
    user = first.user_index("u5")
    assert user is not None
    met = first.catalogue.decode(first.histories.item[slice(*first.histories.offsets[user : user + 2])])
    out = vista("forget", service / "run", *place, "--item", met[0])
    assert out.startswith(f"removed {met.count(met[0])} events, ")
    assert f"{tmp_path / 'store'}: records of 1 users and versions made anew, of 0 deleted" in out
    refused = CliRunner().invoke(app, [str(word) for word in ("forget", service / "run", *place, "--item", "nothing")])
    assert refused.exit_code == 2
    assert "--item nothing: not in the catalogue" in refused.stderr
    out = vista("forget", service / "run", *place, "--before", "2023-11-15T12:00:00")
    assert out.startswith("removed ")
    out = vista("forget", *place, "--all")
    assert "of 0 users and versions made anew, of 1 deleted" in out
    assert vista("forget", *place, "--all").startswith(f"nothing to remove of user u5 in {tmp_path / 'data'}")
    vista("evaluate", service / "run", "--data", tmp_path / "data", "--json")
    known, nobody, other = (
        ranking(service, name, "item 1", str(tmp_path / "store")) for name in ("u5", "nobody", "u30")
    )
    assert known["known_user"] is False
    assert known["scores"] == nobody["scores"]
    assert other["num_events"] == 120
