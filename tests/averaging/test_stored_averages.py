"""Averages of stored averages: the mean over every step of a span, any power-function EMA."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import ulps
from safetensors.torch import load_file, save_file
from tiny_runs import MakeRun

from llmtrain.averaging.average import average
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest
from llmtrain.averaging.stored_averages import gamma_of
from llmtrain.checkpoints.series import run_series
from llmtrain.errors import UserError
from llmtrain.storage.commit import staged_folder
from llmtrain.storage.run_folder import RunFolder

STEPS, SIZE, WARM_UP = 60, 40, 10


def walk() -> np.ndarray:
    """Return float32 weights; row t is step t."""
    generator = np.random.default_rng(3)
    moves = generator.normal(size=(STEPS + 1, SIZE)) * 0.01
    return (1.0 + np.cumsum(moves, axis=0)).astype(np.float32)


def store(
    run: RunFolder, label: str, step: int, mean: np.ndarray, about: dict[str, object]
) -> None:
    high = mean.astype(np.float32)
    low = (mean - high.astype(np.float64)).astype(np.float32)
    with staged_folder(run.average(label, step)) as folder:
        save_file({"w": torch.from_numpy(high)}, folder / "model.safetensors")
        if about["method"] == "running-mean":
            save_file({"w": torch.from_numpy(low)}, folder / "model.residual.safetensors")
        (folder / "provenance.json").write_text(json.dumps(about | {"step": step}))


@pytest.fixture
def run(make_run: MakeRun) -> RunFolder:
    made = make_run(list(range(20, STEPS + 1, 10)), warmup=WARM_UP)
    path = walk()
    for step in range(20, STEPS + 1, 10):
        mean = path[WARM_UP + 1 : step + 1].astype(np.float64).mean(0)
        about = {"method": "running-mean", "updates": step - WARM_UP, "every": 1, "start": WARM_UP}
        store(made, "running-mean", step, mean, about)
    for sigma in (0.05, 0.10):
        gamma, mean = gamma_of(sigma), path[0].astype(np.float64)
        for t in range(1, STEPS + 1):
            beta = (1 - 1 / t) ** (gamma + 1)
            mean = beta * mean + (1 - beta) * path[t]
            if t % 10 == 0 and t >= 20:
                store(
                    made,
                    f"power-ema-{sigma:g}",
                    t,
                    mean,
                    {"method": "power-ema", "gamma": gamma, "sigma_rel": sigma, "start": 0},
                )
    return made


def made_by(run: RunFolder, **request: object) -> tuple[torch.Tensor, Path]:
    series = run_series(run)
    (result,) = average(series, make_specs(series, AverageRequest(**request)))  # type: ignore[arg-type]  # keyword options
    return load_file(result.spec.target / "model.safetensors")["w"], result.spec.target


@pytest.mark.parametrize(("start", "to"), [(20, 60), (50, 60), (10, 40), (30, 40)])
def test_dense_is_the_mean_over_every_step_of_the_span(run: RunFolder, start: int, to: int) -> None:
    got, folder = made_by(run, method="dense", start=start, at=str(to))
    exact = walk()[start + 1 : to + 1].astype(np.float64).mean(0)
    assert ulps(got, torch.from_numpy(exact)) <= 1
    assert folder == run.average(f"dense-{start}-{to}", to)
    document = json.loads((folder / "provenance.json").read_text())
    assert document["options"]["updates"] == to - start
    assert "model.residual.safetensors" in document["inputs"][-1]["files"]


def test_short_span_needs_the_residual(run: RunFolder) -> None:
    """Without residuals, the difference of long means loses precision."""
    for step in (50, 60):
        (run.average("running-mean", step) / "model.residual.safetensors").unlink()
        (run.average("running-mean", step) / "integrity.json").unlink()
    got, _ = made_by(run, method="dense", start=50, at="60")
    assert ulps(got, torch.from_numpy(walk()[51:61].astype(np.float64).mean(0))) > 1


def test_dense_needs_stored_steps(run: RunFolder) -> None:
    with pytest.raises(UserError, match="no running mean at 25; it has 20 to 60 every 10"):
        made_by(run, method="dense", start=25, at="40")


@pytest.mark.parametrize("sigma", [0.05, 0.07, 0.12])
@pytest.mark.parametrize("at", ["60", "40"])
def test_posthoc_ema_of_any_length(run: RunFolder, sigma: float, at: str) -> None:
    got, folder = made_by(run, method="posthoc-ema", sigma_rel=sigma, at=at)
    path, mean = walk(), np.zeros(SIZE)
    for t in range(1, int(at) + 1):
        beta = (1 - 1 / t) ** (gamma_of(sigma) + 1)
        mean = beta * mean + (1 - beta) * path[t]
    error = np.linalg.norm(got.numpy() - mean)
    assert error < 0.1 * np.linalg.norm(path[int(at)] - mean)
    document = json.loads((folder / "provenance.json").read_text())
    assert max(entry["step"] for entry in document["inputs"]) == int(at)
    assert document["options"]["profile_error"] < 0.1


def test_posthoc_ema_ignores_later_steps(run: RunFolder) -> None:
    before, _ = made_by(run, method="posthoc-ema", sigma_rel=0.08, at="40")
    for label in ("power-ema-0.05", "power-ema-0.1"):
        path = run.average(label, 60) / "model.safetensors"
        save_file({"w": torch.full((SIZE,), 1e6)}, path)
    after, _ = made_by(run, method="posthoc-ema", sigma_rel=0.08, at="40", label="again")
    assert torch.equal(before, after)
