"""Two processes train as one does, write once, stop together, and go on from each other's checkpoints."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.training.two_processes import STOP, config, interrupted
from tests.training.worlds import SMALL, write_world
from vista.checkpoint import load_run, read_tensors
from vista.cli.main import app
from vista.data.histories import PreparedData
from vista.errors import ConfigError
from vista.training.loop import train

REPOSITORY = Path(__file__).parents[2]
TOLERANCE = 1e-4  # of losses and weights after 10 steps: gradients are added up in another order, in float32


def torchrun_environment(rank: int, port: int) -> dict[str, str]:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2"} | address


def test_other_commands_are_refused_under_torchrun(monkeypatch):
    for name, value in (torchrun_environment(0, 1) | {"TORCHELASTIC_RUN_ID": "none"}).items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 2
    assert "2 processes of vista doctor; only vista train" in result.stderr


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def log(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "elapsed_s"} for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with runs by one process, by two, and by one and the other in turn, the latter with a sharded table."""
    folder = tmp_path_factory.mktemp("processes")
    data = write_world(folder / "data")
    train(data, folder / "one", config(), quiet=True)
    with interrupted("0"):
        train(data, folder / "cut by one", config(), quiet=True)
    port = free_port()
    command = [sys.executable, "-W", "error", "-X", "faulthandler", "-m", "tests.training.two_processes", str(folder)]
    said = [folder / f"said by {rank}.txt" for rank in range(2)]
    both = []
    for rank, file in enumerate(said):
        with file.open("w") as stderr:
            environment = torchrun_environment(rank, port)
            both.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=stderr))
    try:
        statuses = [process.wait(250) for process in both]
        assert statuses == [0, 0], "\n".join(file.read_text() for file in said)
    finally:
        for process in both:
            process.kill()
            process.wait()
    stopped = read_tensors(folder / "cut by two" / "training.safetensors")[1]
    assert stopped["step"] == STOP
    assert {lane[4] for lane in stopped["walk"]["lanes"] if not lane[5]} == {0, 1}, (
        "else one process carries no memory to go on from"
    )
    train(data, folder / "cut by two", config(), resume=True, quiet=True)
    return folder


@pytest.mark.parametrize("name", ["two", "cut by one", "cut by two"])
def test_two_processes_give_the_curve_and_the_weights_of_one(runs, name):
    expected, found = log(runs / "one"), log(runs / name)
    assert [line["step"] for line in found] == [5, 10]
    for one, two in zip(expected, found, strict=True):
        assert two == pytest.approx(one, abs=TOLERANCE)
    assert found[-1]["log_loss"] < found[0]["log_loss"]
    for file in ("training.safetensors", "model.safetensors"):
        one, two = read_tensors(runs / "one" / file)[0], read_tensors(runs / name / file)[0]
        assert {key for key in two if key not in one} <= {"rng.1"}
        for key in one:
            if one[key].is_floating_point():  # else a generator's state, or what rounding left behind
                torch.testing.assert_close(two[key], one[key], atol=TOLERANCE, rtol=TOLERANCE)


def test_a_sharded_table_is_written_whole(runs):
    """Its rows begin elsewhere than those of one process; all of them are there, and no two alike."""
    rows = read_tensors(runs / "sharded" / "model.safetensors")[0]["summarizer.embedding.items.rows.weight"]
    expected = read_tensors(runs / "one" / "model.safetensors")[0]["summarizer.embedding.items.rows.weight"]
    assert rows.shape == expected.shape
    assert len(rows.unique(dim=0)) == len(rows)
    assert log(runs / "sharded")[-1]["log_loss"] < log(runs / "sharded")[0]["log_loss"]
    assert load_run(runs / "sharded").version


def test_sharding_needs_processes(tmp_path):
    data = write_world(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"--shard-items .* start it with torchrun"):
        train(data, tmp_path / "run", config(), quiet=True, shard_items=True)
    assert not (tmp_path / "run").exists()


def test_half_an_environment_is_refused(tmp_path, monkeypatch):
    data = write_world(tmp_path / "data")
    for name, value in torchrun_environment(0, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2, but MASTER_ADDR is not set.*torchrun"):
        train(data, tmp_path / "run", config(), quiet=True)
    assert not (tmp_path / "run").exists()


def torchrun(data: PreparedData, out: Path, *arguments: str) -> subprocess.Popen[str]:
    flags = [flag for key, value in SMALL.items() for flag in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "vista.cli.main", "train", str(data.folder), "--out", str(out)]
    environment, pipes = os.environ | {"OMP_NUM_THREADS": "1"}, {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [*command, "--size", "tiny", *flags, *arguments], cwd=REPOSITORY, env=environment, text=True, **pipes
    )


LONG = ("--max-steps", "100000", "--max-epochs", "100000", "--set", "train.patience=100000")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_that_is_stopped_leaves_a_checkpoint_to_go_on_from(tmp_path, signum):
    data, run = write_world(tmp_path / "data"), tmp_path / "run"
    process = torchrun(data, run, *LONG, "--set", "train.checkpoint_every_s=1000000")
    while not (run / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signum)
    messages = process.communicate(timeout=60)[1]
    step = read_tensors(run / "training.safetensors")[1]["step"]
    assert step >= 5
    assert messages.count(f"interrupted: checkpoint of step {step} kept") == 1
    settings = json.loads((run / "config.json").read_text())
    settings["train"]["max_steps"] = step + 5
    (run / "config.json").write_text(json.dumps(settings))
    output, messages = torchrun(data, run, "--resume").communicate(timeout=120)
    assert output.count("trained ") == 1
    assert messages.count(f"train: {step + 5}/{step + 5} steps (100%)") == 1
    assert log(run)[-1]["step"] == step + 5


@pytest.mark.slow
def test_a_run_folder_that_is_taken_is_refused_by_both(tmp_path):
    data = write_world(tmp_path / "data")
    train(data, tmp_path / "run", config(), quiet=True)
    process = torchrun(data, tmp_path / "run")
    assert "already holds a run" in process.communicate(timeout=120)[1]
    assert process.returncode != 0


@pytest.mark.slow
def test_the_death_of_one_process_ends_the_other(tmp_path):
    """As where the system kills one for its memory: nobody waits for hours."""
    data, run, port = write_world(tmp_path / "data"), tmp_path / "run", free_port()
    flags = [flag for key, value in SMALL.items() for flag in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "vista.cli.main", "train", str(data.folder), "--out", str(run), "--size", "tiny"]
    first, second = (
        subprocess.Popen([*command, *flags, *LONG], cwd=REPOSITORY, env=torchrun_environment(rank, port), text=True,
                         stderr=subprocess.PIPE)
        for rank in range(2)
    )  # fmt: skip
    while not (run / "log.jsonl").exists() and first.poll() is None:
        time.sleep(0.1)
    second.kill()
    messages = first.communicate(timeout=60)[1]
    second.communicate()
    assert first.returncode == 2
    assert "error: another process of this training ended" in messages
