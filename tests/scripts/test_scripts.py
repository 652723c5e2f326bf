"""`scripts/torture` (random kills), `scripts/attack_links` and the Slurm script (requeues)."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_training import Build

from llmtrain.config.loading import dump_config
from llmtrain.storage.run_folder import step_folders

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.slow
def test_random_kills_lose_nothing() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPTS / "torture", "--kills", "12", "--seed", "7"],
        capture_output=True, text=True, timeout=540, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    kills = {
        name: int(count)
        for name, count in re.findall(r"^(\w+) +(\d+) +0  ", done.stdout, re.MULTILINE)
    }
    assert kills == {"prepare": 2, "pretrain": 5, "branch": 2, "average": 2, "eval": 2}
    assert done.stdout.endswith("lost: 0\n")


@pytest.mark.slow
def test_planted_links_change_no_victim() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPTS / "attack_links", "--cases", "16", "--seed", "3"],
        capture_output=True, text=True, timeout=540, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    header, *cases, summary = done.stdout.splitlines()
    assert header.startswith("command") and len(cases) == 16
    assert set(re.findall(r"(\w+): \d+", summary)) <= {"success", "error"}


@pytest.mark.slow
def test_a_slurm_job_saves_and_is_requeued(tiny: Build, tmp_path: Path) -> None:
    """Use an `srun` that sends SIGUSR1 like Slurm, and a `scontrol` that records its arguments."""
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(tiny(name="run", train__max_steps=100_000)))
    tools = {
        "srun": '"$@" &\n'
        "while kill -0 $! 2> /dev/null && ! compgen -G 'runs/run/snapshots/step-*'\n"
        "do sleep 0.1; done\n"
        "kill -USR1 $! 2> /dev/null\nwait $!",
        "scontrol": 'echo "$@" > calls',
        "llmtrain": f'exec {Path(sys.executable).parent / "llmtrain"} "$@"',
    }
    for name, script in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    command = [SCRIPTS / "slurm.sbatch", config]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 138
    assert (tmp_path / "calls").read_text() == "requeue 42\n"
    assert step_folders(tmp_path / "runs" / "run" / "state")
    (tmp_path / "calls").unlink()
    shutil.rmtree(tmp_path / "runs")
    wrong = [SCRIPTS / "slurm.sbatch", tmp_path / "none.yaml"]
    assert (
        subprocess.run(
            wrong, cwd=tmp_path, env=environment, capture_output=True, check=False
        ).returncode
        == 2
    )
    assert not (tmp_path / "calls").exists()
