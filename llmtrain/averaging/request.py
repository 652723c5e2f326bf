"""Requests: the options of `llmtrain average`, and the methods with the options that each accepts.

Why apart from `make_specs.py`: the command line takes its help from here and must not import numpy.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from typing_extensions import Doc

from llmtrain.averaging import coefficients
from llmtrain.errors import UserError
from llmtrain.storage.run_folder import RAW

DEFAULT_WINDOW = 5
"""k in the code of Sanyal et al. 2023."""

Integers = Literal["equal", "last"]

_MAX_STEP_DIGITS = 18
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FLAGS = {"start": "--from", "half_life": "--decay"}


@dataclass(frozen=True)
class AverageRequest:
    """The average to make; None selects the default of the method."""

    method: Annotated[str, Doc("Averaging method.")] = "lawa"
    every: Annotated[int | None, Doc("Training steps between two checkpoints.")] = None
    window: Annotated[int | None, Doc("Checkpoints in a window.  [default: 5; ema: all]")] = None
    at: Annotated[
        str | None, Doc("Last step of the window: last (newest), all, or a step.  [default: last]")
    ] = None
    disjoint: Annotated[
        bool | None, Doc("Use windows that share no checkpoint, as in the paper's script.")
    ] = None
    start: Annotated[int | None, Doc("First step to use (swa, ema); dense: the step before.")] = (
        None
    )
    shape: Annotated[
        str | None, Doc("Learning-rate decay that the merge emulates (decay).  [default: 1-sqrt]")
    ] = None
    decay: Annotated[
        float | None, Doc("Decay per checkpoint, in [0, 1), or half-life=STEPS (ema).")
    ] = None
    half_life: float | None = None
    """In training steps, instead of `decay`."""
    sigma_rel: Annotated[
        float | None, Doc("Width as a share of training, up to 0.2886 (posthoc-ema).")
    ] = None
    weights: Annotated[
        Path | None,
        Doc('JSON file: {"1000": 0.25, "2000": 0.75}, or a list for a window (custom).'),
    ] = None
    blend: Annotated[
        float | None, Doc("Share of the newest checkpoint to mix into the average, 0 to 1.")
    ] = None
    label: str | None = None
    """Name of the average; default: such as lawa-5x1000."""
    out: Annotated[
        Path | None,
        Doc("Folder to write.  [default: averages/LABEL/step-STEP in the run, or here]"),
    ] = None

    @property
    def at_step(self) -> int | str:
        """`last`, `all` or a step number."""
        at = self.at or "last"
        if at.isdecimal() and len(at) <= _MAX_STEP_DIGITS:
            return int(at)
        if at not in ("last", "all"):
            raise UserError(f"--at {at!r:.40} is not last, all or a step", hint="use --at last")
        return at


@dataclass(frozen=True)
class MergeOptions:
    """Options that apply to every method."""

    dtype: Annotated[
        str | None, Doc("Dtype of the written float tensors.  [default: as the inputs]")
    ] = None
    discard_inputs: Annotated[
        bool, Doc("Delete each download after adding it, to keep only one on disk.")
    ] = False
    integers: Integers = "equal"
    """`equal`: integer tensors must agree; `last`: copy them from the newest checkpoint."""
    verify: bool = True
    strict: bool = False
    allow_duplicates: bool = False
    allow_known_bad: bool = False


CHECKS: dict[str, tuple[str, object, str]] = {
    "strict": ("strict", True, "reject a checkpoint that is off the trajectory"),
    "no-verify": ("verify", False, "compare only the sizes of a run's own snapshots, not hashes"),
    "allow-duplicates": ("allow_duplicates", True, "accept identical content at two steps"),
    "allow-known-bad": ("allow_known_bad", True, "accept public revisions with known defects"),
    "allow-integers": ("integers", "last", "copy differing integer tensors from the newest"),
}
"""Values of `--checks`: field of `MergeOptions`, its value, and the help."""


def parse_checks(text: str) -> dict[str, Any]:
    """Return the fields of `MergeOptions` that comma-separated keys of `CHECKS` set."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in CHECKS]:
        raise UserError(f"--checks {unknown[0]!r:.50} is unknown", hint=f"use {', '.join(CHECKS)}")
    return {field: value for field, value, _ in (CHECKS[name] for name in names)}


def parse_decay(text: str) -> dict[str, float]:
    """Return the field of `AverageRequest` that `--decay` sets: a decay, or `half-life=STEPS`."""
    field = "half_life" if text.startswith("half-life=") else "decay"
    try:
        return {field: float(text.removeprefix("half-life="))}
    except ValueError:
        hint = "use a value such as 0.9, or half-life=2000 (in training steps)"
        raise UserError(f"--decay {text!r:.50} is not a number", hint=hint) from None


class Weighting(NamedTuple):
    """The weights of one window, oldest checkpoint first."""

    weights: list[float]
    label: str
    """Start of the default label."""
    options: dict[str, Any]
    """Parameters of the method, for the provenance."""


Weigh = Callable[[AverageRequest, int, int], Weighting]
"""Takes the request, the number of checkpoints and their spacing in steps."""


class Method(NamedTuple):
    """One averaging method."""

    help: str
    options: set[str]
    """Fields of `AverageRequest` that the method accepts."""
    weigh: Weigh | None = None
    """None: the method selects its own inputs."""


def _plain(weights: Callable[[int], list[float]]) -> Weigh:
    """Return the `Weigh` of a method without parameters."""
    return lambda request, count, every: Weighting(weights(count), request.method, {})


def _decay(request: AverageRequest, count: int, every: int) -> Weighting:
    shapes = get_args(coefficients.Shape)
    shape: Any = request.shape or "1-sqrt"
    if shape not in shapes:
        raise UserError(f"--shape {shape!r} is unknown", hint=f"use one of {', '.join(shapes)}")
    return Weighting(coefficients.decay(count, shape), f"decay-{shape}", {"shape": shape})


def _ema(request: AverageRequest, count: int, every: int) -> Weighting:
    half_life, decay = request.half_life, request.decay
    if half_life is not None and decay is None:
        decay, label = _decay_of_half_life(half_life, every), f"half-life-{half_life!r}"
    elif decay is not None and half_life is None:
        label = repr(float(decay))
    else:
        raise UserError(
            "--method ema needs either --decay D or --decay half-life=STEPS", hint="add --decay 0.9"
        )
    if not 0.0 <= decay < 1.0:
        raise UserError(f"--decay {decay} is not in [0, 1)", hint="use a value such as 0.9")
    options = {"decay": float(decay), "half_life": half_life}
    return Weighting(coefficients.exponential(count, float(decay)), f"ema-{label}", options)


def _decay_of_half_life(half_life: float, every: int) -> float:
    if not 0.0 < half_life < math.inf:
        raise UserError(
            f"--decay half-life={half_life:g} is not a positive number of training steps",
            hint="use a value such as half-life=2000",
        )
    decay = coefficients.decay_of_half_life(half_life, every)
    if decay == 1.0:
        raise UserError(
            f"--decay half-life={half_life:g} is too long: checkpoints {every:,} steps apart would "
            "have equal weights",
            hint="use a shorter half-life, or --method swa for equal weights",
        )
    return decay


_WINDOW = {"every", "window", "at", "disjoint", "blend"}

METHODS = {
    "lawa": Method("mean of a window", _WINDOW, _plain(coefficients.uniform)),
    "linear": Method("weights 1 … k over a window", _WINDOW, _plain(coefficients.linear)),
    "decay": Method("a window merged like a learning-rate decay", _WINDOW | {"shape"}, _decay),
    "ema": Method(
        "exponential average of all checkpoints, of those --from a step, or of a window",
        {"every", "window", "at", "start", "decay", "half_life", "blend"},
        _ema,
    ),
    "swa": Method(
        "mean of all checkpoints --from a step",
        {"every", "at", "start", "blend"},
        _plain(coefficients.uniform),
    ),
    "custom": Method("weights from --weights", {"every", "at", "weights", "blend"}),
    "posthoc-ema": Method(
        "a power-function EMA of any width, from two that the run stored", {"at", "sigma_rel"}
    ),
    "dense": Method(
        "mean over every step after --from up to --at, from running means that the run stored",
        {"start", "at"},
    ),
}


def find_method(name: str) -> Method:
    """Return the method with this name, or raise a UserError."""
    if name not in METHODS:
        raise UserError(
            f"--method {name!r:.50} is unknown", hint=f"use one of {', '.join(METHODS)}"
        )
    return METHODS[name]


def check_request(request: AverageRequest) -> None:
    """Raise a UserError if a method is unknown, an option does not apply, or a value is invalid."""
    accepted = find_method(request.method).options | {"method", "label", "out"}
    given = {name for name, value in vars(request).items() if value is not None}
    if not given <= accepted:
        raise UserError(
            f"--method {request.method} does not take {_flags(given - accepted)}",
            hint=f"it takes {_flags(accepted - {'label'})}",
        )
    label = request.label
    if label is not None and (label == RAW or not _LABEL.fullmatch(label)):
        raise UserError(
            f"--label {label} is reserved or not a folder name",
            hint="use another name with letters, digits, - _ .",
        )
    for name in given & {"every", "window", "start"}:
        if not 1 <= getattr(request, name) < 2**63:
            problem = f"{_flags({name})} is not between 1 and 2^63 - 1"
            raise UserError(problem, hint="give a number of steps or checkpoints")
    if request.blend is not None and not 0.0 <= request.blend <= 1.0:
        raise UserError(f"--blend {request.blend} is not a share", hint="use a number from 0 to 1")


def _flags(names: set[str]) -> str:
    return ", ".join(sorted({_FLAGS.get(n, "--" + n.replace("_", "-")) for n in names}))
