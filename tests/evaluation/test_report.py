"""The report is complete, self-contained, replaces only reports, and its numbers are those of the evaluations."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from tests.evaluation.worlds import scored_world, take
from vista.errors import DataError, StaleOutput
from vista.evaluation import report
from vista.evaluation.evaluate import learning_curve
from vista.evaluation.report import Evaluation, read_report, render_table, write_report
from vista.evaluation.tables import Cell, Table, difference_table, group_runs, overview_table, slice_table

PLOTS = {
    "by_history_length.png",
    "by_distance.png",
    "by_positive_distance.png",
    "by_source.png",
    "calibration.png",
    "learning_curve.png",
}


def one(model: str, noise: float, seed: int = 0, num_tasks: int = 2) -> Evaluation:
    """Of a made-up world. num_tasks: one has half of the plots, and so takes half of the time to draw."""
    curve = ({"step": 10, "validation_ne": 0.9, "loss": 0.5}, {"step": 20, "validation_ne": 0.8, "loss": 0.4})
    world = scored_world(noise, seed)
    labels, probabilities = world.labels[:, :num_tasks], world.probabilities[:, :num_tasks]
    world = replace(world, tasks=world.tasks[:num_tasks], labels=labels, probabilities=probabilities)
    return Evaluation.of(model, world, {"split": "test", "seed": seed}, curve)


@pytest.fixture(scope="module")
def evaluations() -> list[Evaluation]:
    return [one(model, noise, seed) for model, noise in (("recent", 1.5), ("vista <&>", 0.8)) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def best() -> Evaluation:
    return one("truth", 0.0)


class Page(HTMLParser):
    """Collects what a page refers to, and checks that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_report_is_complete_and_refers_to_nothing_outside(
    evaluations: list[Evaluation], best: Evaluation, tmp_path: Path
) -> None:
    index = write_report(evaluations, tmp_path / "report", best, title="A & B")
    assert {path.name for path in index.parent.iterdir()} == PLOTS | {"index.html", "report.md", "report.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["report"]  # nothing temporary is left
    page = Page()
    text = index.read_text(encoding="utf-8")
    page.feed(text)
    page.close()
    assert not page.open
    assert len(page.links) == len(PLOTS)
    assert "://" not in text
    for link in page.links:
        head, data = link.split(",", 1)
        assert head == "data:image/png;base64"
        width, height = png_size(base64.b64decode(data))
        assert width > 500
        assert height > 300
    assert "<h1>A &amp; B</h1>" in text
    assert "vista &lt;&amp;&gt;" in text
    markdown = (index.parent / "report.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\((\w+\.png)\)", markdown)) == PLOTS
    found, found_best = read_report(index.parent)
    assert [e.dumps() for e in found] == [e.dumps() for e in evaluations]
    assert found_best is not None
    assert found_best.dumps() == best.dumps()


def test_one_model_without_curve_or_bounds(tmp_path: Path) -> None:
    evaluation = replace(one("vista", 0.5, num_tasks=1), learning_curve=())
    folder = write_report([evaluation], tmp_path / "report").parent
    assert {path.name for path in folder.glob("*.png")} == PLOTS - {"learning_curve.png"}
    assert read_report(folder)[1] is None


def test_nothing_scored_still_gives_a_report(tmp_path: Path) -> None:
    empty = Evaluation.of("vista", take(scored_world(0.5), np.zeros(0, np.int64)))
    folder = write_report([empty], tmp_path / "report").parent
    assert list(folder.glob("*.png")) == []
    assert "| click | vista | 1 | 0 |" in (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_a_model_that_always_says_the_same_is_plotted(probability: float, tmp_path: Path) -> None:
    scored = scored_world(0.5)
    constant = replace(scored, probabilities=np.full_like(scored.probabilities, probability))
    evaluation = replace(Evaluation.of("constant", constant), slices=())
    folder = write_report([evaluation], tmp_path / "report").parent
    assert png_size((folder / "calibration.png").read_bytes()) > (500, 300)


def test_numbers_in_markdown_are_those_measured(evaluations: list[Evaluation], tmp_path: Path) -> None:
    folder = write_report([replace(e, slices=()) for e in evaluations], tmp_path / "report").parent
    line = next(line for line in (folder / "report.md").read_text(encoding="utf-8").splitlines() if "vista" in line)
    values = [e.metrics["click"]["ne"] for e in evaluations[3:]]
    assert f"| **{np.mean(values):.4f} ± {np.std(values, ddof=1) / math.sqrt(3):.4f}** |" in line


def test_a_learning_curve_has_each_step_once_and_survives_a_line_cut_in_two(tmp_path: Path) -> None:
    """As after a loss of power, and after going on from a checkpoint older than the last validation."""
    lines = [{"step": step, "validation_ne": ne} for step, ne in ((10, 0.9), (20, 0.8), (20, 0.7), (30, 0.6))]
    text = "\n".join([*map(json.dumps, lines[:2]), '{"step": 20, "valid', *map(json.dumps, lines[2:])])
    (tmp_path / "log.jsonl").write_text(text + "\n")
    assert learning_curve(SimpleNamespace(folder=tmp_path)) == (lines[0], lines[2], lines[3])  # type: ignore[arg-type]


def test_an_older_report_is_replaced(tmp_path: Path) -> None:
    short = replace(one("vista", 0.5, num_tasks=1), slices=())
    write_report([replace(short, model="old")], tmp_path / "report")
    (tmp_path / "report.partial").mkdir()  # left by a run that was killed
    (tmp_path / "report.partial" / "half").write_text("x")
    index = write_report([short], tmp_path / "report")
    assert read_report(index.parent)[0][0].model == "vista"
    assert not (index.parent / "half").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_another_folder_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_text("cat")
    with pytest.raises(StaleOutput, match="photos is there and is not a report"):
        write_report([one("vista", 0.5, num_tasks=1)], folder)
    assert (folder / "cat.jpg").read_text() == "cat"


def test_an_older_report_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = replace(one("vista", 0.5, num_tasks=1), slices=())
    folder = write_report([evaluation], tmp_path / "report").parent
    monkeypatch.setattr(report, "_html", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report([replace(evaluation, model="new")], folder)
    assert read_report(folder)[0][0].model == "vista"


def test_nothing_to_report_and_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to report"):
        write_report([], tmp_path / "report")
    with pytest.raises(DataError, match="not a report"):
        read_report(tmp_path)


# tables


def cells(table: Table, row: int) -> dict[str, Cell]:
    return dict(zip(table.header, table.rows[row], strict=True))


def test_the_best_model_is_marked_and_the_best_possible_is_not(evaluations: list[Evaluation], best: Evaluation) -> None:
    table = overview_table(group_runs(evaluations, best))
    assert [row[1].text for row in table.rows] == ["recent", "vista <&>", "best possible"] * 2
    for name in ("NE", "AUC", "GAUC", "NDCG@10 shown"):
        assert [cells(table, row)[name].is_best for row in range(3)] == [False, True, False], name
    assert cells(table, 0)["runs"].text == "3"
    assert cells(table, 2)["NE"].text == f"{best.metrics['click']['ne']:.4f}"


def test_calibration_is_best_where_it_is_near_one() -> None:
    runs = [Evaluation(name, {"click": {"calibration": value}}) for name, value in (("a", 0.8), ("b", 1.1), ("c", 1.5))]
    table = overview_table(group_runs(runs))
    assert [cells(table, row)["calibration"].is_best for row in range(3)] == [False, True, False]


def test_one_model_alone_is_not_marked(evaluations: list[Evaluation]) -> None:
    table = overview_table(group_runs(evaluations[:3]))
    assert not any(cell.is_best for row in table.rows for cell in row)


def test_full_ranking_appears_where_it_was_measured() -> None:
    evaluation = Evaluation("vista", {"click": {"ne": 0.9, "hr@10": 0.25, "ndcg@10": 0.125}})
    assert overview_table(group_runs([evaluation])).header == ("task", "model", "runs", "NE", "HR@10", "NDCG@10")


def test_slice_table_has_a_row_per_bucket_near_to_far(evaluations: list[Evaluation]) -> None:
    table = slice_table(group_runs(evaluations), "click", "positive distance", "auc")
    assert table.header == ("positive distance", "impressions", "recent", "vista <&>")
    assert [row[0].text for row in table.rows] == ["1-64", "65-512", "513-4,096", "4,097-32,768", "32,769+", "never"]
    values = [e.slice_metrics("click", "positive distance")["65-512"]["auc"] for e in evaluations[:3]]
    assert table.rows[1][2].text.startswith(f"{np.mean(values):.4f} ± ")


def test_differences_are_paired_by_seed_not_by_order(evaluations: list[Evaluation]) -> None:
    recent, vista = evaluations[:3], evaluations[3:]
    table = difference_table(group_runs([*recent, *reversed(vista)]))
    assert table is not None
    row = cells(table, 0)
    by_seed = [b.metrics["click"]["ne"] - a.metrics["click"]["ne"] for a, b in zip(recent, vista, strict=True)]
    assert row["NE difference"].text == f"{np.mean(by_seed):.4f} ± {np.std(by_seed, ddof=1) / math.sqrt(3):.4f}"
    assert row["pairs"].text == "3"


def test_too_few_pairs_give_no_differences(evaluations: list[Evaluation]) -> None:
    assert difference_table(group_runs([evaluations[0], evaluations[3]])) is None
    assert difference_table(group_runs([*evaluations[:2], evaluations[5]])) is None  # seeds 1, 2 and 3


def test_names_do_not_break_markdown_or_html() -> None:
    table = Table("t", ("a|b", "n"), ((Cell("x_y|<i>"), Cell("1", is_best=True)),))
    assert table.to_markdown() == "| a\\|b | n |\n|---|--:|\n| x\\_y\\|\\<i> | **1** |\n"
    assert '<tr><th>x_y|&lt;i&gt;</th><td class="best">1</td></tr>' in table.to_html()


def test_terminal_table_shows_every_model(evaluations: list[Evaluation], best: Evaluation) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_table([*evaluations[:3], replace(evaluations[3], model="[bold]")], best))
    text = console.export_text()
    for word in ("recent", "[bold]", "best possible", "NE", "GAUC", f"{best.metrics['like']['auc']:.4f}"):
        assert word in text
