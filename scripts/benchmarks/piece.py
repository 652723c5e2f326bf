"""A piece of the model alone: time of its forward and backward, memory that it adds, its error to float64.

Why the error: rounding more, or leaving terms out, makes anything faster. It is found in the process that
is measured, once, before any time is taken.

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
    """The rows of some sides; in place of those of one that fails at once, what it said."""
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
    """A side of it.

    Args:
        forward: called within autocast.
        leaves: whose gradients the backward pass forms.
        precision: of matrix products.
        exact: gives, in float64, what `forward` does, and the gradients of the leaves.
        times: passes in a round.
        upstream: the gradient of the result; None where that is a loss.
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
    added = peak_memory(device) - held  # now: the comparison takes far more
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
    """A copy that wants a gradient of its own; on the CPU where the device has no float64."""
    place = "cpu" if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(place).double().requires_grad_()


def _relative_error(found: Tensor | None, exact: Tensor) -> float:
    """The norm of the difference by that of the exact one."""
    assert found is not None
    return float((found.to(exact.device).double() - exact).norm() / exact.norm())


def require_precision(precision: Precision) -> str | None:
    """Why matrix products of a precision are not measured here, or None where they are."""
    native = (
        precision == "float32" or resolve_precision("auto", resolve_device("auto")) == precision
    )
    return None if native else f"no {precision} products in this device"
