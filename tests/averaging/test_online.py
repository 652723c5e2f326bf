"""Online averages match float64 definitions and torch's AveragedModel, also after a reload."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from llmtrain.averaging.online import OnlineAverage, build_average, swapped_in
from llmtrain.averaging.stored_averages import gamma_of
from llmtrain.config.sections import AverageConfig

CONFIG: TypeAdapter[AverageConfig] = TypeAdapter(AverageConfig)
KINDS: list[dict[str, Any]] = [
    {"kind": "ema", "decay": 0.9},
    {"kind": "ema", "decay": 0.5, "every": 3},
    {"kind": "swa", "start": 10, "every": 5},
    {"kind": "lawa", "every": 4, "window": 3},
    {"kind": "running-mean"},
    {"kind": "running-mean", "every": 2},
    {"kind": "power-ema", "sigma_rel": 0.1},
    {"kind": "power-ema", "sigma_rel": 0.2, "every": 4},
]


def names(values: dict[str, Any]) -> str:
    return "-".join(str(value) for value in values.values())


def build(model: nn.Module, values: dict[str, Any], warmup: int = 4) -> OnlineAverage:
    return build_average(CONFIG.validate_python(values), model, warmup_steps=warmup)


def walk(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def follow(model: nn.Module, average: OnlineAverage, first: int, last: int) -> dict[int, Tensor]:
    """Train from step `first` to `last`; return the float64 weights of each step."""
    path = {}
    for step in range(first, last + 1):
        walk(model, step)
        if average.due(step):
            average.update(step)
        path[step] = model.weight.detach().double()
    return path


def oracle(values: dict[str, Any], path: dict[int, Tensor], warmup: int) -> Tensor:
    """Return the average by its definition, in float64, from the weights of all steps."""
    every = values.get("every", 1)
    steps = [step for step in path if step % every == 0]
    match values["kind"]:
        case "swa":
            return torch.stack([path[s] for s in steps if s >= values["start"]]).mean(0)
        case "running-mean":
            return torch.stack([path[s] for s in steps if s > warmup]).mean(0)
        case "lawa":
            return torch.stack([path[s] for s in steps if s > warmup][-values["window"] :]).mean(0)
    mean = path[steps[0]]
    for n, step in enumerate(steps):
        if values["kind"] == "ema":
            decay = min(values["decay"], 1 - (1 + n) ** (-2 / 3))
        else:
            decay = (1 - every / step) ** (gamma_of(values["sigma_rel"]) + 1)
        mean = decay * mean + (1 - decay) * path[step]
    return mean


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("values", KINDS, ids=names)
def test_matches_the_float64_definition(values: dict[str, Any], offload: bool) -> None:
    model = nn.Linear(7, 5)
    average = build(model, values | ({"offload": True} if offload else {}))
    path = follow(model, average, 1, 60)
    expected = oracle(values, path, warmup=4)
    exact = values["kind"] in {"swa", "lawa", "running-mean"}
    tolerance = {"atol": 0.0, "rtol": 6e-8} if exact else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(average.weights()["weight"].double(), expected, **tolerance)


@pytest.mark.parametrize("values", KINDS, ids=names)
def test_resumes_bit_for_bit(values: dict[str, Any]) -> None:
    model = nn.Linear(3, 3)
    one = build(model, values)
    follow(model, one, 1, 31)
    two = build(model, values)
    two.load({name: tensor.clone() for name, tensor in one.state().items()}, one.updates)
    for step in range(32, 50):
        walk(model, step)
        for average in (one, two):
            if average.due(step):
                average.update(step)
    assert one.updates == two.updates
    assert torch.equal(one.weights()["weight"], two.weights()["weight"])


@pytest.mark.parametrize("values", KINDS, ids=names)
def test_state_is_not_a_view_of_the_model(values: dict[str, Any]) -> None:
    model = nn.Linear(3, 3)
    average = build(model, values)
    follow(model, average, 1, 20)
    before = average.weights()["weight"].clone()
    walk(model, 99)
    assert torch.equal(average.weights()["weight"], before)


def test_ema_matches_torch() -> None:
    model = nn.Linear(7, 5)
    average = build(model, {"kind": "ema", "decay": 0.9})

    def blend(old: Tensor, new: Tensor, n: int | Tensor) -> Tensor:
        return torch.lerp(new, old, min(0.9, 1 - (1 + int(n)) ** (-2 / 3)))

    reference = AveragedModel(model, avg_fn=blend)
    for step in range(1, 50):
        walk(model, step)
        average.update(step)
        reference.update_parameters(model)
    torch.testing.assert_close(average.weights()["weight"], reference.module.weight)


def test_swa_matches_torch() -> None:
    model = nn.Linear(7, 5)
    average = build(model, {"kind": "swa", "start": 1})
    reference = AveragedModel(model)
    for step in range(1, 50):
        walk(model, step)
        average.update(step)
        reference.update_parameters(model)
    torch.testing.assert_close(average.weights()["weight"], reference.module.weight)


def test_running_mean_is_more_precise_than_float32() -> None:
    model = nn.Linear(9, 9)
    average = build(model, {"kind": "running-mean"}, warmup=0)
    path = follow(model, average, 1, 400)
    residual = average.residual()
    assert residual is not None
    kept = average.weights()["weight"].double() + residual["weight"].double()
    exact = torch.stack(list(path.values())).mean(0)
    assert (kept - exact).abs().max() < 1e-12 * exact.abs().max()


@given(window=st.integers(1, 5), every=st.integers(1, 4), warmup=st.integers(0, 6))
def test_lawa_is_ready_with_a_full_window_without_warmup(
    window: int, every: int, warmup: int
) -> None:
    model = nn.Linear(2, 2)
    average = build(model, {"kind": "lawa", "window": window, "every": every}, warmup)
    path: dict[int, Tensor] = {}
    for step in range(1, 30):
        path |= follow(model, average, step, step)
        held = [s for s in path if s % every == 0 and s > warmup]
        assert average.ready == (len(held) >= window)
        if average.ready:
            expected = torch.stack([path[s] for s in held[-window:]]).mean(0)
            torch.testing.assert_close(
                average.weights()["weight"].double(), expected, atol=0, rtol=6e-8
            )
            assert average.provenance(step)["inputs"] == held[-window:]


def test_swapped_in_restores_the_weights() -> None:
    model = nn.Linear(3, 3)
    own = model.weight.detach().clone()
    zeros = {"weight": torch.zeros(3, 3), "bias": torch.zeros(3)}
    with swapped_in(model, zeros):
        assert not model(torch.ones(3)).any()
    assert torch.equal(model.weight, own)
    assert not zeros["weight"].any()


@pytest.mark.gpu
@pytest.mark.parametrize("values", KINDS, ids=names)
def test_gpu_gives_the_bits_of_the_cpu(values: dict[str, Any]) -> None:
    on_cpu, on_gpu = nn.Linear(7, 5), nn.Linear(7, 5).cuda()
    on_gpu.load_state_dict(on_cpu.state_dict())
    averages = [
        build(on_cpu, values),
        build(on_gpu, values),
        build(on_gpu, values | {"offload": True}),
    ]
    for step in range(1, 40):
        walk(on_cpu, step)
        with torch.no_grad():
            for mine, theirs in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
                mine.copy_(theirs)
        for average in averages:
            if average.due(step):
                average.update(step)
    first = averages[0].weights()["weight"]
    assert all(torch.equal(average.weights()["weight"].cpu(), first) for average in averages[1:])
