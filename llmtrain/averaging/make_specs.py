"""Conversion of a request to specs: the checkpoints, weights, label and folder of each average."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, takewhile

from llmtrain.averaging import coefficients
from llmtrain.averaging.request import (
    DEFAULT_WINDOW,
    METHODS,
    AverageRequest,
    Weighting,
    check_request,
)
from llmtrain.averaging.spec import AverageSpec
from llmtrain.averaging.stored_averages import dense_specs, power_ema_specs
from llmtrain.checkpoints.series import MissingCheckpoints, Series
from llmtrain.checkpoints.windows import describe_spacings, describe_steps, possible_spacings
from llmtrain.errors import UserError
from llmtrain.storage.run_folder import step_name

_MAX_MISSING = 1000
"""Number of missing steps after which the search for more stops."""


def make_specs(series: Series, request: AverageRequest) -> list[AverageSpec]:
    """Return the specs of a request, ascending by step."""
    check_request(request)
    if request.method == "dense":
        specs = dense_specs(series, request.start, request.at_step)
    elif request.method == "posthoc-ema":
        specs = power_ema_specs(series, request.sigma_rel, request.at_step)
    elif request.method == "custom":
        specs = _custom(series, request)
    elif request.method == "swa" or (request.method == "ema" and request.window is None):
        specs = _growing(series, request)
    else:
        specs = _windows(series, request)
    return [_with_target(spec, series, request) for spec in specs]


def _every(series: Series, request: AverageRequest, size: int) -> int:
    if request.every is not None:
        return request.every
    spacings = possible_spacings(series.steps, size)
    raise UserError(
        f"--every is required; {series.name} has checkpoints at {describe_steps(series.steps)}",
        hint=f"--every {describe_spacings(spacings)} gives a window of {size}"
        if spacings
        else "use --window 1, or train longer",
    )


def _windows(series: Series, request: AverageRequest) -> list[AverageSpec]:
    if request.start is not None:
        raise UserError("--from and --window exclude each other", hint="leave out one of them")
    size = DEFAULT_WINDOW if request.window is None else request.window
    every = _every(series, request, size)
    windows = series.windows(
        every=every, size=size, at=request.at_step, disjoint=bool(request.disjoint)
    )
    weights, label, options = _weighting(request, size, every)
    weighting = Weighting(weights, f"{label}-{size}x{every}", options | {"window": size})
    return [_spec(series, request, window, weighting) for window in windows]


def _growing(series: Series, request: AverageRequest) -> list[AverageSpec]:
    """Return averages of everything up to a step: swa, and ema without --window."""
    if request.method == "swa" and request.start is None:
        raise UserError(
            "--method swa needs --from STEP",
            hint="the paper's late SWA starts at 75% of training; "
            f"{series.name} has {describe_steps(series.steps)}",
        )
    every, at, start = _every(series, request, 2), request.at_step, request.start or 1
    ends = [s for s in series.steps if s >= start and (at in ("last", "all") or s == at)]
    if not ends:
        only = "" if isinstance(at, str) else f" at step {at:,}"
        raise MissingCheckpoints(
            f"{series.name} has no checkpoint from step {start:,} on{only}; "
            f"it has {describe_steps(series.steps)}",
            hint="use a smaller --from or --at last",
        )
    specs = []
    for end in ends[-1:] if at == "last" else ends:
        steps = _grid(series, request, end, every)
        weights, label, options = _weighting(request, len(steps), every)
        since = "" if request.start is None else f"-from-{start}"
        options |= {"from": request.start}
        weighting = Weighting(weights, f"{label}{since}x{every}", options)
        specs.append(_spec(series, request, steps, weighting))
    return specs


def _grid(series: Series, request: AverageRequest, end: int, every: int) -> list[int]:
    """Return the steps `every` apart up to `end`, from --from or, without it, from the last gap."""
    grid = range(end, (request.start or 0) - 1, -every)  # too long for a list if steps are times
    if request.start is None:
        return list(takewhile(series.inputs.__contains__, grid))[::-1]
    absent = (step for step in grid if step not in series.inputs)
    if missing := list(islice(absent, _MAX_MISSING)):
        raise MissingCheckpoints(
            f"{series.name} has no checkpoints at {describe_steps(missing[::-1])}; "
            f"it has {describe_steps(series.steps)}",
            hint=f"use --every {describe_spacings(possible_spacings(series.steps, 2))}",
        )
    return list(grid)[::-1]


def _weighting(request: AverageRequest, count: int, every: int) -> Weighting:
    weigh = METHODS[request.method].weigh
    assert weigh is not None, f"{request.method} selects its own inputs"
    weighting = weigh(request, count, every)
    return weighting._replace(options={"every": every} | weighting.options)


def _custom(series: Series, request: AverageRequest) -> list[AverageSpec]:
    if request.weights is None:
        raise UserError(
            "--method custom needs --weights FILE",
            hint='write a file such as {"1000": 0.25, "2000": 0.75}',
        )
    given = coefficients.read_weights(request.weights)
    options = {"weights": request.weights.name}
    if isinstance(given, list):
        every = _every(series, request, len(given))
        windows = series.windows(every=every, size=len(given), at=request.at_step)
        weighting = Weighting(given, "custom", options | {"every": every})
        return [_spec(series, request, window, weighting) for window in windows]
    if request.at is not None or request.every is not None:
        raise UserError(
            "--at and --every do not apply: --weights lists the steps", hint="leave them out"
        )
    if missing := [step for step in given if step not in series.inputs]:
        raise UserError(
            f"{request.weights} lists missing steps: {describe_steps(missing)}",
            hint=f"use steps of {series.name}: {describe_steps(series.steps)}",
        )
    return [_spec(series, request, list(given), Weighting([*given.values()], "custom", options))]


def _spec(
    series: Series, request: AverageRequest, steps: Sequence[int], weighting: Weighting
) -> AverageSpec:
    weights, label, options = weighting
    if request.blend is not None:
        weights = coefficients.blend(weights, request.blend)
        label, options = f"{label}-blend-{request.blend!r}", options | {"blend": request.blend}
    inputs = tuple(series.inputs[step] for step in steps)
    return AverageSpec(request.method, label, inputs, tuple(weights), series.averages, options)


def _with_target(spec: AverageSpec, series: Series, request: AverageRequest) -> AverageSpec:
    """Return the spec with its final label and folder."""
    label = request.label or spec.label
    target = request.out or series.averages / label
    if request.out is None or request.at_step == "all":
        target /= step_name(spec.step)
    return replace(spec, label=label, target=target, is_default=request.out is None)
