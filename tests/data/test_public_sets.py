"""Converters of the sets that papers report on, on small files made up here in the form they are published in."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from vista.cli.main import app
from vista.data.prepare import PrepareOptions, prepare
from vista.data.public import (
    CONVERTERS,
    AmazonOptions,
    KuairandOptions,
    TaobaoOptions,
    YambdaOptions,
    convert_amazon,
    convert_kuairand,
    convert_taobao,
    convert_yambda,
)
from vista.errors import ConfigError, DataError, MissingColumn

# -- KuaiRand

LOG_COLUMNS = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
VIDEO_COLUMNS = ("video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,"
                 "server_height,music_id,music_type,tag")  # fmt: skip
START_MS = 1_649_350_000_000  # 2022-04-07


def log_row(user: int, video: int, ms: int, click: int = 0, like: int = 0, long: int = 0, rand: int = 0) -> str:
    signals = f"{click},{like},0,0,0,0,{long},5000,10000,0,0,0,{rand},{user % 3}"
    return f"{user},{video},20220408,1200,{START_MS + ms},{signals}\n"


def write_kuairand(folder: Path, parts: tuple[str, ...] = ("1k",), variant: str = "1k") -> Path:
    """Each part: user 0 sees videos 1 .. 4 and likes one, user 1 sees one; one more was shown at random."""
    data = folder / f"KuaiRand-{variant.upper()}" / "data"
    data.mkdir(parents=True)
    rows = [log_row(0, 1, 1), log_row(0, 2, 2, click=1), log_row(0, 3, 3, click=1, like=1, long=1),
            log_row(0, 4, 4, long=1), log_row(1, 1, 5)]  # fmt: skip
    for part in parts:
        (data / f"log_standard_4_08_to_4_21_{part}.csv").write_text(f"{LOG_COLUMNS}\n" + "".join(rows))
    (data / f"log_random_4_22_to_5_08_{variant}.csv").write_text(
        f"{LOG_COLUMNS}\n" + log_row(1, 5, 9, click=1, rand=1) + log_row(1, 2, 10, rand=1)
    )
    videos = [f"{v},7,NORMAL,2022-04-01,Web,0.0,9000.0,720,1280,99,4.0,{tag}\n"
              for v, tag in ((1, '"12,65"'), (2, "3"), (3, ""), (4, "3"), (5, "12"))]  # fmt: skip
    (data / f"video_features_basic_{variant}.csv").write_text(f"{VIDEO_COLUMNS}\n" + "".join(videos))
    return data.parent


def read(folder: Path, name: str) -> list[tuple[Any, ...]]:
    return pl.read_parquet(folder / f"{name}.parquet").rows()


def test_kuairand_has_real_impressions_and_a_history_of_what_was_taken_up(tmp_path: Path) -> None:
    summary = convert_kuairand(tmp_path / "out", write_kuairand(tmp_path))
    assert read(tmp_path / "out", "events") == [
        (0, 2, START_MS + 2, "click"),
        (0, 3, START_MS + 3, "like"),
        (0, 4, START_MS + 4, "long_view"),
        (1, 5, START_MS + 9, "click"),  # of the random log: history, but no impression
    ]
    shown = pl.read_parquet(tmp_path / "out" / "impressions.parquet")
    assert shown.columns == ["user_id", "item_id", "timestamp", "is_click", "long_view", "is_like", "tab"]
    assert shown["item_id"].to_list() == [1, 2, 3, 4, 1]
    assert shown["is_click"].to_list() == [0, 1, 1, 0, 0]
    assert shown["tab"].to_list() == ["tab 0"] * 4 + ["tab 1"]
    assert [row[:2] for row in read(tmp_path / "out", "items")] == [(1, "12"), (2, "3"), (3, None), (4, "3"), (5, "12")]
    assert summary == json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (summary["num_shown"], summary["num_impressions"], summary["num_events"]) == (5, 5, 4)
    tables = [str(tmp_path / "out" / f"{name}.parquet") for name in ("events", "items", "impressions")]
    manifest = prepare(PrepareOptions(*tables, context=("tab",)), tmp_path / "prepared")
    assert manifest.tasks == ("is_click", "long_view", "is_like")


def test_the_logs_of_kuairand_27k_come_in_two_parts_and_impressions_can_be_a_sample(tmp_path: Path) -> None:
    source = write_kuairand(tmp_path, ("27k_part1", "27k_part2"), "27k")
    assert convert_kuairand(tmp_path / "all", source, KuairandOptions("27k"))["num_impressions"] == 10
    sampled = convert_kuairand(tmp_path / "some", source, KuairandOptions("27k", max_impressions=4))
    assert 0 <= sampled["num_impressions"] < 10
    assert sampled["num_events"] == 7
    again = convert_kuairand(tmp_path / "again", source / "data", KuairandOptions("27k", max_impressions=4))
    assert again["num_impressions"] == sampled["num_impressions"]
    with pytest.raises(ConfigError, match="did you mean '27k'"):
        KuairandOptions("27K")


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda d: (d / "video_features_basic_1k.csv").unlink(), DataError, "video_features_basic_1k.csv is not there"),
        (lambda d: (d / "log_standard_4_08_to_4_21_1k.csv").unlink(), DataError, "no log_standard_"),
        (lambda d: change(d / "log_standard_4_08_to_4_21_1k.csv", "time_ms,is", "time_s,is"), MissingColumn, "time_ms"),
        (lambda d: change(d / "log_standard_4_08_to_4_21_1k.csv", ",1649350000003,", ",1649350000,"), DataError,
         "row 3, column 'time_ms': '1649350000' is not in April or May 2022 in epoch milliseconds"),
        (lambda d: change(d / "log_standard_4_08_to_4_21_1k.csv", "0,3,2022", "0,three,2022"), DataError,
         "row 3, column 'video_id': 'three' is not a whole number"),
        (lambda d: change(d / "log_standard_4_08_to_4_21_1k.csv", "0,3,2022", "0,,2022"), DataError, "row 3.*null"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_kuairand_is_named(
    tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    source = write_kuairand(tmp_path)
    damage(source / "data")
    with pytest.raises(error, match=message):
        convert_kuairand(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


# -- Taobao

DAY_S = 1_511_539_200


def write_taobao(folder: Path, rows: list[str] | None = None) -> Path:
    given = [
        f"1,268,46,pv,{DAY_S}",
        f"1,31,46,buy,{DAY_S + 10}",
        f"1,31,46,pv,{DAY_S + 5}",
        f"2,268,46,fav,{DAY_S + 9}",
        f"2,9,3,cart,{DAY_S + 777_599}",
        "2,9,3,pv,-2134949234",
        f"2,9,3,pv,{DAY_S + 777_600}",
    ]
    (folder / "UserBehavior.csv").write_text("\n".join(given if rows is None else rows) + "\n")
    return folder


def test_taobao_leaves_out_and_counts_times_outside_its_nine_days(tmp_path: Path) -> None:
    summary = convert_taobao(tmp_path / "out", write_taobao(tmp_path))
    assert summary["num_outside_period"] == 2
    assert read(tmp_path / "out", "events") == [
        (1, 268, DAY_S, "pv"), (1, 31, DAY_S + 10, "buy"), (1, 31, DAY_S + 5, "pv"), (2, 268, DAY_S + 9, "fav"),
        (2, 9, DAY_S + 777_599, "cart"),
    ]  # fmt: skip
    assert read(tmp_path / "out", "items") == [(9, 3), (31, 46), (268, 46)]
    convert_taobao(tmp_path / "bought", tmp_path, TaobaoOptions("buy,cart"))
    assert [row[3] for row in read(tmp_path / "bought", "events")] == ["buy", "cart"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([f"1,268,46,pv,{DAY_S}", f"1,x,46,pv,{DAY_S}"], "row 2, column 'item_id': 'x' is not a whole number"),
        ([f"1,268,46,pv,{DAY_S}", f"1,5,46,click,{DAY_S}"], "row 2, column 'action': 'click' is none of pv"),
        ([f"1,268,46,pv,{DAY_S}000", f"1,5,46,pv,{DAY_S}"] + [f"1,7,46,pv,{DAY_S}001"] * 2, "row 1.*in seconds"),
        (["1,268,46,pv", "1,5,46,pv"], "cannot be read"),
        (["user_id,item_id,category,behavior,timestamp", f"1,5,4,pv,{DAY_S}"], "row 1, column 'user_id': 'user_id'"),
    ],
)
def test_what_is_wrong_in_taobao_is_named(tmp_path: Path, rows: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        convert_taobao(tmp_path / "out", write_taobao(tmp_path, rows))
    assert not (tmp_path / "out").exists()


def test_taobao_needs_its_file_and_knows_its_behaviours(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no UserBehavior\.csv"):
        convert_taobao(tmp_path / "out", tmp_path)
    with pytest.raises(ConfigError, match="unknown behaviour 'buys'; did you mean 'buy'"):
        TaobaoOptions("buys")


# -- Amazon


def write_amazon(folder: Path, packed: bool = True) -> Path:
    reviews = [{"reviewerID": user, "asin": item, "overall": stars, "unixReviewTime": day, "reviewText": "Good."}
               for user, item, stars, day in (("B", "p1", 5.0, 1_252_800_000), ("A", "p2", 4.0, 1_252_800_000),
                                              ("A", "p1", 1.0, 1_200_096_000))]  # fmt: skip
    meta = [{"asin": "p1", "title": "it's", "categories": [["Electronics", "Audio"], ["Electronics", "Cables"]]},
            {"asin": "p2"}, {"asin": "p9", "categories": [["Electronics"]]}]  # fmt: skip
    texts = {"reviews_Electronics_5.json": "".join(json.dumps(review) + "\n" for review in reviews),
             "meta_Electronics.json": "".join(f"{product!r}\n" for product in meta)}  # fmt: skip
    for name, text in texts.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("packed", [True, False])
def test_amazon_reads_reviews_and_the_last_category(tmp_path: Path, packed: bool) -> None:
    summary = convert_amazon(tmp_path / "out", write_amazon(tmp_path, packed))
    assert read(tmp_path / "out", "events") == [
        ("A", "p1", 1_200_096_000, "1"), ("A", "p2", 1_252_800_000, "4"), ("B", "p1", 1_252_800_000, "5"),
    ]  # fmt: skip
    assert read(tmp_path / "out", "items") == [("p1", "Cables"), ("p2", None)]
    assert (summary["name"], summary["num_users"]) == ("amazon-electronics", 2)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-12])


def pack(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: truncate(d / "reviews_Electronics_5.json.gz"), "reviews_Electronics_5.json.gz.*truncated"),
        (lambda d: truncate(d / "meta_Electronics.json.gz"), "meta_Electronics.json.gz.*truncated"),
        (lambda d: (d / "meta_Electronics.json.gz").unlink(), "neither meta_Electronics.json.gz nor"),
        (lambda d: pack(d / "meta_Electronics.json.gz", "{'asin': 'p1'}\n{'asin': 'p2'\n"), "line 2: .*as published"),
        (lambda d: pack(d / "reviews_Electronics_5.json.gz", '{"asin": "p", "overall": 5, "unixReviewTime": 0}'),
         "line 1: unixReviewTime 0 is not"),
        (lambda d: pack(d / "reviews_Electronics_5.json.gz", '{"asin": "p", "unixReviewTime": 1200096000}'),
         "line 1: no field 'overall'"),
        (lambda d: pack(d / "reviews_Electronics_5.json.gz",
                        '\n{"reviewerID": "A", "asin": "p", "overall": 5, "unixReviewTime": 1200096000000}'),
         "line 2: unixReviewTime 1200096000000 is not in 1995"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_amazon_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(write_amazon(tmp_path))
    with pytest.raises(DataError, match=message):
        convert_amazon(tmp_path / "out", tmp_path, AmazonOptions("Electronics"))
    assert not (tmp_path / "out").exists()


# -- Yambda


def write_yambda(folder: Path, layout: str = "flat", step: int = 5) -> Path:
    narrow = {"uid": pl.UInt32, "item_id": pl.UInt32, "timestamp": pl.UInt32, "played_ratio_pct": pl.UInt16}
    listens = pl.DataFrame({"uid": [10, 10, 20], "timestamp": [step, 20, 10], "item_id": [7, 8, 7],
                            "is_organic": [1, 0, 1], "played_ratio_pct": [100, 20, 50],
                            "track_length_seconds": [180, 200, 180]}).cast(narrow)  # type: ignore[arg-type]  # fmt: skip
    likes = pl.DataFrame({"uid": [10], "timestamp": [25], "item_id": [8], "is_organic": [0]})
    place = folder / layout / "50m"
    place.mkdir(parents=True)
    for name, table in {"listens": listens, "likes": likes, "dislikes": likes.clear()}.items():
        written = table if layout == "flat" else table.group_by("uid", maintain_order=True).agg(pl.all())
        written.write_parquet(place / f"{name}.parquet")
    artists = pl.DataFrame({"artist_id": [5, 3, 4], "item_id": [7, 7, 9]})
    artists.write_parquet(folder / "artist_item_mapping.parquet")
    return folder


@pytest.mark.parametrize("layout", ["flat", "sequential"])
def test_yambda_in_both_layouts(tmp_path: Path, layout: str) -> None:
    source, zero = write_yambda(tmp_path, layout), 1_577_836_800
    summary = convert_yambda(tmp_path / "out", source, YambdaOptions(layout=layout))
    assert read(tmp_path / "out", "events") == [
        (10, 7, zero + 5, "listen"), (10, 8, zero + 20, "skip"), (20, 7, zero + 10, "listen"),
        (10, 8, zero + 25, "like"),
    ]  # fmt: skip
    assert read(tmp_path / "out", "items") == [(7, 3), (8, None)]
    assert summary["has_artists"]
    options = YambdaOptions(actions="listens", with_skips=False)
    convert_yambda(tmp_path / "listens", source / layout / "50m", options)
    assert [row[3] for row in read(tmp_path / "listens", "events")] == ["listen"] * 2


def test_what_is_wrong_in_yambda_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"listens\.parquet is not there"):
        convert_yambda(tmp_path / "out", tmp_path)
    with pytest.raises(DataError, match=r"listens\.parquet, row 1, .*steps of 5"):
        convert_yambda(tmp_path / "out", write_yambda(tmp_path / "odd", step=3))
    source = write_yambda(tmp_path / "copy")
    with pytest.raises(DataError, match="expected seconds since the first day"):
        convert_yambda(tmp_path / "out", write_yambda(tmp_path / "epoch", step=1_700_000_000))
    listens = source / "flat" / "50m" / "listens.parquet"
    whole = listens.read_bytes()
    listens.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"listens\.parquet: cannot be read \(truncated"):
        convert_yambda(tmp_path / "out", source)
    pl.read_parquet(source / "flat" / "50m" / "likes.parquet").rename({"uid": "user"}).write_parquet(listens)
    with pytest.raises(MissingColumn, match="no column 'uid'"):
        convert_yambda(tmp_path / "out", source)
    with pytest.raises(ConfigError, match="--size '5B': unknown; did you mean '5b'"):
        YambdaOptions("5B")
    assert not (tmp_path / "out").exists()


# -- all


@pytest.mark.parametrize(
    ("name", "write"),
    [("kuairand", write_kuairand), ("taobao", write_taobao), ("amazon", write_amazon), ("yambda", write_yambda)],
)
def test_every_converter_is_a_command_that_says_how_to_go_on(
    tmp_path: Path, name: str, write: Callable[[Path], Path]
) -> None:
    source = write(tmp_path)
    result = CliRunner().invoke(app, ["data", name, "--from", str(source), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert f"next: vista prepare {tmp_path}/out/events.parquet" in result.stdout
    assert ("--impressions" in result.stdout) == (name == "kuairand")
    assert name in CONVERTERS
    missing = CliRunner().invoke(app, ["data", name, "--from", str(tmp_path / "no"), "--out", str(tmp_path / "other")])
    assert missing.exit_code == 2, missing.output
