"""Several workers started by `--nproc` or torchrun: one log, one error, no lost checkpoint."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_training import Build, events

from llmtrain.config.loading import dump_config
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training.checkpoint import read_tensors

BIN = Path(sys.executable).parent
PRETRAIN = (BIN / "llmtrain", "pretrain", "--config")
LONG = {"train__max_steps": 100_000, "train__micro_batch": 2, "log": {"every": 10}}


class Command:
    """A running command with its output in files."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.out, self.err = folder / "out.txt", folder / "err.txt"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err)

    def workers(self) -> list[int]:
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "llmtrain pretrain"],
            capture_output=True,
            text=True,
            check=False,
        )
        return [int(pid) for pid in found.stdout.split()]

    def wait_for(self, text: str) -> None:
        for _ in range(600):
            if text in self.out.read_text():
                return
            assert self.process.poll() is None, self.err.read_text()
            time.sleep(0.1)
        raise AssertionError(
            f"{text!r} was not printed: {self.out.read_text()}{self.err.read_text()}"
        )

    def exit_code(self) -> int:
        return self.process.wait(timeout=90)


Start = Callable[..., Command]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    commands: list[Command] = []

    def start(*words: str | Path) -> Command:
        commands.append(Command([str(word) for word in words], tmp_path))
        return commands[-1]

    yield start
    for command in commands:
        for pid in command.workers():
            os.kill(pid, signal.SIGKILL)
        command.process.kill()
        command.process.wait()


def write_config(tiny: Build, folder: Path, **overrides: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(dump_config(tiny(name="run", **overrides)))
    return path


def is_alive(pid: int) -> bool:
    """Return False also for a zombie, which its parent has not yet reaped."""
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_stopped(processes: list[int]) -> None:
    for _ in range(600):
        if not any(map(is_alive, processes)):
            return
        time.sleep(0.1)
    for pid in filter(is_alive, processes):
        os.kill(pid, signal.SIGKILL)
    raise AssertionError(f"{processes} did not stop")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("receiver", "number"), [("worker", signal.SIGTERM), ("launcher", signal.SIGUSR1)]
)
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(
    tiny: Build, tmp_path: Path, start: Start, receiver: str, number: int
) -> None:
    run = start(*PRETRAIN, write_config(tiny, tmp_path, **LONG), "--nproc", "2")
    run.wait_for("       20 ")
    os.kill(run.workers()[-1] if receiver == "worker" else run.process.pid, number)
    assert run.exit_code() == 128 + number
    stderr = run.err.read_text()
    assert (
        stderr.count("training checkpoint saved in runs/run; run the same command to resume") == 1
    )
    assert "Traceback" not in stderr
    assert run.out.read_text().count("train.max_steps") == 1
    [newest] = list(step_folders(RunFolder(tmp_path / "runs/run").states))[-1:]
    assert newest >= 20
    again = start(*PRETRAIN, tmp_path / "run.yaml", "--max-time", "1s")
    assert again.exit_code() == 124
    assert f"resumed at step {newest:,}" in again.out.read_text()


@pytest.mark.slow
def test_a_killed_launcher_stops_its_workers(tiny: Build, tmp_path: Path, start: Start) -> None:
    run = start(*PRETRAIN, write_config(tiny, tmp_path, **LONG), "--nproc", "2")
    run.wait_for("       20 ")
    workers = run.workers()
    run.process.kill()
    assert run.exit_code() == -signal.SIGKILL
    wait_until_stopped(workers)
    stderr = run.err.read_text().splitlines()
    assert [line for line in stderr if not line.startswith("stopping at")] == [
        "SIGTERM: training checkpoint saved in runs/run; run the same command to resume"
    ]
    [newest] = list(step_folders(RunFolder(tmp_path / "runs/run").states))[-1:]
    assert newest >= 20


def test_a_worker_without_its_launcher_stops_before_training(tiny: Build, tmp_path: Path) -> None:
    config, launcher = write_config(tiny, tmp_path), {"LLMTRAIN_LAUNCHER": str(2**22 + 1)}
    rank = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
    worker = subprocess.run(
        [*PRETRAIN, config],
        cwd=tmp_path, env=os.environ | rank | launcher, capture_output=True, check=False,
    )  # fmt: skip
    assert worker.returncode == -signal.SIGTERM
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_killed_worker_is_reported_once(tiny: Build, tmp_path: Path, start: Start) -> None:
    run = start(*PRETRAIN, write_config(tiny, tmp_path, **LONG), "--nproc", "2")
    run.wait_for("       20 ")
    os.kill(run.workers()[0], signal.SIGKILL)
    assert run.exit_code() == 1
    stderr = run.err.read_text()
    assert stderr.count("error:") == 1
    assert "of 2 was killed by SIGKILL" in stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_nproc_prints_an_error_once(tiny: Build, tmp_path: Path, start: Start) -> None:
    run = start(*PRETRAIN, write_config(tiny, tmp_path), "--nproc", "3")
    assert run.exit_code() == 2
    assert run.err.read_text().splitlines() == [
        "error: train.batch_sequences 8 is not divisible by 3 processes: try 6 or 9",
        "hint: --set train.batch_sequences=9, or another number of processes",
    ]
    assert not (tmp_path / "runs/run").exists()


FAILS_ON_RANK_1 = """
import os
from llmtrain.cli.main import main
from llmtrain.errors import UserError
from llmtrain.training import run

def fail(*_):
    raise UserError("only rank 1 fails", hint="none")

if os.environ["RANK"] == "1":
    run.find_micro_batch = fail
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "error"),
    [(3, "train.batch_sequences 8 is not divisible"), (2, "only rank 1 fails")],
)
def test_torchrun_prints_an_error_once(
    tiny: Build, tmp_path: Path, start: Start, processes: int, error: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(FAILS_ON_RANK_1)
    torchrun = [BIN / "torchrun", "--standalone", "--nproc-per-node", str(processes)]
    run = start(*torchrun, script, "pretrain", "--config", write_config(tiny, tmp_path))
    assert run.exit_code() == 1
    assert run.err.read_text().count("hint:") == 1
    assert run.err.read_text().count(f"error: {error}") == 1


@pytest.mark.slow
def test_torchrun_restarts_killed_workers(tiny: Build, tmp_path: Path, start: Start) -> None:
    config = write_config(
        tiny,
        tmp_path,
        train__max_steps=400,
        train__micro_batch=2,
        checkpoint={"state_every": 20},
        averages=[],
    )
    torchrun = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    run = start(*torchrun, "-m", "llmtrain", "pretrain", "--config", config)
    run.wait_for("       60 ")
    os.kill(run.workers()[1], signal.SIGKILL)
    assert run.exit_code() == 0
    stdout = run.out.read_text()
    assert stdout.count("resumed at step") == 1
    assert "step 400 reached" in stdout
    steps = [event["step"] for event in events(RunFolder(tmp_path / "runs/run")) if "lr" in event]
    assert steps == [*range(3, 400, 3), 400]


@pytest.mark.slow
def test_killed_at_random_moments_two_workers_write_the_same_files(
    tiny: Build, tmp_path: Path, start: Start
) -> None:
    checkpoint = {"snapshot_every": 5, "state_every": 5}
    averages = [{"kind": "ema", "decay": 0.9, "save_every": 5}, {"kind": "running-mean"}]
    config = write_config(
        tiny,
        tmp_path,
        train__max_steps=100,
        train__parallel="fsdp",
        checkpoint=checkpoint,
        averages=averages,
    )
    command = [*PRETRAIN, config, "--nproc", "2", "--run-dir"]
    assert start(*command, "reference").exit_code() == 0
    chance, kills = random.Random(5), 0
    while kills < 3:
        run = start(*command, "killed")
        run.wait_for("train.max_steps")
        time.sleep(chance.uniform(0.0, 4.0))
        if workers := run.workers():
            os.kill(chance.choice(workers), signal.SIGKILL)
            kills += 1
        run.exit_code()
    assert start(*command, "killed").exit_code() == 0
    reference, killed = RunFolder(tmp_path / "reference"), RunFolder(tmp_path / "killed")
    assert events(reference) == events(killed)
    for path in reference.path.rglob("model.safetensors"):
        other = killed.path / path.relative_to(reference.path)
        assert path.read_bytes() == other.read_bytes(), path
    # torch chooses which rank writes a replicated tensor.
    assert step_folders(reference.states).keys() == step_folders(killed.states).keys()
    for step in step_folders(reference.states):
        one, two = (read_tensors(run.state(step), {}) for run in (reference, killed))
        assert one.keys() == two.keys()
        assert all(one[name].numpy().tobytes() == two[name].numpy().tobytes() for name in one)
    assert not [path for path in killed.path.rglob(".tmp-*") if path.is_dir()]
