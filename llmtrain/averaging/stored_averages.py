"""Averages built from two that a run stored: any span from running means, any EMA from EMAs.

A mean over *every* step, or an EMA of a length chosen after the run, cannot be made from snapshots.
Both are weighted sums of a few online averages that the run stored.

An EMA whose memory grows with training, β(t) = (1 - 1/t)^(γ+1), weights each past time τ by the
profile p(τ) = (γ+1) τ^γ / t^(γ+1). The profiles of two γ, stored along the run, nearly span those
of other γ. A least-squares fit of the profiles gives the weights of the stored averages.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models"
(arXiv 2312.02696), section 3 and appendix C. σ_rel is the width of the profile as a share of t.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmtrain.averaging.coefficients import span
from llmtrain.averaging.spec import AverageSpec
from llmtrain.checkpoints.checkpoint import PROVENANCE_FILE, recorded_digests
from llmtrain.checkpoints.open import open_with_residual
from llmtrain.checkpoints.series import Input, MissingCheckpoints, Series
from llmtrain.checkpoints.windows import describe_steps
from llmtrain.errors import UserError
from llmtrain.storage.json_files import read_json
from llmtrain.storage.run_folder import step_folders

RUNNING_MEAN = "running-mean"
POWER_EMA = "power-ema"

WIDEST = 1.0 / math.sqrt(12.0)
"""σ_rel of γ = 0, the uniform mean of everything."""

_SINGULAR = 1e-9
"""Relative size below which the fit drops a direction: stored averages have 24 bits."""


class _Stored(NamedTuple):
    """One stored online average."""

    step: int
    path: Path
    start: float
    """Step before its first update."""
    value: float
    """γ of a power-function EMA, or the updates of a running mean."""
    every: Any


def sigma_of(gamma: float) -> float:
    """Return σ_rel of an exponent: √(γ + 1) / ((γ + 2) √(γ + 3))."""
    return math.sqrt(gamma + 1.0) / ((gamma + 2.0) * math.sqrt(gamma + 3.0))


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent γ ≥ 0 of a width σ_rel in (0, 1/√12], by bisection."""
    low, high = 0.0, 2.0 / sigma_rel
    for _ in range(200):
        middle = (low + high) / 2.0
        low, high = (middle, high) if sigma_of(middle) > sigma_rel else (low, middle)
    return (low + high) / 2.0


def overlap(time_a: float, gamma_a: float, time_b: float, gamma_b: float) -> float:
    """Return ∫ p_a(τ) p_b(τ) dτ of two profiles that end at times a and b."""
    if time_a > time_b:
        time_a, gamma_a, time_b, gamma_b = time_b, gamma_b, time_a, gamma_a
    factor = (gamma_a + 1.0) * (gamma_b + 1.0) / (gamma_a + gamma_b + 1.0)
    return factor * math.pow(time_a / time_b, gamma_b) / time_b


def reconstruct(
    stored: Sequence[tuple[float, float]], time: float, gamma: float
) -> tuple[list[float], float]:
    """Fit the EMA of (time, γ) as a sum of stored averages, each given as (time, γ).

    Return their weights, and the distance of the fitted profile as a share of the wanted norm.
    """
    matrix = np.array([[overlap(*a, *b) for b in stored] for a in stored])
    wanted = np.array([overlap(*a, time, gamma) for a in stored])
    scale = 1.0 / np.sqrt(np.diag(matrix))  # profiles of unit norm: early ones are narrow and tall
    solution, *_ = np.linalg.lstsq(matrix * np.outer(scale, scale), wanted * scale, rcond=_SINGULAR)
    weights = solution * scale
    weights /= weights.sum()
    norm = overlap(time, gamma, time, gamma)
    residual = max(float(norm - 2.0 * weights @ wanted + weights @ matrix @ weights), 0.0)
    return [float(weight) for weight in weights], math.sqrt(residual / norm)


def power_ema_specs(series: Series, sigma_rel: float | None, at: int | str) -> list[AverageSpec]:
    """Return power-function EMAs of width `sigma_rel`, each from the stored ones up to its step."""
    if sigma_rel is None or not 0.0 < sigma_rel <= WIDEST:
        raise UserError(
            f"--method posthoc-ema needs --sigma-rel between 0 and {WIDEST:.4f}",
            hint="add --sigma-rel 0.1, a width of 10% of training",
        )
    folders = sorted(series.averages.glob(f"{POWER_EMA}-*"))
    stored = [each for folder in folders for each in _stored(folder, POWER_EMA, "gamma")]
    gamma = gamma_of(sigma_rel)
    specs = []
    stored.sort(key=lambda each: (each.step, str(each.path)))
    for end in _ends(series, stored, at, "power-function EMA", POWER_EMA):
        used = [each for each in stored if each.step <= end]
        times = [(float(each.step - int(each.start)), float(each.value)) for each in used]
        weights, error = reconstruct(times, max(time for time, _ in times), gamma)
        options = {"sigma_rel": sigma_rel, "gamma": gamma, "profile_error": error}
        label = f"posthoc-ema-{sigma_rel:g}"
        specs.append(_spec(series, "posthoc-ema", label, used, weights, options))
    return specs


def dense_specs(series: Series, start: int | None, at: int | str) -> list[AverageSpec]:
    """Return means over every step in (start, at], each from two stored running means.

    See `coefficients.span`. One is enough if the span starts where the running mean began.
    """
    if start is None or (isinstance(at, int) and start >= at):
        raise UserError(
            "--method dense needs --from A before --at B", hint="add --from 2000 --at 3000"
        )
    means = _stored(series.averages / RUNNING_MEAN, RUNNING_MEAN, "updates")
    ends = _ends(series, means, at, "running mean", RUNNING_MEAN)
    stored = {each.step: each for each in means}
    return [_dense(series, stored, start, end) for end in ends if end > start or at != "all"]


def _dense(series: Series, stored: dict[int, _Stored], start: int, end: int) -> AverageSpec:
    began = min(int(each.start) for each in stored.values())
    missing = [s for s in (start, end) if s not in stored and not (s == start == began)]
    if missing:
        raise MissingCheckpoints(
            f"{series.name} has no running mean at {describe_steps(missing)}; "
            f"it has {describe_steps(list(stored))}",
            hint=f"use one of those steps, or --from {began}",
        )
    before, until = (int(stored[s].value) if s in stored else 0 for s in (start, end))
    if before >= until:
        raise UserError(
            f"the running means at {start:,} and {end:,} have {before:,} and {until:,} updates",
            hint="choose a longer span, with updates in between",
        )
    used, weights = [stored[end]], [1.0]
    if before > 0:
        used, weights = [stored[start], stored[end]], span(before, until)
    options = {"from": start, "to": end, "updates": until - before, "every": stored[end].every}
    return _spec(series, "dense", f"dense-{start}-{end}", used, weights, options)


def _stored(folder: Path, method: str, value: str) -> list[_Stored]:
    """Return the folders of one online average, by step; `value` is a key of its provenance."""
    found = []
    for step, path in step_folders(folder).items():
        document = read_json(path / PROVENANCE_FILE)
        if document.get("method") != method:
            continue
        for key in ("start", value):
            number: Any = document.get(key)
            if type(number) not in (int, float) or not 0 <= number < 2**63:
                raise UserError(
                    f"{path / PROVENANCE_FILE}: {key} is {number!r:.40}, not a valid number",
                    hint="restore the damaged file, or delete the folder",
                )
        found.append(_Stored(step, path, document["start"], document[value], document.get("every")))
    return found


def _ends(
    series: Series, stored: Sequence[_Stored], at: int | str, noun: str, kind: str
) -> list[int]:
    steps = sorted({each.step for each in stored})
    if not steps:
        raise UserError(
            f"{series.name} did not store a {noun}",
            hint=f"add {{kind: {kind}}} under averages in the config, to store one per snapshot",
        )
    ends = {"all": steps, "last": steps[-1:]}.get(str(at), [step for step in steps if step == at])
    if not ends:
        raise MissingCheckpoints(
            f"{series.name} has no {noun} at {at}; it has {describe_steps(steps)}",
            hint="use --at with one of those steps",
        )
    return ends


def _spec(
    series: Series,
    method: str,
    label: str,
    used: Sequence[_Stored],
    weights: Sequence[float],
    options: dict[str, Any],
) -> AverageSpec:
    inputs = tuple(
        Input(
            each.step,
            str(each.path),
            partial(open_with_residual, each.path, step=each.step),
            partial(recorded_digests, each.path),
        )
        for each in used
    )
    return AverageSpec(
        method, label, inputs, tuple(weights), series.averages, options, audited=False
    )
