"""What becomes of errors, interrupts and closed pipes; and that asking for help is fast."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from vista.cli.main import VistaGroup, app, common
from vista.errors import DataError

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "VISTA_DEBUG"}


def raising(error: BaseException) -> typer.Typer:
    """The command line with one command, which raises."""
    broken = typer.Typer(cls=VistaGroup, pretty_exceptions_enable=False, rich_markup_mode=None)
    broken.callback()(common)

    @broken.command()
    def fail() -> None:
        raise error

    return broken


def vista(*args: str, code: str = "from vista.cli.main import main; main()") -> subprocess.CompletedProcess[str]:
    """The real thing, in a process of its own."""
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=False)


def test_an_error_is_one_line_without_a_traceback() -> None:
    result = CliRunner().invoke(raising(DataError("events.csv: row 3: no timestamp")), ["fail"])
    assert result.exit_code == 2
    assert result.stderr == "error: events.csv: row 3: no timestamp\n"
    assert result.stdout == ""


@pytest.mark.parametrize(("args", "env"), [(["--debug", "fail"], {}), (["fail"], {"VISTA_DEBUG": "1"})])
def test_debug_shows_the_traceback(args: list[str], env: dict[str, str]) -> None:
    result = CliRunner().invoke(raising(DataError("no timestamp")), args, env=env)
    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("error: no timestamp\n")


def test_ctrl_c_says_what_was_kept() -> None:
    result = CliRunner().invoke(raising(KeyboardInterrupt("checkpoint of step 300 kept in RUN")), ["fail"])
    assert result.exit_code == 130
    assert result.stderr == "interrupted: checkpoint of step 300 kept in RUN\n"
    result = CliRunner().invoke(raising(KeyboardInterrupt()), ["fail"])
    assert result.exit_code == 130
    assert "kept" in result.stderr


def test_a_full_disk_is_an_error_not_a_bug() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/item.npy")
    result = CliRunner().invoke(raising(full), ["fail"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: No space left on device: /data/item.npy;")


def test_a_warning_for_users_is_one_line() -> None:
    code = (
        "import sys, warnings\n"
        "from vista.cli import main\n"
        "from vista.errors import VistaWarning\n"
        "main.app = lambda prog_name: [warnings.warn(text, kind) for text, kind in\n"
        "    [('set it', VistaWarning), ('old', UserWarning)]]\n"
        "main.main()\n"
    )
    first, second = vista(code=code).stderr.splitlines()[:2]
    assert first == "warning: set it"
    assert second.endswith("UserWarning: old")


def test_a_bug_keeps_its_traceback() -> None:
    result = CliRunner().invoke(raising(ZeroDivisionError("bug")), ["fail"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_closed_pipe_is_quiet() -> None:
    """As in ``vista ... | head``: far more output than a pipe holds, and a reader that leaves after one line."""
    code = (
        "import typer\n"
        "from vista.cli.main import VistaGroup, common\n"
        "app = typer.Typer(cls=VistaGroup)\n"
        "app.callback()(common)\n"
        "@app.command()\n"
        "def talk() -> None:\n"
        "    for line in range(100_000):\n"
        "        print(line)\n"
        "app()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "talk"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as talker:
        assert talker.stdout is not None
        assert talker.stderr is not None
        assert talker.stdout.readline() == b"0\n"
        talker.stdout.close()
        assert talker.stderr.read() == b""
        assert talker.wait(30) == 141


def test_an_unknown_command_names_the_nearest() -> None:
    result = vista("docter")
    assert result.returncode == 2
    assert "doctor" in result.stderr


def test_version() -> None:
    result = vista("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("vista 0.")


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys\n"
        "from vista.cli.main import main\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'polars', 'pyarrow', 'numpy', 'lmdb', 'matplotlib'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy))\n"
    )
    result = vista(*args, code=code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "heavy: []"


def test_every_command_and_option_has_help() -> None:
    from vista.cli.reference import commands

    for path, command in commands(typer.main.get_command(app), "vista"):
        assert command.help, f"{path} has no docstring"
        for param in command.params:
            if param.name != "help":
                assert getattr(param, "help", None), f"{path}: {param.name} has no help"


def test_doctor_is_healthy_here() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert {check["state"] for check in report["operators"]} <= {"ok", "absent"}
    assert report["packages"]["torch"].split(".")[0] == "2"
    text = CliRunner().invoke(app, ["doctor"]).stdout
    for word in ("python", "device", "threads", "memory", "cpu features", "segment-causal qla"):
        assert word in text


def test_doctor_finds_a_wrong_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    from vista import doctor
    from vista.ops import qla

    monkeypatch.setattr(doctor.qla, "qla", lambda *tensors: tuple(1.1 * t for t in qla.qla_naive(*tensors)))
    report = doctor.examine()
    assert [check.state for check in report.operators][:2] == ["wrong", "ok"]
    assert not report.is_healthy
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1
