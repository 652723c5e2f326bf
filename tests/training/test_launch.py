"""Several processes started by --nproc or torchrun: one log, one error, nothing lost."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_training import Build, events

from llmtrain.config.loading import dump_config
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training.checkpoint import read_tensors

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
LONG = {"train__max_steps": 100_000, "train__micro_batch": 2, "log": {"every": 10}}


class Started:
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
        raise AssertionError(f"{text!r} never came: {self.out.read_text()}{self.err.read_text()}")

    def ended(self) -> int:
        return self.process.wait(timeout=90)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    begun = []

    def start(*command: str | Path) -> Started:
        begun.append(Started([str(word) for word in command], tmp_path))
        return begun[-1]

    yield start
    for each in begun:
        for pid in each.workers():
            os.kill(pid, signal.SIGKILL)
        each.process.kill()
        each.process.wait()


def written(tiny: Build, folder: Path, **overrides: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(dump_config(tiny(name="run", **overrides)))
    return path


def is_there(pid: int) -> bool:
    """Return whether a process runs; an ended one is a zombie until its parent reaps it."""
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_left(processes: list[int]) -> None:
    """Wait until the processes of a killed launcher have ended."""
    for _ in range(600):
        if not any(map(is_there, processes)):
            return
        time.sleep(0.1)
    for pid in filter(is_there, processes):
        os.kill(pid, signal.SIGKILL)
    raise AssertionError(f"{processes} did not leave")


@pytest.mark.parametrize(
    ("whom", "number"), [("worker", signal.SIGTERM), ("launcher", signal.SIGUSR1)]
)
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(
    tiny: Build, tmp_path: Path, started: Any, whom: str, number: int
) -> None:
    run = started(
        BIN / "llmtrain", "pretrain", "--config", written(tiny, tmp_path, **LONG), "--nproc", "2"
    )
    run.wait_for("       20 ")
    os.kill(run.workers()[-1] if whom == "worker" else run.process.pid, number)
    assert run.ended() == 128 + number
    output = run.err.read_text()
    assert (
        output.count("training checkpoint saved in runs/run; run the same command to resume") == 1
    )
    assert "Traceback" not in output
    assert run.out.read_text().count("train.max_steps") == 1
    [newest] = list(step_folders(RunFolder(tmp_path / "runs/run").states))[-1:]
    assert newest >= 20
    again = started(
        BIN / "llmtrain", "pretrain", "--config", tmp_path / "run.yaml", "--max-time", "1s"
    )
    assert again.ended() == 124
    assert f"resumed at step {newest:,}" in again.out.read_text()


def test_a_killed_launcher_stops_its_processes(tiny: Build, tmp_path: Path, started: Any) -> None:
    run = started(
        BIN / "llmtrain", "pretrain", "--config", written(tiny, tmp_path, **LONG), "--nproc", "2"
    )
    run.wait_for("       20 ")
    workers = run.workers()
    run.process.kill()
    assert run.ended() == -signal.SIGKILL
    wait_until_left(workers)
    # Either process may notice first and stop the other.
    output = run.err.read_text().splitlines()
    assert [line for line in output if not line.startswith("stopping at")] == [
        "SIGTERM: training checkpoint saved in runs/run; run the same command to resume"
    ]
    [newest] = list(step_folders(RunFolder(tmp_path / "runs/run").states))[-1:]
    assert newest >= 20


def test_a_process_stops_if_its_launcher_has_ended(tiny: Build, tmp_path: Path) -> None:
    config, gone = written(tiny, tmp_path), {"LLMTRAIN_LAUNCHER": str(2**22 + 1)}
    rank = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
    left = subprocess.run(
        [BIN / "llmtrain", "pretrain", "--config", config],
        cwd=tmp_path, env=os.environ | rank | gone, capture_output=True, check=False,
    )  # fmt: skip
    assert left.returncode == -signal.SIGTERM
    assert not (tmp_path / "runs").exists()


def test_a_killed_process_is_reported_once(tiny: Build, tmp_path: Path, started: Any) -> None:
    run = started(
        BIN / "llmtrain", "pretrain", "--config", written(tiny, tmp_path, **LONG), "--nproc", "2"
    )
    run.wait_for("       20 ")
    os.kill(run.workers()[0], signal.SIGKILL)
    assert run.ended() == 1
    output = run.err.read_text()
    assert output.count("error:") == 1
    assert "of 2 was killed by SIGKILL" in output
    assert "Traceback" not in output


def test_an_error_is_printed_once(tiny: Build, tmp_path: Path, started: Any) -> None:
    run = started(BIN / "llmtrain", "pretrain", "--config", written(tiny, tmp_path), "--nproc", "3")
    assert run.ended() == 2
    assert run.err.read_text().splitlines() == [
        "error: train.batch_sequences 8 is not divisible by 3 processes: try 6 or 9",
        "hint: --set train.batch_sequences=9, or another number of processes",
    ]
    assert not (tmp_path / "runs/run").exists()


def test_torchrun_starts_killed_processes_again(tiny: Build, tmp_path: Path, started: Any) -> None:
    config = written(
        tiny,
        tmp_path,
        train__max_steps=400,
        train__micro_batch=2,
        checkpoint={"state_every": 20},
        averages=[],
    )
    torchrun = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    run = started(*torchrun, "-m", "llmtrain", "pretrain", "--config", config)
    run.wait_for("       60 ")
    os.kill(run.workers()[1], signal.SIGKILL)
    assert run.ended() == 0
    output = run.out.read_text()
    assert output.count("resumed at step") == 1
    assert "step 400 reached" in output
    steps = [event["step"] for event in events(RunFolder(tmp_path / "runs/run")) if "lr" in event]
    assert steps == [*range(3, 400, 3), 400]


def test_two_processes_killed_at_random_moments_end_with_the_same_files(
    tiny: Build, tmp_path: Path, started: Any
) -> None:
    checkpoint = {"snapshot_every": 5, "state_every": 5}
    averages = [{"kind": "ema", "decay": 0.9, "save_every": 5}, {"kind": "running-mean"}]
    config = written(
        tiny,
        tmp_path,
        train__max_steps=100,
        train__parallel="fsdp",
        checkpoint=checkpoint,
        averages=averages,
    )
    command = [BIN / "llmtrain", "pretrain", "--config", config, "--nproc", "2", "--run-dir"]
    assert started(*command, "calm").ended() == 0
    chance, kills = random.Random(5), 0
    while kills < 3:
        run = started(*command, "killed")
        run.wait_for("train.max_steps")
        time.sleep(chance.uniform(0.0, 4.0))
        if workers := run.workers():
            os.kill(chance.choice(workers), signal.SIGKILL)
            kills += 1
        run.ended()
    assert started(*command, "killed").ended() == 0
    calm, killed = RunFolder(tmp_path / "calm"), RunFolder(tmp_path / "killed")
    assert events(calm) == events(killed)
    for path in calm.path.rglob("model.safetensors"):
        assert path.read_bytes() == (killed.path / path.relative_to(calm.path)).read_bytes(), path
    # torch chooses which process writes replicated tensors, so compare the tensors.
    assert step_folders(calm.states).keys() == step_folders(killed.states).keys()
    for step in step_folders(calm.states):
        one, two = (read_tensors(run.state(step), {}) for run in (calm, killed))
        assert one.keys() == two.keys()
        assert all(one[name].numpy().tobytes() == two[name].numpy().tobytes() for name in one)
    assert not [path for path in killed.path.rglob(".tmp-*") if path.is_dir()]
