"""Measure one part of the model: forward and backward time, added memory, error vs float64.

Why: the error is measured too, because more rounding makes anything faster.

    side = piece(forward, [inputs], "bfloat16", exact, times=3); side()
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from llmtrain.runtime.device import (
    Precision,
    autocast,
    peak_memory,
    resolve_device,
    resolve_precision,
)

from .loops import keep_memory
from .measure import Row, Side, Worker, not_measured, rows, seconds, take_turns

PRECISIONS: tuple[Precision, ...] = ("bfloat16", "float32")


def compare(what: str, sides: Mapping[str, Worker], rounds: int, against: str) -> list[Row]:
    """Return the rows of the sides; a side that fails at once becomes an unmeasured row."""
    running, failed = dict(sides), []
    for name, worker in sides.items():
        try:
            worker()
        except RuntimeError as error:
            running.pop(name).close()
            failed.append(not_measured(what, name, str(error).partition("\n")[0]))
    taken = take_turns(running, rounds, unmeasured=0)
    return rows(what, taken, against if against in taken else None, {}) + failed


def piece(
    forward: Callable[[], Tensor],
    leaves: Sequence[Tensor],
    precision: Precision,
    exact: Callable[[], tuple[Tensor, ...]],
    times: int,
    upstream: Tensor | None = None,
) -> Side:
    """Build a side.

    Args:
        forward: called within autocast.
        leaves: tensors whose gradients are computed.
        precision: precision of matrix products.
        exact: returns the result of `forward` and the leaves' gradients in float64.
        times: passes per round.
        upstream: gradient of the result; None if the result is a loss.
    """
    device = resolve_device("auto")

    def training() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        with autocast(device, precision):
            result = forward()
        result.backward(upstream)
        return result.detach()

    def evaluation() -> Tensor:
        with torch.no_grad(), autocast(device, precision):
            return forward()

    keep_memory(device)
    held = peak_memory(device)
    training()
    found = training()
    added = peak_memory(device) - held  # before the comparison, which takes far more memory
    right, *gradients = exact()
    once = {
        "MB added": added / 1e6,
        "error": _relative_error(found, right),
        "gradient error": max(map(_relative_error, (leaf.grad for leaf in leaves), gradients)),
    }
    del right, gradients
    return lambda: {
        "ms": seconds(training, times) / times * 1e3,
        "ms, forward alone": seconds(evaluation, times) / times * 1e3,
        **once,
    }


def in_float64(tensor: Tensor) -> Tensor:
    """Return a float64 leaf copy, on the CPU if the device lacks float64."""
    place = "cpu" if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(place).double().requires_grad_()


def _relative_error(found: Tensor | None, exact: Tensor) -> float:
    """Return the norm of the difference divided by that of the exact tensor."""
    assert found is not None
    return float((found.to(exact.device).double() - exact).norm() / exact.norm())


def require_precision(precision: Precision) -> str | None:
    """Return why a precision is not measured here, or None if it is."""
    native = (
        precision == "float32" or resolve_precision("auto", resolve_device("auto")) == precision
    )
    return None if native else f"this device has no native {precision} products"
