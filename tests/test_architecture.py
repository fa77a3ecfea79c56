"""Imports flow one way, as the table of ARCHITECTURE.md says, and the promised parts import with little installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "vista"
MODULES = sorted(PACKAGE.rglob("*.py"))


@dataclass(frozen=True)
class Rule:
    """What one part of the package may import: parts of vista, and distributions beside the standard library."""

    parts: frozenset[str]
    others: frozenset[str]


def part_of(path: Path) -> str:
    """The part a module belongs to: the first folder or module name under src/vista."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


PARTS = {part_of(path) for path in MODULES} - {"__init__"}


def rules() -> dict[str, Rule]:
    """The table "Who may import whom" of ARCHITECTURE.md."""
    text = (ROOT / "ARCHITECTURE.md").read_text().split("## Who may import whom")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    table: dict[str, Rule] = {}
    for part, parts, others in rows[2:]:
        known = {name.strip() for name in parts.split(",")} - {""}
        if parts.startswith("everything"):
            known = PARTS - {name.strip() for name in parts.removeprefix("everything but").split(",")}
        table[part] = Rule(frozenset(known), frozenset(name.strip() for name in others.split(",")))
    return table


RULES = rules()


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, absolute module name) of every import of a file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports of vista in full"
            if node.module == "vista":
                found += [(node.lineno, f"vista.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, str(node.module)))
    return found


def breaches(path: Path, part: str, table: dict[str, Rule]) -> list[str]:
    """What a file imports against the rules, one sentence each."""
    rule, found = table[part], []
    for line, name in imports(path):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == "vista":
            is_allowed = target == part or target in rule.parts
        else:
            is_allowed = top in sys.stdlib_module_names or top in rule.others
        if not is_allowed:
            found.append(f"{path.name}:{line} imports {name}, which {part} may not (see the table in ARCHITECTURE.md)")
    return found


def test_the_table_names_every_part() -> None:
    assert set(RULES) >= PARTS, "a part of src/vista is missing in the table of ARCHITECTURE.md"
    assert set(RULES) <= PARTS, "the table of ARCHITECTURE.md names a part that is not there"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_keep_to_the_table(path: Path) -> None:
    root = {"__init__": Rule(frozenset({"api"}), frozenset())}
    assert not breaches(path, part_of(path), RULES | root)


def test_a_breach_is_found(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("import polars\nfrom vista import data\ndef f():\n    from vista.data.histories import Histories\n")
    assert len(breaches(bad, "serving", RULES)) == 3


def test_imports_flow_one_way() -> None:
    """No part reaches itself through others."""
    for part in RULES:
        reached: set[str] = set()
        frontier = set(RULES[part].parts) - {part}
        while frontier:
            reached |= frontier
            frontier = {target for name in frontier for target in RULES[name].parts - {name}} - reached
        assert part not in reached, f"{part} reaches itself"
        if part == "serving":
            assert not reached & {"data", "batches", "training", "evaluation", "jobs", "cli"}
        if part == "store":
            assert "models" not in reached


HEAVY = ("polars", "pyarrow", "lmdb", "typer", "rich", "matplotlib", "tensorboard", "sklearn")
BLOCKER = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
for name in {modules!r}:
    importlib.import_module(name)
"""


def import_without(blocked: tuple[str, ...], modules: list[str]) -> subprocess.CompletedProcess[str]:
    code = BLOCKER.format(blocked=blocked, modules=modules)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def modules_of(*parts: str) -> list[str]:
    return [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if part_of(path) in parts
    ]


def test_models_and_ops_import_with_torch_numpy_and_safetensors_alone() -> None:
    modules = modules_of("ops", "models", "checkpoint", "progress", "config", "schema")
    needs_triton = "vista.ops.triton_"  # chosen at run time, where Triton is there (vista.ops.forms)
    result = import_without((*HEAVY, "triton"), [name for name in modules if not name.startswith(needs_triton)])
    assert result.returncode == 0, result.stderr


def test_serving_imports_without_data_tooling() -> None:
    result = import_without(("polars", "pyarrow", "typer", "matplotlib", "tensorboard"), modules_of("serving"))
    assert result.returncode == 0, result.stderr


def test_the_blocker_blocks() -> None:
    result = import_without(HEAVY, modules_of("data"))
    assert result.returncode != 0
    assert "is blocked" in result.stderr
