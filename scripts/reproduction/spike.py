"""Claim 5: how much of a spike, made by a burst of ten times the learning rate, shows in raw and in the averages.

Why against a run without the burst: that one takes the same batches, so the difference is the spike's alone.

    section = in_a_spike(results)
"""

from llmtrain.evaluation.charts import Chart
from llmtrain.evaluation.targets import RAW
from reproduction.results import BySeed, Results
from reproduction.section import Comparison, Labels, Section, Table, cell, line
from reproduction.statistics import estimate, paired

_Excess = dict[int, dict[int, float]]
"""Seed → step → loss with the burst minus loss without it."""


def in_a_spike(results: Results) -> Section:
    """Claim 5: it mitigates loss spikes."""
    labels = Labels.of(results)
    shown = [RAW, labels.online_lawa, "ema-0.9", labels.matched, *results.plan["kept"]]
    excess = {label: _excess(results, label) for label in shown}
    peaks = {label: {seed: max(curve.values()) for seed, curve in excess[label].items()} for label in shown}
    where = f"constant {results.tuned}"
    comparisons = [
        Comparison(
            5,
            f"{label}'s largest excess against raw's: {where}",
            paired(peaks[label], peaks[RAW]),
            main=label in shown[1:4],
        )
        for label in shown[1:]
    ]
    table = Table(
        f"Loss above that of the same run without the burst, {where}: largest, and at the end of the run",
        ["log"],
        ["weights", "largest", "share of raw's", "at the end"],
        [_row(label, peaks[label], peaks[RAW], excess[label]) for label in shown],
    )
    return Section("In a spike", "It mitigates loss spikes.", comparisons, [table], [_chart(results, excess)])


def _row(label: str, peaks: BySeed, raw: BySeed, excess: _Excess) -> list[str]:
    share = estimate([100 * peak / raw[seed] for seed, peak in peaks.items() if raw[seed] > 0])
    ends = [curve[max(curve)] for curve in excess.values()]
    shown = "n/a" if share is None else f"{share.mean:.0f}%"
    return [label, cell(estimate(list(peaks.values()))), shown, cell(estimate(ends))]


def _chart(results: Results, excess: dict[str, _Excess]) -> Chart:
    start = results.plan["cooldown"]
    lines = []
    for kind, (label, by_seed) in enumerate(excess.items()):
        steps = sorted({step for curve in by_seed.values() for step in curve})
        means = [estimate([curve[step] for curve in by_seed.values() if step in curve]) for step in steps]
        lines.append(
            line(label, [(step - start, mean) for step, mean in zip(steps, means, strict=True)], kind)
        )
    title = "A burst of ten times the rate: excess loss"
    return Chart("spike", title, "steps since the burst began", "nats per token", lines, baseline=0.0)


def _excess(results: Results, label: str) -> _Excess:
    """Of the seeds that have the burst, what came after it, and the run without."""
    burst, after, calm = (
        {run.seed: run.losses.get(label, {}) for run in results.of(kind, results.tuned)}
        for kind in ("burst", "after", "calm")
    )
    found = {}
    for seed in burst.keys() & after.keys() & calm.keys():
        curve = burst[seed] | after[seed]
        found[seed] = {
            step: curve[step] - calm[seed][step] for step in sorted(curve.keys() & calm[seed].keys())
        }
    return {seed: curve for seed, curve in found.items() if curve}
