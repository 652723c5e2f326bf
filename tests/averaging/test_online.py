"""The online EMA against float64 and against torch's AveragedModel."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from llmtrain.averaging.online import OnlineEma, swapped_in
from llmtrain.config import EmaConfig


def walk(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def paper_decay(decay: float, n: int) -> float:
    return min(decay, 1 - (1 + n) ** (-2 / 3))


def test_ema_with_the_papers_warmup() -> None:
    model = nn.Linear(7, 5)
    ema = OnlineEma(EmaConfig(kind="ema", decay=0.9), model)

    def average(old: torch.Tensor, new: torch.Tensor, n: int | torch.Tensor) -> torch.Tensor:
        return torch.lerp(new, old, paper_decay(0.9, int(n)))

    reference = AveragedModel(model, avg_fn=average)
    exact = None
    for n in range(60):
        walk(model, seed=n)
        ema.update()
        reference.update_parameters(model)
        weight = model.weight.detach().double()
        decay = paper_decay(0.9, n)
        exact = weight if exact is None else decay * exact + (1 - decay) * weight
    torch.testing.assert_close(ema.weights()["weight"], reference.module.weight)
    assert exact is not None
    torch.testing.assert_close(ema.weights()["weight"].double(), exact, atol=1e-5, rtol=1e-5)


def test_the_first_update_copies_the_weights() -> None:
    model = nn.Linear(3, 3)
    ema = OnlineEma(EmaConfig(kind="ema"), model)
    walk(model, seed=1)
    ema.update()
    assert torch.equal(ema.weights()["weight"], model.weight)


def test_loading_continues_bit_for_bit() -> None:
    model = nn.Linear(3, 3)
    one = OnlineEma(EmaConfig(kind="ema"), model)
    for n in range(5):
        walk(model, n)
        one.update()
    two = OnlineEma(EmaConfig(kind="ema"), model)
    two.load({name: t.clone() for name, t in one.weights().items()}, one.updates)
    walk(model, 9)
    one.update()
    two.update()
    assert torch.equal(one.weights()["weight"], two.weights()["weight"])


def test_swapping_in_changes_the_output_and_gives_the_weights_back() -> None:
    model = nn.Linear(3, 3)
    own = model.weight.detach().clone()
    zeros = {"weight": torch.zeros(3, 3), "bias": torch.zeros(3)}
    with swapped_in(model, zeros):
        assert not model(torch.ones(3)).any()
    assert torch.equal(model.weight, own)
    assert not zeros["weight"].any()
