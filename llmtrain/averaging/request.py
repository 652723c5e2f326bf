"""From the words of the command line to the averages that are to be made.

Why: which checkpoints, which weights, which name and which folder are decided here, before anything
is read; an option that a method does not take is an error and never ignored.

    plans = make_specs(series, Request(method="lawa", every=1000, window=5))
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from llmtrain.averaging import coefficients
from llmtrain.averaging.custom_weights import read_weights
from llmtrain.averaging.spec import AverageSpec
from llmtrain.averaging.stored_averages import dense_plan, power_ema_plans
from llmtrain.checkpoints.series import Input, Series
from llmtrain.checkpoints.windows import describe_spacings, describe_steps, possible_spacings
from llmtrain.errors import UserError
from llmtrain.storage.run_folder import RAW, step_name

DEFAULT_WINDOW = 5
"""k in the code of Sanyal et al. 2023."""

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

OPTIONS = {
    "lawa": {"every", "window", "at", "disjoint", "blend"},
    "linear": {"every", "window", "at", "disjoint", "blend"},
    "decay": {"every", "window", "at", "disjoint", "blend", "shape"},
    "ema": {"every", "window", "at", "start", "decay", "half_life", "like_online", "blend"},
    "swa": {"every", "at", "start", "blend"},
    "custom": {"every", "at", "weights", "blend"},
    "posthoc-ema": {"at", "sigma_rel"},
    "dense": {"start", "to"},
}
"""The options each method takes."""

METHODS = tuple(OPTIONS)


@dataclass(frozen=True)
class AverageRequest:
    """What was asked for; None: not said."""

    method: str = "lawa"
    every: int | None = None
    """Training steps between two checkpoints."""
    window: int | None = None
    """Checkpoints in a window."""
    at: str | None = None
    """`last`, `all` or a step."""
    disjoint: bool | None = None
    start: int | None = None
    """--from: the first step that may be used."""
    to: int | None = None
    shape: str | None = None
    decay: float | None = None
    half_life: float | None = None
    """In training steps."""
    like_online: bool | None = None
    sigma_rel: float | None = None
    weights: Path | None = None
    blend: float | None = None
    label: str | None = None
    out: Path | None = None

    @property
    def at_step(self) -> int | str:
        """`at` with a step as a number.

        Raises:
            UserError: it is neither.
        """
        at = self.at or "last"
        if at in ("last", "all"):
            return at
        if not at.isdecimal():
            raise UserError(f"--at {at!r} is not last, all or a step", hint="--at last")
        return int(at)


def make_specs(series: Series, request: AverageRequest) -> list[AverageSpec]:
    """The averages that a request means, ascending by step.

    Raises:
        UserError: an unknown method, an option it does not take, an impossible value, or no such
            checkpoints; says which there are.
    """
    _check_options(request)
    if request.method == "dense":
        plans = [dense_plan(series, request.start, request.to)]
    elif request.method == "posthoc-ema":
        plans = power_ema_plans(series, request.sigma_rel, request.at_step)
    elif request.method == "custom":
        plans = _custom(series, request)
    elif request.method == "swa" or (request.method == "ema" and request.window is None):
        plans = _growing(series, request)
    else:
        plans = _windows(series, request)
    return [_finished(plan, series, request) for plan in plans]


def _check_options(request: AverageRequest) -> None:
    if request.method not in OPTIONS:
        raise UserError(
            f"--method {request.method!r} is unknown", hint=f"one of {', '.join(METHODS)}"
        )
    takes = OPTIONS[request.method] | {"method", "label", "out"}
    unused = [
        name for name, value in vars(request).items() if value is not None and name not in takes
    ]
    if unused:
        flags = {"start": "--from"}
        names = ", ".join(flags.get(name, "--" + name.replace("_", "-")) for name in unused)
        raise UserError(
            f"--method {request.method} does not take {names}",
            hint=f"it takes {', '.join(sorted(flags.get(n, '--' + n.replace('_', '-')) for n in takes))}",
        )
    if request.label == RAW:
        raise UserError(
            "--label raw is what the weights of a snapshot are called", hint="any other name"
        )
    if request.label is not None and not _LABEL.fullmatch(request.label):
        raise UserError(
            f"--label {request.label!r} is no name of a folder", hint="letters, digits, - _ ."
        )
    for name in ("every", "window", "start"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UserError(
                f"{'from' if name == 'start' else name} is {value}", hint="a number from 1 on"
            )
    if request.blend is not None and not 0.0 <= request.blend <= 1.0:
        raise UserError(
            f"--blend {request.blend} is not a share", hint="0 (the average) to 1 (the newest)"
        )


def _every(series: Series, request: AverageRequest, size: int) -> int:
    if request.every is not None:
        return request.every
    spacings = possible_spacings(series.steps, size)
    raise UserError(
        f"--every is required; {series.name} has checkpoints at {describe_steps(series.steps)}",
        hint=f"--every {describe_spacings(spacings)} gives a window of {size}"
        if spacings
        else "--window 1, or a longer run",
    )


def _windows(series: Series, request: AverageRequest) -> list[AverageSpec]:
    """Windows of a fixed size: lawa, linear, decay, and ema with --window."""
    if request.start is not None:
        raise UserError(
            "--from and --window exclude each other", hint="--from takes everything from there on"
        )
    size = DEFAULT_WINDOW if request.window is None else request.window
    every = _every(series, request, size)
    steps = series.windows(
        every=every, size=size, at=request.at_step, disjoint=bool(request.disjoint)
    )
    weights, decays, name, options = _weights(request, size, every)
    return [
        _plan(
            series,
            request,
            f"{name}-{size}x{every}",
            window,
            weights,
            options | {"window": size},
            decays,
        )
        for window in steps
    ]


def _growing(series: Series, request: AverageRequest) -> list[AverageSpec]:
    """Everything from a step on: swa, and ema without --window.

    The checkpoints are counted back from the one the average stands for, `every` apart, to the
    last that is not before --from, or without --from, that is there.
    """
    if request.method == "swa" and request.start is None:
        raise UserError(
            "--method swa needs --from STEP",
            hint=f"the paper's late SWA starts at 75% of training; there are {describe_steps(series.steps)}",
        )
    every = _every(series, request, 2)
    at = request.at_step
    start = request.start or 1
    ends = [
        step for step in series.steps if step >= start and (at in ("last", "all") or step == at)
    ]
    ends = ends[-1:] if at == "last" else ends
    plans = []
    for end in ends:
        wanted = list(range(end, start - 1, -every))[::-1]
        held = [step for step in wanted if step in series.inputs]
        if request.start is None:
            while held != wanted:  # without --from, what lies before a gap is left out
                wanted = wanted[
                    wanted.index(next(s for s in wanted if s not in series.inputs)) + 1 :
                ]
                held = [step for step in wanted if step in series.inputs]
        if held != wanted:
            raise UserError(
                f"{series.name} has no checkpoints at {describe_steps(sorted(set(wanted) - set(held)))}; "
                f"it has {describe_steps(series.steps)}",
                hint=f"--every {describe_spacings(possible_spacings(series.steps, 2))}",
            )
        weights, decays, name, options = _weights(request, len(wanted), every)
        label = f"{name}-from-{start}x{every}" if request.start is not None else f"{name}x{every}"
        options |= {"from": request.start}
        plans.append(_plan(series, request, label, wanted, weights, options, decays))
    if not plans:
        raise UserError(
            f"{series.name} has no checkpoint at --at {at} from step {start:,} on; "
            f"it has {describe_steps(series.steps)}",
            hint="--at last",
        )
    return plans


def _weights(
    request: AverageRequest, count: int, every: int
) -> tuple[list[float], list[float] | None, str, dict[str, Any]]:
    """Weights, decays of a float32 recursion if that is wanted, start of the label, options."""
    options: dict[str, Any] = {"every": every}
    if request.method == "linear":
        return coefficients.linear(count), None, "linear", options
    if request.method == "decay":
        shape = next(
            (s for s in get_args(coefficients.Shape) if s == (request.shape or "1-sqrt")), None
        )
        if shape is None:
            raise UserError(
                f"--shape {request.shape!r} is unknown",
                hint=f"one of {', '.join(get_args(coefficients.Shape))}",
            )
        return coefficients.decay(count, shape), None, f"decay-{shape}", options | {"shape": shape}
    if request.method == "ema":
        return _ema_weights(request, count, every, options)
    return coefficients.uniform(count), None, request.method, options


def _ema_weights(
    request: AverageRequest, count: int, every: int, options: dict[str, Any]
) -> tuple[list[float], list[float] | None, str, dict[str, Any]]:
    if (request.decay is None) == (request.half_life is None):
        raise UserError(
            "--method ema needs --decay D or --half-life STEPS", hint="such as --decay 0.9"
        )
    if request.half_life is not None and request.half_life <= 0:
        raise UserError(f"--half-life {request.half_life} is not above 0", hint="in training steps")
    decay = (
        coefficients.decay_of_half_life(request.half_life, every)
        if request.half_life is not None
        else float(request.decay or 0.0)
    )
    if not 0.0 <= decay < 1.0:
        raise UserError(f"--decay {decay} is not in [0, 1)", hint="per checkpoint, such as 0.9")
    options |= {"decay": decay, "half_life": request.half_life}
    name = (
        f"ema-{decay!r}-" if request.half_life is None else f"ema-half-life-{request.half_life!r}-"
    )
    name = name.removesuffix("-")
    if request.like_online:
        decays = coefficients.warmed_up_decays(count, decay)
        options["warmup"] = "min(decay, 1 - (1 + n)^(-2/3))"
        return coefficients.recursive(decays), decays, f"{name}-online", options
    return coefficients.exponential(count, decay), None, name, options


def _custom(series: Series, request: AverageRequest) -> list[AverageSpec]:
    """Weights from a file: of certain steps, or of the places in a window."""
    if request.weights is None:
        raise UserError(
            "--method custom needs --weights FILE", hint='such as {"1000": 0.25, "2000": 0.75}'
        )
    given = read_weights(request.weights)
    options: dict[str, Any] = {"weights": request.weights.name}
    if isinstance(given, list):
        every = _every(series, request, len(given))
        windows: Sequence[Sequence[int]] = series.windows(
            every=every, size=len(given), at=request.at_step
        )
        options["every"] = every
        weights = given
    else:
        if request.at is not None or request.every is not None:
            raise UserError(
                "--weights names the steps, so --at and --every say nothing", hint="leave them out"
            )
        if absent := [step for step in given if step not in series.inputs]:
            raise UserError(
                f"{request.weights} names steps that are not there: {describe_steps(absent)}",
                hint=f"{series.name} has {describe_steps(series.steps)}",
            )
        windows, weights = [list(given)], list(given.values())
    return [_plan(series, request, "custom", window, weights, options) for window in windows]


def _plan(
    series: Series,
    request: AverageRequest,
    label: str,
    steps: Sequence[int],
    weights: list[float],
    options: dict[str, Any],
    decays: list[float] | None = None,
) -> AverageSpec:
    if request.blend is not None:
        if decays is not None:
            raise UserError(
                "--blend and --like-online exclude each other", hint="leave out one of them"
            )
        weights = coefficients.blend(weights, request.blend)
        label, options = f"{label}-blend-{request.blend!r}", options | {"blend": request.blend}
    inputs: tuple[Input, ...] = tuple(series.inputs[step] for step in steps)
    chosen = tuple(decays) if decays is not None else None
    return AverageSpec(
        request.method, label, inputs, tuple(weights), series.averages, options, chosen
    )


def _finished(plan: AverageSpec, series: Series, request: AverageRequest) -> AverageSpec:
    """The plan with its final label and folder."""
    label = request.label or plan.label
    if request.out is None:
        target = series.averages / label / step_name(plan.step)
    else:
        target = request.out / step_name(plan.step) if request.at_step == "all" else request.out
    return replace(plan, label=label, target=target, is_default=request.out is None)
