"""Claims 1 to 3: LAWA's gain over raw weights by step, rate, spacing and window; steps saved.

for section in (by_step(results), by_rate(results), by_window(results), savings(results)): ...
"""

from llmtrain.evaluation.report.charts import Chart, Line
from llmtrain.storage.run_folder import RAW
from reproduction import paper
from reproduction.plan import WINDOW
from reproduction.results import BySeed, Results, Run
from reproduction.section import Comparison, Labels, Section, Table, cell, line
from reproduction.statistics import Estimate, estimate, paired

SHARES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
_GAIN = "nats per token (up is better)"


def by_step(results: Results) -> Section:
    """Claim 1: LAWA lowers the loss early and in the middle of training."""
    steps = {share: step_at(results, share) for share in SHARES}
    rows, comparisons = [], []
    for kind in ("constant", "cosine"):
        for rate in results.rates:
            changes = [lawa_change(results, kind, rate, step) for step in steps.values()]
            rows.append([f"{kind} {rate}", *(cell(paired_or_none(each)) for each in changes)])
        for share in (SHARES[0], 0.4, 1.0):
            change = paired_or_none(lawa_change(results, kind, results.tuned, steps[share]))
            what = f"LAWA against raw: {kind} {results.tuned}, {share:.0%} of the run"
            comparisons.append(Comparison(1, what, change, main=True))
    table = Table(
        "LAWA's loss minus raw's, by share of the run",
        ["curve"],
        ["schedule, peak", *(f"{share:.0%} ({step})" for share, step in steps.items())],
        rows,
    )
    text = (
        "LAWA on the trajectory of a run lowers validation loss early and mid-training, "
        "at no training cost."
    )
    return Section("Gain by step", text, comparisons, [table], [_step_chart(results)])


def _step_chart(results: Results) -> Chart:
    steps = results.plan["steps"]
    lines: list[Line] = []
    for kind in ("constant", "cosine"):
        for rate in dict.fromkeys((results.tuned, results.largest)):
            points = []
            for share in range(10, 101, 5):
                step = step_at(results, share / 100)
                change = paired_or_none(lawa_change(results, kind, rate, step))
                points.append((100 * step / steps, change))
            lines.append(line(f"{kind} {rate}", points, len(lines), sign=-1))
    for rate in paper.RATES:
        x, y = zip(*paper.gain_by_share(rate), strict=True)
        place = len(lines)
        lines.append(Line(f"paper, cosine {rate}", x, y, colour=place, dash=place, marker=place))
    return Chart(
        "gain-by-step", "Gain of LAWA over raw", "percent of the run", _GAIN, lines, baseline=0.0
    )


def by_rate(results: Results) -> Section:
    """Claim 2: the gain grows with the learning rate."""
    middle, end = step_at(results, 0.4), results.plan["steps"]
    places = {
        "constant, end": ("constant", end),
        "cosine, 40%": ("cosine", middle),
        "cosine, end": ("cosine", end),
    }
    rates = sorted({*results.plan["rates"], *results.rates}, key=float)
    changes = {
        name: {rate: paired_or_none(lawa_change(results, kind, rate, step)) for rate in rates}
        for name, (kind, step) in places.items()
    }
    low, high = results.rates[0], results.rates[-1]
    comparisons = [
        Comparison(
            2,
            f"what LAWA changes at {high} against at {low}: {name}",
            paired(lawa_change(results, kind, high, step), lawa_change(results, kind, low, step)),
            main=True,
        )
        for name, (kind, step) in places.items()
        if low != high
    ]
    rows = [[rate, *(cell(changes[name][rate]) for name in places)] for rate in rates]
    table = Table(
        "LAWA's loss minus raw's, by peak learning rate", ["curve"], ["peak", *places], rows
    )
    lines = [
        line(name, [(float(rate), changes[name][rate]) for rate in rates], kind, sign=-1)
        for kind, name in enumerate(places)
    ]
    title, x_label = "Gain of LAWA over raw", "peak learning rate"
    chart = Chart("gain-by-rate", title, x_label, _GAIN, lines, log_x=True, baseline=0.0)
    return Section(
        "Gain by learning rate",
        "The gain grows with the learning rate.",
        comparisons,
        [table],
        [chart],
    )


def by_window(results: Results) -> Section:
    """Claim 3: the gain grows with the spacing at fixed k."""
    every = results.plan["spacing"]
    windows, spacings = (
        results.plan["windows"],
        [factor * every for factor in results.plan["spacings"]],
    )

    def losses(window: int, spacing: int) -> BySeed:
        label = f"lawa-{window}x{spacing}"
        return results.by_seed("constant", results.tuned, label, results.plan["steps"])

    raw = results.by_seed("constant", results.tuned, RAW, results.plan["steps"])
    changes = {(k, n): paired(losses(k, n), raw) for k in windows for n in spacings}
    where = f"constant {results.tuned}, end"
    pairs = [((WINDOW, n), (WINDOW, every)) for n in spacings[1:]]
    pairs += [((k, every), (WINDOW, every)) for k in windows if k != WINDOW]
    comparisons = [
        Comparison(
            3,
            f"LAWA {a[0]}×{a[1]} against {b[0]}×{b[1]}: {where}",
            paired(losses(*a), losses(*b)),
            main=a[0] == WINDOW,
        )
        for a, b in pairs
    ]
    rows = [[str(n), *(cell(changes[k, n]) for k in windows)] for n in spacings]
    table = Table(
        f"LAWA's loss minus raw's, by spacing N and window k: {where}",
        ["windows"],
        ["N", *(f"k = {k}" for k in windows)],
        rows,
    )
    lines = [
        line(f"k = {k}", [(n, changes[k, n]) for n in spacings], place, sign=-1)
        for place, k in enumerate(windows)
    ]
    chart = Chart(
        "gain-by-spacing", "Gain of LAWA over raw", "spacing N (steps)", _GAIN, lines, baseline=0.0
    )
    text = "The gain grows with the spacing between the averaged checkpoints, at fixed k."
    return Section("Gain by spacing and window", text, comparisons, [table], [chart])


def savings(results: Results) -> Section:
    """Return how much earlier LAWA reaches the final loss of the raw weights."""
    tokens = results.plan["tokens_per_step"]
    rows = []
    for kind in ("constant", "cosine"):
        for rate in results.rates:
            runs = [run for run in results.of(kind, rate) if Labels.of(results).lawa in run.losses]
            if not runs:
                rows.append([f"{kind} {rate}", *["n/a"] * 4])
                continue
            found = [(run, _steps_saved(results, run)) for run in runs]
            saved = [
                (steps, run.seconds_per_step or 0) for run, steps in found if steps is not None
            ]
            rows.append([
                f"{kind} {rate}",
                f"{len(saved)} of {len(runs)}",
                _rounded(estimate([steps for steps, _ in saved]), 0),
                _rounded(estimate([steps * tokens / 1e6 for steps, _ in saved]), 2),
                _rounded(estimate([steps * seconds / 60 for steps, seconds in saved]), 1),
            ])  # fmt: skip
    table = Table(
        "Steps between the first snapshot at which LAWA reaches the final raw loss and the first "
        "at which the raw weights reach it. Minutes are steps times the run's median step time, "
        "because runs share their machine and are paused",
        ["curve"],
        ["schedule, peak", "seeds that reach it", "steps saved", "million tokens", "minutes"],
        rows,
    )
    return Section(
        "Training saved", "LAWA reaches the final loss of the raw weights earlier.", [], [table], []
    )


def _steps_saved(results: Results, run: Run) -> int | None:
    raw, lawa = run.losses[RAW], run.losses[Labels.of(results).lawa]
    goal = raw[run.end]
    reached = [step for step, loss in lawa.items() if loss <= goal]
    return (
        min(step for step, loss in raw.items() if loss <= goal) - min(reached) if reached else None
    )


def _rounded(value: Estimate | None, digits: int) -> str:
    if value is None:
        return "never"
    mean = round(value.mean, digits) + 0.0  # no −0
    spread = "" if value.error is None else f" ± {value.error:.{digits}f}"
    return f"{mean:.{digits}f}".replace("-", "−") + spread


def step_at(results: Results, share: float) -> int:
    """Return the snapshot step nearest to this share of the run."""
    every, steps = int(results.plan["spacing"]), int(results.plan["steps"])
    return round(share * steps / every) * every


def lawa_change(results: Results, kind: str, rate: str, step: int) -> BySeed:
    """Return LAWA's loss minus raw's by seed."""
    raw = results.by_seed(kind, rate, RAW, step)
    lawa = results.by_seed(kind, rate, Labels.of(results).lawa, step)
    return {seed: loss - raw[seed] for seed, loss in lawa.items() if seed in raw}


def paired_or_none(changes: BySeed) -> Estimate | None:
    """Return the mean of paired differences."""
    return estimate(list(changes.values()))
