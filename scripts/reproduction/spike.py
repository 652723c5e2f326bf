"""Claim 5: the effect of a burst of ten times the learning rate on raw and averaged weights.

The reference run without the burst trains on the same batches, so the difference is the spike.

    section = in_a_spike(results)
"""

import statistics
from collections.abc import Callable, Iterable

from llmtrain.evaluation.report.charts import Chart
from llmtrain.storage.run_folder import RAW
from reproduction.results import BySeed, Results
from reproduction.section import Comparison, Labels, Section, Table, cell, line
from reproduction.statistics import estimate, paired

_Excess = dict[int, dict[int, float]]
"""Loss with the burst minus loss without it, by seed and step."""


def in_a_spike(results: Results) -> Section:
    """Claim 5: it mitigates loss spikes."""
    labels = Labels.of(results)
    shown = {
        "raw": RAW,
        "LAWA": labels.online_lawa,
        "EMA 0.9": "ema-0.9",
        "matched EMA": labels.matched,
    }
    main = set(shown)
    shown |= {label.replace("power-ema-", "power EMA "): label for label in results.plan["kept"]}
    excess = {name: _excess(results, label) for name, label in shown.items()}
    where = f"constant {results.tuned}"
    largest = {name: _of_each(curves, max) for name, curves in excess.items()}
    mean = {name: _of_each(curves, statistics.fmean) for name, curves in excess.items()}
    comparisons = [
        Comparison(
            5,
            f"{name}'s {what} excess against raw's: {where}",
            paired(of[name], of["raw"]),
            main=name in main,
        )
        for what, of in (("largest", largest), ("mean", mean))
        for name in shown
        if name != "raw"
    ]
    table = Table(
        f"Loss above that of the same weights without the burst, {where}: largest, "
        "mean from the burst to the "
        "end of the run, and at its end",
        ["log"],
        ["weights", "largest", "share of raw's", "mean", "at the end"],
        [_row(name, largest[name], largest["raw"], mean[name], excess[name]) for name in shown],
    )
    return Section(
        "In a spike", "It mitigates loss spikes.", comparisons, [table], [_chart(results, excess)]
    )


def _of_each(curves: _Excess, of: Callable[[Iterable[float]], float]) -> BySeed:
    return {seed: of(curve.values()) for seed, curve in curves.items()}


def _row(name: str, peaks: BySeed, raw: BySeed, means: BySeed, excess: _Excess) -> list[str]:
    share = estimate([100 * peak / raw[seed] for seed, peak in peaks.items() if raw[seed] > 0])
    ends = [curve[max(curve)] for curve in excess.values()]
    shown = "n/a" if share is None else f"{share.mean:.0f}%"
    largest, mean = (estimate(list(by_seed.values())) for by_seed in (peaks, means))
    return [name, cell(largest), shown, cell(mean), cell(estimate(ends))]


def _chart(results: Results, excess: dict[str, _Excess]) -> Chart:
    start = results.plan["cooldown"]
    lines = []
    for kind, (name, by_seed) in enumerate(excess.items()):
        steps = sorted({step for curve in by_seed.values() for step in curve})
        means = [
            estimate([curve[step] for curve in by_seed.values() if step in curve]) for step in steps
        ]
        lines.append(
            line(
                name, [(step - start, mean) for step, mean in zip(steps, means, strict=True)], kind
            )
        )
    title = "A burst of ten times the rate: excess loss"
    return Chart(
        "spike", title, "steps since the burst began", "nats per token", lines, baseline=0.0
    )


def _excess(results: Results, label: str) -> _Excess:
    """Return the excess loss for the seeds with a burst, its continuation and the reference."""
    burst, after, calm = (
        {run.seed: run.losses.get(label, {}) for run in results.of(kind, results.tuned)}
        for kind in ("burst", "after", "calm")
    )
    found = {}
    for seed in burst.keys() & after.keys() & calm.keys():
        curve = burst[seed] | after[seed]
        found[seed] = {
            step: curve[step] - calm[seed][step]
            for step in sorted(curve.keys() & calm[seed].keys())
        }
    return {seed: curve for seed, curve in found.items() if curve}
