"""The exported ranking: the same scores without vista, for any number of users, candidates and recent events."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.serving.server import CONTEXT, fill, saved_run
from tests.serving.test_scorer import USERS, make_run
from vista.checkpoint import Run
from vista.cli.main import app
from vista.errors import CheckpointError
from vista.models.inputs import Recent
from vista.serving import graph
from vista.serving.graph import RECENT, TOLERANCE, RankingGraph, example, export_model
from vista.serving.scorer import Scorer
from vista.store.contract import open_store

ITEMS = [0, 5, 11, 39, "no such item"]
AT_US = 2_000_000_000_000_000
ALONE = """
import sys
sys.modules["vista"] = None
import torch
given, path = torch.load(sys.argv[2]), sys.argv[1]
torch.save(torch.export.load(path).module()(**given), sys.argv[3])
assert not [name for name, module in sys.modules.items() if name.startswith("vista") and module]
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("exported")
    run = saved_run(folder / "run", ranker_layers=1)
    result = CliRunner().invoke(app, ["export-model", str(folder / "run"), "--out", str(folder / "model")])
    assert result.exit_code == 0, result.output
    assert "its scores are those of the model" in result.output
    return run, folder / "model"


def test_its_scores_are_those_of_the_scorer_without_vista(exported, tmp_path):
    """What stands in the store and what the metadata say are enough, in a process that has no vista."""
    run, folder = exported
    told = json.loads((folder / "metadata.json").read_text())
    items = json.loads((folder / "items.json").read_text())
    first, unknown = told["items"]["first_index"], told["items"]["unknown"]
    with open_store(str(tmp_path / "store")) as store:
        fill(store, run)
        expected = Scorer(run, store).rank(USERS, [ITEMS[:4]] * len(USERS), AT_US)
        found = Scorer(run, store).read(USERS)
    candidates = torch.tensor([first + items.index(item) for item in ITEMS[:4]]).expand(len(USERS), -1)
    given = {"tokens": found.tokens, "num_events": found.num_events, "candidates": candidates}
    given |= {name: getattr(found.recent, name.removeprefix("recent_")) for name in RECENT}
    given |= {
        "at_us": torch.full((len(USERS),), AT_US),
        "context": torch.full((len(USERS), 4, len(CONTEXT)), torch.nan),
    }
    assert set(given) == {one["name"] for one in told["inputs"]}
    torch.save(given, tmp_path / "given.pt")
    words = [str(folder / "model.pt2"), str(tmp_path / "given.pt"), str(tmp_path / "scores.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE, *words], check=True, timeout=200)
    scores = torch.load(tmp_path / "scores.pt").numpy()
    np.testing.assert_allclose(scores, np.stack([one.probability for one in expected]), rtol=1e-5)
    assert told["model_version"] == run.version
    assert run.catalogue.encode(ITEMS)[4] in range(unknown["first_index"], unknown["first_index"] + unknown["number"])


def check_sizes(run: Run, path: Path) -> None:
    check_program(run, torch.export.load(path).module())


def check_program(run: Run, loaded: Callable[..., torch.Tensor]) -> None:
    own = RankingGraph(run).eval()
    most = run.config.model.recent_events
    for number, (users, candidates, recent) in enumerate([(1, 1, 1), (1, 500, most), (3, 2, 5), (17, 33, most)]):
        given = example(run, users, candidates, recent, seed=100 + number)
        with torch.no_grad():
            scores, expected = loaded(**given), own(**given)
        assert scores.shape == (users, candidates, len(run.schema.tasks))
        assert float((scores - expected).abs().max()) <= TOLERANCE
        assert float(expected.std()) > 0.001 or users * candidates == 1, "they differ, or equality shows nothing"


def test_any_numbers_of_users_candidates_and_events(exported):
    check_sizes(exported[0], exported[1] / "model.pt2")


ALL_OF_A_SKETCH = {"sketch_slots": 8, "sketch_traces": 16, "sketch_predecessors": 3}  # as every size has it


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("context", "changes"),
    [
        ((), ALL_OF_A_SKETCH),
        *(
            pytest.param(*kind, marks=pytest.mark.slow)
            for kind in (
                ((), {}),
                (CONTEXT, {"sketch_slots": 8}),
                ((), {"sketch_slots": 64}),
                ((), {"sketch_slots": 8, "sketch_predecessors": 2}),
                ((), {"candidate_memory": "ridge"}),
                (CONTEXT, {"candidate_memory": "sum", "sketch_slots": 8}),
            )
        ),
    ],
)
def test_models_of_all_kinds(tmp_path, context, changes):
    run = make_run(context, **changes)
    check_sizes(run, export_model(run, tmp_path / "model"))


@torch.no_grad()
def check_popularity(run: Run, program: Callable[..., torch.Tensor]) -> None:
    """Each candidate is scored with its own row of the run's table."""
    given = example(run, 2, 9, 4)
    facts = [given.pop(name) for name in ("tokens", "num_events", "at_us", "candidates", "context")]
    tokens, num_events, at_us, candidates, context = facts
    recent = Recent(*(given.pop(name) for name in RECENT))
    table = run.read_popularity()
    expected, other = (
        run.sequence_model.rank_users(
            tokens, recent, num_events, at_us, candidates, context, tuple(given.values()), counts
        ).sigmoid()
        for counts in (table[candidates], table[candidates].roll(1, 1))
    )
    scores = program(**example(run, 2, 9, 4)).float()
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    assert float((scores - other).abs().max()) > 1e-3, "other rows, other scores"


def test_candidates_look_up_their_popularity_in_the_graph(tmp_path):
    """What is exported does; that the program does, too, shows the slow test."""
    run = saved_run(tmp_path / "run", sketch_slots=8, popularity_hours=720)
    check_popularity(run, RankingGraph(run).eval())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_table_of_popularity_is_part_of_the_program(tmp_path):
    """As it was at the export: the run's own may be gone."""
    run = saved_run(tmp_path / "run", sketch_slots=8, popularity_hours=720)
    path = export_model(run, tmp_path / "model")
    check_sizes(run, path)
    check_popularity(run, torch.export.load(path).module())


COMPILED_ALONE = ALONE.replace("torch.export.load(path).module()", "torch._inductor.aoti_load_package(path)")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_compiled_program_has_the_same_scores_without_vista(tmp_path):
    """At sizes it was not compiled at, and in a process that has no vista."""
    shutil.which("g++") or pytest.skip("needs a C++ compiler")
    run = saved_run(tmp_path / "run", sketch_slots=8, popularity_hours=720)
    words = ["export-model", str(tmp_path / "run"), "--out", str(tmp_path / "model"), "--compile"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    path = tmp_path / "model" / json.loads((tmp_path / "model" / "metadata.json").read_text())["compiled"]["file"]
    check_program(run, torch._inductor.aoti_load_package(str(path)))
    torch.save(example(run, 2, 9, 4), tmp_path / "given.pt")
    words = [str(path), str(tmp_path / "given.pt"), str(tmp_path / "scores.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED_ALONE, *words], check=True, timeout=200)
    with torch.no_grad():
        expected = RankingGraph(run).eval()(**example(run, 2, 9, 4))
    torch.testing.assert_close(torch.load(tmp_path / "scores.pt"), expected, rtol=0, atol=TOLERANCE)


def test_without_a_compiler_nothing_is_compiled_and_nothing_written(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    saved_run(tmp_path / "run")
    words = ["export-model", str(tmp_path / "run"), "--out", str(tmp_path / "model"), "--compile"]
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, "no C++ compiler 'no-such-compiler'" in result.stderr) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_in_the_way_stays_as_it_is(tmp_path):
    (tmp_path / "file").write_text("mine")
    saved_run(tmp_path / "run")
    result = CliRunner().invoke(app, ["export-model", str(tmp_path / "run"), "--out", str(tmp_path)])
    assert (result.exit_code, "is not an empty folder" in result.stderr) == (2, True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_program_of_other_scores_is_not_kept(exported, tmp_path, monkeypatch):
    run, folder = exported

    def copied(program: object, path: Path) -> None:
        path.write_bytes((folder / "model.pt2").read_bytes())

    monkeypatch.setattr(graph.torch.export, "export", lambda *arguments, **options: None)
    monkeypatch.setattr(graph.torch.export, "save", copied)
    with torch.no_grad():
        run.ranker.head.layers[-1].bias += 1
    with pytest.raises(CheckpointError, match="scores differ by"):
        export_model(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with torch.no_grad():
        run.ranker.head.layers[-1].bias -= 1
