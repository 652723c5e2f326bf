"""Chunked cross-entropy and materialized attention against torch's own."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.config.schema import ModelConfig
from llmtrain.model import chunk_sizes, cross_entropy
from llmtrain.model.cross_entropy import linear_cross_entropy
from llmtrain.model.gpt import GPT, materialized_attention

IGNORE = -1


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small chunks, so that small inputs have several."""
    monkeypatch.setattr(chunk_sizes, "CHUNK_BYTES", {"cpu": 6 * 4 * 97})
    monkeypatch.setattr(chunk_sizes, "CACHE_BYTES", 4 * 4 * 97)
    monkeypatch.setattr(chunk_sizes, "SLAB_ROWS", {"cpu": 20})
    yield


def random_inputs(
    seed: int, rows: int = 23, vocabulary: int = 97, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 16, generator=generator) * scale
    weight = torch.randn(vocabulary, 16, generator=generator)
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=generator)


def with_gradients(function: Any, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(hidden, weight)
    (3.0 * loss).backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss and gradients from all logits, in float64."""

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(h @ w.T, targets, ignore_index=IGNORE)

    return with_gradients(loss, hidden.double(), weight.double())


@settings(max_examples=60)
@given(
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.integers(2, 130),
    st.floats(0.1, 30),
    st.floats(0, 0.9),
)
def test_float32_loss_and_gradients_equal_the_reference(
    seed: int, rows: int, vocabulary: int, scale: float, ignored: float
) -> None:
    hidden, weight, targets = random_inputs(seed, rows, vocabulary, scale)
    drawn = torch.rand(rows - 1, generator=torch.Generator().manual_seed(seed))
    targets[1:][drawn < ignored] = IGNORE
    expected = reference(hidden, weight, targets)
    found = with_gradients(
        lambda h, w: linear_cross_entropy(h, w, targets, ignore=IGNORE), hidden, weight
    )
    alone = linear_cross_entropy(hidden, weight, targets, ignore=IGNORE)
    torch.testing.assert_close(alone, found[0], rtol=1e-5, atol=1e-6)
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(
            mine.double(),
            right,
            rtol=1e-4,
            atol=1e-6 * (1 + scale) + 1e-5 * float(right.abs().max()),
        )
    assert math.isclose(found[0].item(), expected[0].item(), rel_tol=1e-5, abs_tol=1e-6)


def test_bfloat16_only_rounds_the_products() -> None:
    hidden, weight, targets = random_inputs(5, rows=64)
    hidden, weight = (
        hidden.bfloat16().float(),
        weight.bfloat16().float(),
    )  # inputs without rounding error
    expected = reference(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(
            lambda h, w: linear_cross_entropy(h, w, targets, ignore=IGNORE), hidden, weight
        )
    assert found[0].dtype == torch.float32 and found[2].dtype == torch.float32
    assert math.isclose(found[0].item(), expected[0].item(), rel_tol=5e-3)
    for mine, right in zip(found[1:], expected[1:], strict=True):
        assert (mine - right).norm() / right.norm() < 2**-7  # bfloat16 has 8 bits


def test_gradient_of_a_confident_prediction_is_accurate() -> None:
    weight = torch.eye(97, 16)
    hidden = torch.zeros(4, 16)
    hidden[:, 3] = 12.0
    targets = torch.full((4,), 3)
    expected = reference(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(
            lambda h, w: linear_cross_entropy(h, w, targets, ignore=IGNORE), hidden, weight
        )
    torch.testing.assert_close(found[2][3].double(), expected[2][3], rtol=2e-2, atol=0)


@pytest.mark.slow
def test_compiled_loss_equals_eager_loss() -> None:
    hidden, weight, targets = random_inputs(6)
    plain, fused = (
        with_gradients(
            lambda h, w, f=f: linear_cross_entropy(h, w, targets, ignore=IGNORE, fused=f),
            hidden,
            weight,
        )
        for f in (False, True)
    )
    for mine, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest result of an operation."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_logits_are_never_materialized() -> None:
    hidden, weight, targets = random_inputs(7, rows=600)
    with LargestTensor() as whole:
        reference(hidden, weight, targets)
    with LargestTensor() as chunks:
        with_gradients(
            lambda h, w: linear_cross_entropy(h, w, targets, ignore=IGNORE), hidden, weight
        )
        linear_cross_entropy(hidden, weight, targets, ignore=IGNORE)
    assert whole.elements == 600 * 97
    assert chunks.elements == 600 * 16  # the hidden states


def test_no_gradients_are_computed_without_grad_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        cross_entropy, "_accumulate_product", lambda *given, first: calls.append(first)
    )
    hidden, weight, targets = random_inputs(8)
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, weight.requires_grad_(), targets, ignore=IGNORE)
    assert not calls
    trained = linear_cross_entropy(hidden, weight, targets, ignore=IGNORE)
    torch.testing.assert_close(evaluated, trained.detach())
    assert calls


def test_model_gradients_equal_those_of_its_logits() -> None:
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=97)
    model = GPT(config, 8, seed=3)
    tokens = torch.randint(97, (3, 9), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    model(inputs, targets).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    F.cross_entropy(model.logits(inputs).flatten(0, 1), targets.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert found[name].layout == torch.strided
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_materialized_attention_equals_torch(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(2, 3, 33, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)
    ]
    upstream = torch.randn(2, 3, 33, 8, generator=generator)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y = materialized_attention(*inputs, dropout_p=0.0, scale=0.3)
    reference_y = F.scaled_dot_product_attention(*exact, is_causal=True, scale=0.3)
    found = [y, *torch.autograd.grad(y, inputs, upstream.to(dtype))]
    expected = [reference_y, *torch.autograd.grad(reference_y, exact, upstream.double())]
    for mine, other in zip(found, expected, strict=True):
        assert (mine - other).norm() / other.norm() < tolerance


@pytest.mark.parametrize("few", [1, 2, 5])
def test_attention_without_gradients_is_chunked(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    monkeypatch.setattr(chunk_sizes, "ATTENTION_BYTES", few * 4 * 3 * 17**2 + 8)
    q, k, v = torch.randn(
        3, 5, 3, 17, 8, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    whole = materialized_attention(q, k, v, dropout_p=0.0, scale=0.3)
    with torch.no_grad(), LargestTensor() as chunks:
        joined = materialized_attention(q, k, v, dropout_p=0.0, scale=0.3)
    torch.testing.assert_close(joined, whole.detach())
    assert chunks.elements == max(few * 3 * 17**2, 5 * 3 * 17 * 8)
