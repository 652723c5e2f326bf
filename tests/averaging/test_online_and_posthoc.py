"""Online averages of a run match post-hoc averages of its checkpoints, through the command."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoints.gpt2_folder import load_weights
from llmtrain.config.schema import RunConfig
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.run import pretrain

pytestmark = pytest.mark.slow

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(tiny: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Train with a snapshot at every step."""
    averages = [
        {"kind": "lawa", "every": 4, "window": 3, "save_every": 4},
        {"kind": "running-mean"},
        {"kind": "power-ema", "sigma_rel": 0.05},
        {"kind": "power-ema", "sigma_rel": 0.10},
        {"kind": "power-ema", "sigma_rel": 0.08},
    ]
    config = tiny(
        averages=averages,
        train__max_steps=30,
        checkpoint={"snapshot_every": 1, "state_every": 30},
    )
    return pretrain(config, tmp_path_factory.mktemp("trained") / "run", log=lambda line: None).run


def made(llmtrain: Command, run: RunFolder, *arguments: str) -> dict[str, torch.Tensor]:
    result = llmtrain("average", run.path, *arguments, "--json", cwd=run.path.parent)
    assert result.returncode == 0, result.stderr
    return load_weights(Path(json.loads(result.stdout)[0]["path"]))


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


def test_posthoc_lawa_equals_online_lawa_bit_for_bit(run: RunFolder, llmtrain: Command) -> None:
    posthoc = made(llmtrain, run, "--every", "4", "--window", "3", "--at", "28")
    assert equal(posthoc, load_weights(run.average("online-lawa-3x4", 28)))


@pytest.mark.parametrize(("start", "to"), [(2, 30), (10, 20), (28, 29)])
def test_dense_mean_from_two_files(run: RunFolder, llmtrain: Command, start: int, to: int) -> None:
    dense = made(llmtrain, run, "--method", "dense", "--from", str(start), "--at", str(to))
    raw = [load_weights(run.snapshot(step)) for step in range(start + 1, to + 1)]
    for name, tensor in dense.items():
        exact = torch.stack([weights[name].double() for weights in raw]).mean(0)
        assert torch.equal(tensor, exact.float()) or (
            tensor.double() - exact
        ).abs().max() <= 1.2e-7 * (exact.abs().max())


def test_power_ema_of_another_width(run: RunFolder, llmtrain: Command) -> None:
    """Compare with the online EMA of width 0.08: closer than either stored EMA."""
    oracle = load_weights(run.average("power-ema-0.08", 30))
    (run.averages / "power-ema-0.08").rename(run.path.parent / "aside")
    posthoc = made(llmtrain, run, "--method", "posthoc-ema", "--sigma-rel", "0.08")

    def distance(weights: dict[str, torch.Tensor]) -> float:
        return (
            sum((weights[name] - oracle[name]).double().square().sum().item() for name in oracle)
            ** 0.5
        )

    stored = min(distance(load_weights(run.average(f"power-ema-{s}", 30))) for s in ("0.05", "0.1"))
    assert distance(posthoc) < 0.1 * stored
