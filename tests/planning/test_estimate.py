"""Hours, communication and averaging by simple arithmetic; unknown values stay unknown."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from places import REPOSITORY

from llmtrain.cli.common import format_number
from llmtrain.config.loading import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.errors import UserError
from llmtrain.planning.estimate import CostEstimate, estimate
from llmtrain.planning.hardware import HardwareOptions
from llmtrain.planning.memory import device_memory, peak
from llmtrain.planning.sizes import Architecture

Build = Callable[..., RunConfig]
Command = Callable[..., "subprocess.CompletedProcess[str]"]
SMALL = REPOSITORY / "configs" / "gpt2-small.yaml"


def small(options: HardwareOptions, *overrides: str) -> CostEstimate:
    return estimate(load_config(SMALL, list(overrides)), options)


def test_hours_follow_from_flops_peak_and_mfu() -> None:
    plan = small(HardwareOptions(devices=8, mfu=0.5))
    assert plan.flops == 27_525_120_000 * plan.flops_per_token
    assert plan.time.hours == pytest.approx(plan.flops / (8 * 0.5 * 989e12) / 3600)
    measured = small(HardwareOptions(devices=8, tokens_per_second=plan.time.tokens_per_second))
    assert measured.time.hours == pytest.approx(plan.time.hours)
    assert measured.machine.mfu == pytest.approx(0.5)


@pytest.mark.parametrize("device", ["cpu", "other"])
def test_an_unlisted_device_has_no_guessed_values(device: str) -> None:
    plan = small(HardwareOptions(devices=8, device=device), "train.precision=float32")
    assert plan.communication is not None
    assert (plan.time.hours, plan.time.tokens_per_second, plan.machine.memory) == (None, None, None)
    assert (plan.communication.seconds, plan.communication.hidden) == (None, None)
    assert small(HardwareOptions(device=device, tokens_per_second=1e5)).time.hours is not None


def test_float32_has_no_published_peak() -> None:
    assert small(HardwareOptions(), "train.precision=float32").time.hours is None


def test_ddp_communicates_once_per_step_and_fsdp_for_every_micro_batch() -> None:
    ddp = small(HardwareOptions(devices=8))
    fsdp = small(HardwareOptions(devices=8, parallel="fsdp"))
    assert ddp.communication is not None
    assert fsdp.communication is not None
    numbers = ddp.parameters * 7 / 8
    assert ddp.micro_batches == 3
    assert ddp.communication.bytes == pytest.approx(2 * 4 * numbers)
    assert fsdp.communication.bytes == pytest.approx((3 * (2 + 2) + 4) * numbers)
    assert ddp.communication.seconds == pytest.approx(ddp.communication.bytes / 450e9)
    beyond = small(HardwareOptions(devices=24))
    assert beyond.communication is not None
    assert beyond.communication.seconds == pytest.approx(beyond.communication.bytes / 50e9)


def test_communication_beyond_the_backward_pass_is_exposed() -> None:
    options = HardwareOptions(devices=8, mfu=0.4)
    plan = small(options)
    micro = 16 * 1024 * plan.flops_per_token
    backward = micro * 2 / 3 / (0.4 * 989e12)
    assert plan.communication is not None
    just = plan.communication.bytes / backward / 1e9
    hidden = small(replace(options, interconnect_gbps=just * 1.01)).communication
    late = small(replace(options, interconnect_gbps=just / 2)).communication
    assert hidden is not None
    assert hidden.hidden is True
    assert late is not None
    assert late.hidden is False
    assert late.exposed_seconds == pytest.approx(backward)


def test_shorter_first_sequences_cost_less(planned: Build) -> None:
    whole = estimate(planned(), HardwareOptions())
    short = estimate(planned(data__block_warmup={"start": 8, "steps": 2}), HardwareOptions())
    flops = Architecture(planned().model, 64).flops_per_token
    assert whole.tokens - short.tokens == 64 * (64 - 8)
    assert whole.flops - short.flops == 64 * (64 * flops(64) - 8 * flops(8))


def test_averaging_reads_each_input_once() -> None:
    estimated = small(HardwareOptions())
    last, every_snapshot = estimated.averaging
    folder = estimated.storage.snapshots.bytes_each
    assert (last.averages, last.read, last.written) == (1, 5 * folder, folder)
    assert every_snapshot.averages == 340 - 4
    assert every_snapshot.read == 340 * folder
    assert last.seconds == pytest.approx(6 * folder / 2e9)
    assert every_snapshot.memory < 100e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (HardwareOptions(devices=0), "--devices 0"),
        (HardwareOptions(devices=-1), "--devices -1"),
        (HardwareOptions(mfu=2), "--mfu 2"),
        (HardwareOptions(mfu=float("nan")), "--mfu nan"),
        (HardwareOptions(device="tpu"), "'tpu'"),
        (HardwareOptions(devices=7), "not divisible by 7"),
        (HardwareOptions(devices=48), "micro_batch 16"),
        (HardwareOptions(tokens_per_second=1.0, mfu=0.4), "only one of them"),
    ],
)
def test_invalid_options(options: HardwareOptions, message: str) -> None:
    with pytest.raises(UserError) as raised:
        small(options)
    assert message in f"{raised.value} {raised.value.hint}"


@pytest.mark.parametrize(("devices", "share"), [(1, 384), (8, 48)])
def test_auto_is_the_largest_micro_batch_that_fits(devices: int, share: int) -> None:
    config = load_config(SMALL, ["train.micro_batch=auto"])
    plan = estimate(config, HardwareOptions(devices=devices))
    layout, sizes = plan.machine.layout, [size for size in range(1, share + 1) if share % size == 0]
    totals = {
        size: peak(device_memory(config.with_micro_batch(size), layout)).total for size in sizes
    }
    largest = max(size for size in sizes if totals[size] <= 0.9 * 80e9)
    assert (plan.machine.micro_batch, plan.micro_batches) == (largest, share // largest)
    assert plan.memory.peak.total == totals[largest]
    assert any(f"auto means {largest}, the largest" in line for line in plan.machine.assumptions)
    unknown = estimate(config, HardwareOptions(devices=devices, device="other")).machine
    assert unknown.micro_batch == 16
    assert any("memory is unknown" in line for line in unknown.assumptions)


def test_plan_prints_tables_and_json(llmtrain: Command, tmp_path: Path) -> None:
    shown = llmtrain("plan", "--config", SMALL, "--devices", "8", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "124,373,760" in shown.stdout
    printed = llmtrain("plan", "--config", SMALL, "--devices", "8", "--json", cwd=tmp_path)
    document = json.loads(printed.stdout)
    assert document["time"]["hours"] == pytest.approx(small(HardwareOptions(devices=8)).time.hours)
    refused = llmtrain("plan", "--config", SMALL, "--device", "tpu", cwd=tmp_path)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 2


@pytest.mark.parametrize("interconnect", [None, 400.0])
def test_the_readme_lists_the_estimates(interconnect: float | None) -> None:
    readme = (REPOSITORY / "llmtrain" / "planning" / "README.md").read_text()
    command = re.search(r"^llmtrain plan --config .*?#", readme, re.DOTALL | re.MULTILINE)
    assert command is not None
    common = re.findall(r"--set (\S+)", command[0])
    rows = re.findall(r"^\|[^`|]*`(gpt2-.*?)` \| (.*) \|$", readme, re.MULTILINE)
    assert len(rows) == 5
    for text, cells in rows:
        config, *words = shlex.split(text)
        more = [value for word, value in pairwise(words) if word == "--set"]
        run = load_config(REPOSITORY / "configs" / f"{config}.yaml", [*common, *more])
        options = HardwareOptions(parallel="fsdp" if "fsdp" in words else "ddp")
        eight, *beyond = (
            estimate(
                run, replace(options, devices=n, interconnect_gbps=interconnect if n > 8 else None)
            )
            for n in (8, 64, 512)
        )
        if interconnect is not None:
            assert all(plan.communication and plan.communication.hidden for plan in beyond)
            continue
        plans = [eight, *beyond]
        memory = [format_number(plan.memory.peak.total / 1e9) for plan in (plans[0], plans[-1])]
        assert cells.split(" | ") == [
            f"{eight.parameters / 1e6:.0f}M",
            " / ".join(memory),
            format_number(eight.time.hours and eight.time.hours * 8),
            " / ".join(format_number(plan.time.hours) for plan in plans),
            " / ".join(format_number(plan.time.hours_exposed) for plan in plans),
        ]


def test_plan_does_not_import_torch() -> None:
    code = f"import sys; sys.argv = ['llmtrain', 'plan', '--config', {str(SMALL)!r}]\n"
    code += "import atexit; atexit.register(lambda: print('torch' in sys.modules))\n"
    code += "from llmtrain.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
