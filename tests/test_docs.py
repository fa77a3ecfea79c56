"""The documents tell the truth: commands, options, targets, links, the tree, and the command reference."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from vista.cli.main import app
from vista.cli.reference import commands, reference
from vista.config import MODELS, ModelConfig

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
COMMANDS = dict(commands(typer.main.get_command(app), "vista"))
SHORTER = {  # what README's commands get here so that they end soon
    "train": ["--max-steps", "3"],
    "benchmark": ["--models", "recent,counts", "--seeds", "0", "--max-steps", "3"],
}


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a document in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def shell_lines(path: Path) -> list[list[str]]:
    """The commands of a document's bash blocks, as words without comments; continued lines joined."""
    text = "\n".join(blocks(path, "bash")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line for line in lines if line]


def mentions(path: Path) -> list[list[str]]:
    """Commands of this project anywhere in a document: in bash blocks and in `inline code`."""
    inline = re.findall(r"`((?:vista|make) [^`]+)`", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL))
    return shell_lines(path) + [shlex.split(text) for text in inline]


def check_vista(words: list[str]) -> str:
    """What is wrong with a ``vista`` command line, or an empty string."""
    path, rest = "vista", words[1:]
    while rest and f"{path} {rest[0]}" in COMMANDS:
        path, rest = f"{path} {rest[0]}", rest[1:]
    command: Any = COMMANDS[path]
    if hasattr(command, "commands") and rest and not rest[0].startswith(("-", ".")):
        return f"there is no command {path} {rest[0]}"
    options = {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}
    unknown = [word.split("=")[0] for word in rest if word.startswith("--") and word.split("=")[0] not in options]
    return f"{path} has no option {', '.join(unknown)}" if unknown else ""


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(document: Path) -> None:
    for words in mentions(document):
        while "=" in words[0]:  # settings of the environment before a command
            words = words[1:]
        match words[0]:
            case "vista":
                assert not check_vista(words), f"{document.name}: {' '.join(words)}: {check_vista(words)}"
            case "make":
                named = [word for word in words[1:] if "=" not in word and word != "..."]
                assert set(named) <= targets(), f"{document.name}: {' '.join(words)}: no such target"
            case other if other.startswith("."):
                assert other == ".venv/bin/python" or (ROOT / other).exists(), f"{document.name}: {other} is not there"


def test_the_check_finds_what_is_wrong() -> None:
    assert check_vista(["vista", "trian", "data"]) == "there is no command vista trian"
    assert check_vista(["vista", "train", "data", "--sise", "tiny"]) == "vista train has no option --sise"
    assert check_vista(["vista", "train", "data", "--size=tiny"]) == ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        there = document.parent / path if path else document
        assert there.exists(), f"{document.name}: {target} is not there"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{document.name}: {target}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_named_in_code_exist(document: Path) -> None:
    """Paths in `inline code` that begin with a folder of the repository."""
    for path in re.findall(r"`((?:src|tests|docs|bench|examples|configs|\.ci)/[\w./-]*)`", document.read_text()):
        assert (ROOT / path).exists(), f"{document.name}: {path} is not there"


def test_every_document_is_in_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for document in DOCUMENTS:
        name = str(document.relative_to(ROOT))
        assert name == "README.md" or f"({name})" in readme, f"README's table of documents lacks {name}"


def tracked() -> set[str]:
    """Files git knows or would take; on a plain copy without git, every file outside hidden and built folders."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listing.returncode == 0:
        return {name for name in listing.stdout.splitlines() if (ROOT / name).exists()}
    return {str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts}


def children(folder: str) -> set[str]:
    """Names directly in a folder of the repository ("" is the root), folders with a slash behind."""
    prefix = folder and folder + "/"
    below = [name.removeprefix(prefix) for name in tracked() if name.startswith(prefix)]
    return {name.split("/")[0] + ("/" if "/" in name else "") for name in below}


def test_the_tree_in_readme_equals_the_disk() -> None:
    tree = next(block for block in blocks(ROOT / "README.md", "text") if "src/vista/" in block)
    rows = [re.fullmatch(r"( *)(\S+)  +(\S.*)", line) for line in tree.splitlines()]
    assert all(rows), "each line of the tree is a name, spaces and a description"
    top = {row[2] for row in rows if row and not row[1]}
    package = {row[2] for row in rows if row and row[1]}
    folders = {name for name in children("") if name.endswith("/")} - {"src/"} | {"src/vista/"}
    assert top == folders
    assert package == children("src/vista")


def test_the_command_reference_is_current() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == reference(), "docs/cli.md is not current; run: make docs"


def test_the_page_of_the_baselines_has_every_model_and_the_defaults_of_the_settings() -> None:
    text = (ROOT / "docs" / "baselines.md").read_text()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    models = {row[0] for row in rows if len(row) == 5} - {"--model"}
    assert models == set(MODELS) - {"vista", "recent", "counts"}
    settings = {row[0]: row[1] for row in rows if len(row) == 3 and row[0] != "setting"}
    assert settings == {name: str(getattr(ModelConfig(), name)) for name in settings}
    read = {name.strip(" `") for row in rows if len(row) == 5 for name in row[3].split(",")} - {"", "settings"}
    assert read <= settings.keys() | {"recent_events"}


def test_the_version_has_a_changelog_entry() -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()


def test_torch_range_in_readme_is_that_of_pyproject() -> None:
    bounds = re.search(r'"torch>=2\.(\d+),<2\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert bounds
    assert f"torch between 2.{bounds[1]} and 2.{int(bounds[2]) - 1} " in (ROOT / "README.md").read_text()
    pinned = re.search(r"^torch==2\.(\d+)\.\d+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert int(bounds[1]) <= int(pinned[1]) < int(bounds[2])
    assert pinned[0] in (ROOT / "README.md").read_text()


def test_every_requirement_is_pinned() -> None:
    """What pyproject.toml asks for, the constraints pin (extras that CI does not install excepted)."""
    text = (ROOT / "pyproject.toml").read_text()
    wanted = text.split("dependencies = [")[1].split("]")[0] + text.split("dev = [")[1].split("\n")[0]
    names = {name.lower() for name in re.findall(r'"([\w-]+)', wanted)}
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert names - pinned == set()


@pytest.fixture
def own_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the log README speaks of: 40 users who each like a few of 30 items, for a year."""
    random = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp,action"]
    for user in range(40):
        likes = random.choice(30, 5, replace=False)
        times = np.sort(random.integers(1_600_000_000, 1_631_536_000, 150))
        lines += [f"{user},{random.choice(likes)},{time},{random.choice(['view', 'buy'])}" for time in times]
    (tmp_path / "events.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_runs(own_log: Path) -> None:
    """The commands for one's own log, then the Python example, on a small log."""
    readme = ROOT / "README.md"
    ran = []
    for words in shell_lines(readme):
        if words[0] == "vista":
            result = CliRunner().invoke(app, words[1:] + SHORTER.get(words[1], []))
            assert result.exit_code == 0, f"{' '.join(words)}: {result.output} {result.exception!r}"
            ran.append(words[1])
    assert ran == ["prepare", "train", "evaluate", "summarize", "rank", "benchmark"]
    (example,) = blocks(readme, "python")
    result = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout
