"""The scripts that test the paper's claims: their runs, statistics, tables and figures."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from reproduction import execute, measure, page
from reproduction.choice import largest_rate, missing, tuned_rate
from reproduction.execute import Job
from reproduction.gains import savings
from reproduction.plan import Plan, Training
from reproduction.results import Losses, Results, Run
from reproduction.spike import in_a_spike
from test_hub_series import write_series

from llmtrain.config.loading import dump_config
from llmtrain.config.schema import RunConfig
from llmtrain.storage.locks import is_locked
from llmtrain.storage.run_folder import RunFolder, step_folders

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def plan(tiny: Callable[..., RunConfig], tmp_path: Path) -> Plan:
    """A plan of 20 steps with every kind of run at two rates, one of which diverges."""
    averages = [{"kind": "ema", "decay": 0.9}, {"kind": "lawa", "window": 5, "every": 1}]
    config = tiny(
        train__max_steps=20,
        averages=averages,
        checkpoint={"snapshot_every": 1, "state_every": 4, "keep_states": 5},
        eval={"every": 4, "batch": 4},
    )
    (tmp_path / "tiny.yaml").write_text(dump_config(config))
    return Plan.of(
        tmp_path / "tiny.yaml", ["optimizer.grad_clip=0"], ("1e-2", "1e30"), (1,), third=False
    )


def trained(plan: Plan, root: Path, *trainings: Training) -> None:
    jobs = [
        Job(each.name, tuple(each.arguments(plan.config, root)), each.parent) for each in trainings
    ]
    execute.run(jobs, root, 2)


@pytest.mark.slow
def test_runs_branch_record_failures_and_run_once(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    whole, cooldown = plan.constant("1e-2", 1), plan.cooldown_from(16, "1e-2", 1)
    calm, diverging = plan.spike("1e-2", 1)[2], plan.constant("1e30", 1)
    at_once = replace(cooldown, name="at-once", parent=None, step=None)
    trained(
        plan,
        root,
        calm,
        cooldown,
        whole,
        at_once,
        plan.cooldown_from(16, "1e30", 1),
        diverging,
    )

    def weights(training: Training) -> bytes:
        return (RunFolder(root / training.name).snapshot(20) / "model.safetensors").read_bytes()

    assert weights(cooldown) == weights(at_once) != weights(whole) == weights(calm)
    assert "loss nan" in str(execute.failure(root, diverging.name))
    assert (
        missing(root, plan.cooldown_from(16, "1e30", 1))
        == f"{diverging.name}, which it needs, failed"
    )
    assert missing(root, plan.cosine("1e-2", 1)) == "has not ended"
    assert largest_rate(plan, root) == "1e-2"
    with pytest.raises(SystemExit, match="no cosine run of the first seed has ended"):
        tuned_rate(plan, root)
    (job, *_) = measure.measurements(plan, root, [cooldown, diverging])
    capsys.readouterr()
    execute.run([job, Job("failing", job.arguments, diverging.name)], root, 1)
    assert job.output is not None and json.loads(job.output.read_text())[0]["label"] == "raw"
    execute.run([job, Job(diverging.name, ("pretrain",))], root, 1)
    assert capsys.readouterr().out.count("$ llmtrain") == 1
    with pytest.raises(SystemExit, match="bad ended with 2"):
        execute.run([Job("bad", ("average", "nowhere"))], root, 1)


def test_network_and_disk_failures_are_not_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    job = Job("lost", ("average", "nobody/nothing", "--every", "1000"), refusable=True)
    with pytest.raises(
        SystemExit, match=r"lost ended with 1: see .*; repeat the command to resume"
    ):
        execute.run([job], tmp_path, 1)
    assert execute.failure(tmp_path, "lost") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "no permission for nobody"), (403, "no permission for nobody"), (None, "has no nobody")],
)
def test_a_refused_hub_request_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int | None, said: str
) -> None:
    job = Job("window", ("average", "nobody/nothing", "--every", "1000"), refusable=True)
    with HubServer() as hub:
        for name, value in (hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}).items():
            monkeypatch.setenv(name, value)
        hub.refuses = status
        with pytest.raises(
            SystemExit, match=r"window ended with 2: see .*; repeat the command to resume"
        ):
            execute.run([job], tmp_path, 1)
    assert said in (tmp_path / "window.log").read_text()
    assert execute.failure(tmp_path, "window") is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_script_exits_like_a_command(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, SCRIPTS / "reproduce_cpu", "--quick", "--stage", "runs"]
    script = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert script.stdout is not None and "prepare" in script.stdout.readline()
    script.send_signal(number)
    assert (
        script.communicate(timeout=120)[1]
        .splitlines()[-1]
        .startswith("stopped with everything saved")
    )
    assert script.returncode == 128 + number


@pytest.mark.slow
def test_a_signal_stops_running_commands_with_a_checkpoint(plan: Plan, tmp_path: Path) -> None:
    training = plan.constant("1e-2", 1)
    words = [*training.arguments(plan.config, tmp_path), "--set", "train.max_steps=100000"]
    run = RunFolder(tmp_path / training.name)

    def stop() -> None:
        while not run.metrics.exists() or run.metrics.stat().st_size == 0:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(execute.Stopped):
        execute.run(
            [Job(training.name, tuple(words)), Job("never", ("doctor",), training.name)],
            tmp_path,
            2,
        )
    stopper.join()
    assert step_folders(run.states) and not is_locked(run.path)
    assert not (tmp_path / "never.log").exists()


def made_up(seeds: tuple[int, ...], gain: float) -> Results:
    """Results in which raw loses 0.1 each quarter and LAWA is lower by `gain`, more per seed."""
    plan: dict[str, Any] = {
        "steps": 400, "warmup": 10, "spacing": 10, "tokens_per_step": 1000,
        "rates": ["1e-2"], "seeds": list(seeds), "kept": [],
        "cooldown": 320, "forecasts": [160, 240, 320], "swa_early": 28, "swa_late": 300,
        "windows": [3, 5], "spacings": [1, 2], "widths": [0.05],
    }  # fmt: skip
    runs = []
    for seed in seeds:
        raw = {step: 3.0 - step / 1000 + seed / 7 for step in range(20, 401, 10)}
        losses: Losses = {
            "raw": raw,
            "lawa-5x10": {step: loss - gain - seed / 1000 for step, loss in raw.items()},
        }
        runs.append(
            Run(
                f"constant-{seed}",
                "constant",
                "1e-2",
                seed,
                "llmtrain pretrain",
                [],
                0.5,
                None,
                losses,
            )
        )
    runs.append(Run("cosine-1", "cosine", "1e-2", 1, "llmtrain pretrain", [], None, "diverged", {}))
    commands = dict.fromkeys(
        ("curve", "windows", "methods", "end", "log", "merge-320"), "llmtrain average RUN"
    )
    made = {"date": "2024-01-01", "device": "a device"}
    return Results("Made up", made, plan, "1e-2", "1e-2", ["1e-2"], commands, runs)


@pytest.mark.slow
def test_the_page_matches_the_numbers(tmp_path: Path) -> None:
    results = made_up((1, 2, 3), gain=0.048)
    results.write(tmp_path / "cpu.json")
    assert Results.read(tmp_path / "cpu.json").runs[0].losses["raw"] == pytest.approx(
        results.runs[0].losses["raw"]
    )
    written = page.write_page(tmp_path).read_text()
    claim = "LAWA against raw: constant 1e-2, 100% of the run"
    row = f"| 1 | {claim} | cpu: a device | −0.0500 ± 0.0006 | 3 | gain |"
    assert row in written
    assert "| cosine-1 |  |  |  |  | diverged |" in written
    assert (
        "\n1. LAWA on the trajectory" in written
        and "| cosine 1e-2 | n/a | n/a | n/a | n/a |" in written
    )
    assert written.count("not run yet") == 3
    figures = re.findall(r"\]\(([\w.-]+\.svg)\)", written)
    assert len(figures) == 6 and all(
        (tmp_path / figure).read_text().rstrip().endswith("</svg>") for figure in figures
    )
    # LAWA is 0.049, 0.05 and 0.051 lower; raw falls by 0.001 per step: 40, 50 and 50 steps.
    (saved,) = [row for row in savings(results).tables[0].rows if row[0] == "constant 1e-2"]
    assert saved[1:] == ["3 of 3", "47 ± 3", "0.05 ± 0.00", "0.4 ± 0.0"]
    assert page.write_page(tmp_path).read_text() == written


def test_a_spike_has_a_peak_and_a_mean_excess() -> None:
    results = made_up((1,), gain=0.0)
    calm = dict.fromkeys((320, 330, 340), 2.0)
    for kind, raw, lawa in (
        ("calm", calm, calm),
        ("burst", {330: 5.0}, {330: 2.0}),
        ("after", {340: 2.3}, {340: 4.0}),
    ):
        losses: Losses = {"raw": raw, "online-lawa-5x10": lawa}
        results.runs.append(Run(kind, kind, "1e-2", 1, "llmtrain pretrain", [], 0.5, None, losses))
    found = in_a_spike(results)
    said = {each.what.partition(":")[0]: each.difference for each in found.comparisons}
    largest, mean = (
        said["LAWA's largest excess against raw's"],
        said["LAWA's mean excess against raw's"],
    )
    assert largest is not None and largest.mean == pytest.approx(2.0 - 3.0)
    assert mean is not None and mean.mean == pytest.approx(2.0 / 2 - 3.3 / 2)
    rows = {row[0]: row[1:] for row in found.tables[0].rows}
    assert rows["LAWA"] == ["+2.0000", "67%", "+1.0000", "+2.0000"]


@pytest.mark.slow
def test_the_gpu_plan_matches_its_header_and_queues_branches_last(
    tmp_path: Path,
) -> None:
    script = SCRIPTS / "reproduce_gpu"
    said = dict(
        re.findall(r"^    (first|seeds|short) +(\d+ +[\d.]+)$", script.read_text(), re.MULTILINE)
    )

    def answer(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, script, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    wrong = [sys.executable, script, "--stage", "plan", "--set", "no.key=1"]
    done = subprocess.run(wrong, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "unknown key" in done.stderr and "Traceback" not in done.stderr
    rows = {
        line.split()[0]: line.split()[1:] for line in answer("--stage", "plan").splitlines()[1:]
    }
    assert {name: said[name].split() for name in rows} == rows
    short = [line.split() for line in answer("--stage", "plan", "--short", "x").splitlines()[1:]]
    runs, hours = (sum(float(row[column]) for row in short) for column in (1, 2))
    assert said["short"].split() == [f"{runs:.0f}", f"{hours:.2g}"]
    (tmp_path / "sbatch").write_text('#!/bin/bash\necho "$@" >> calls\nwc -l < calls\n')
    (tmp_path / "sbatch").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    lines = answer("--stage", "first", "--slurm")
    subprocess.run(
        ["bash", "-eu"], input=lines, cwd=tmp_path, env=environment, text=True, check=True
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 6
    assert "--dependency=afterok:1 --job-name=cooldown-6e-4-to70000-seed1337" in calls[4]
    assert (
        "slurm.sbatch" in calls[4]
        and "--branch cooldown-6e-4-to70000-seed1337 --from 56000" in calls[4]
    )


@pytest.mark.slow
def test_a_public_series_is_measured_window_by_window(data_folder: Path, tmp_path: Path) -> None:
    revisions = write_series(tmp_path / "hub", tied=False, vocab_size=264)
    with HubServer() as hub:
        hub.add("model", "tiny/neox", revisions)
        command = [
            *(sys.executable, SCRIPTS / "reproduce_pythia", "--data", data_folder),
            *("--series", "tiny/neox"),
            *("--at", "9000", "--at", "13000", "--window", "3", "--every", "1000"),
            *("--tokens", "500", "--results", "results"),
        ]  # fmt: skip
        environment = os.environ | hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
        # A revision with the weights of another step.
        (revisions["step12000"] / "model.safetensors.index.json").touch()
        hub.repositories["model", "tiny/neox"]["step12000"] = revisions["step11000"]

        def run() -> str:
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert run().count("$ llmtrain average") == 4
        assert run().count("$ llmtrain") == 0
    root, document = (
        tmp_path / "runs" / "reproduce-pythia",
        json.loads((tmp_path / "results" / "pythia.json").read_text()),
    )
    assert not list(tmp_path.glob("home/**/*.safetensors")) and not [
        path for path in root.iterdir() if path.is_dir()
    ]
    raw, average, _, refused = document["windows"]
    assert average["bits_per_byte"] != raw["bits_per_byte"]
    assert "same" in refused["refused"] and refused["loss"] is None
    shown = (tmp_path / "results" / "README.md").read_text()
    assert (
        f"| 9000 | 1000 | {average['bits_per_byte'] - raw['bits_per_byte']:+.4f} |".replace(
            "-", "−"
        )
        in shown
    )
    assert "- neox-13000-3x1000: " in shown


@pytest.mark.slow
def test_the_quick_run_writes_every_table_and_figure(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPTS / "reproduce_cpu", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = tmp_path / "runs" / "reproduce-quick" / "results"
    document = Results.read(results / "cpu.json")
    assert all(run.failure is None for run in document.runs)
    written = (results / "README.md").read_text()
    assert {line.split(" | ")[0] for line in written.splitlines() if line.startswith("| ")} >= {
        f"| {n}" for n in range(1, 7)
    }
    assert "not measured" not in re.sub(r".*10×32.*", "", written)
    # The training log, `eval` and a sweep report the same loss for the same weights.
    (constant,) = document.of("constant", document.tuned)
    (calm,) = document.of("calm", document.tuned)
    assert constant.losses["raw"][300] == pytest.approx(calm.losses["raw"][300], rel=1e-4)
    assert constant.losses["lawa-5x4"][300] == pytest.approx(
        constant.losses["online-lawa-5x4"][300], rel=1e-4
    )
    assert constant.losses["posthoc-ema-0.05"][300] == pytest.approx(
        constant.losses["power-ema-0.05"][300], rel=1e-4
    )
