"""Claims 4 and 6: LAWA compared with other averages and a cooldown, and as its forecast.

for section in (by_method(results), as_a_decay(results)): ...
"""

from collections.abc import Callable

from llmtrain.evaluation.report.charts import Chart
from llmtrain.storage.run_folder import RAW
from reproduction.gains import lawa_change, step_at
from reproduction.results import BySeed, Results
from reproduction.section import Comparison, Labels, Section, Table, cell, line, merge_label
from reproduction.statistics import estimate, paired

_LOSS = "nats per token"
_DRAWN_WIDTH = " 0.05"
"""Width of the post-hoc EMA, fixed before any result so that the outcome cannot choose it."""


def _ends(results: Results) -> dict[str, Callable[[str], BySeed]]:
    """Return each method's final losses on the constant run; the last method has its own run."""
    labels, steps = Labels.of(results), results.plan["steps"]
    names = {
        "raw": RAW,
        "LAWA": labels.lawa,
        "EMA 0.9": "ema-0.9",
        "matched EMA": labels.matched,
        "SWA early": labels.swa_early,
        "SWA late": labels.swa_late,
        "1-sqrt merge": labels.merge,
    } | {f"post-hoc EMA {width}": f"posthoc-ema-{width}" for width in results.plan["widths"]}

    def of(label: str) -> Callable[[str], BySeed]:
        return lambda rate: results.by_seed("constant", rate, label, steps)

    found = {name: of(label) for name, label in names.items()}
    return found | {
        "cooldown": lambda rate: results.by_seed("cooldown", rate, RAW, steps, end=steps)
    }


def by_method(results: Results) -> Section:
    """Claim 4: it beats EMA and SWA."""
    methods = _ends(results)
    lawa, tuned = methods["LAWA"], results.tuned
    rates = sorted({*results.plan["rates"], *results.rates}, key=float)
    comparisons = [
        Comparison(
            4,
            f"LAWA against {name}: constant {tuned}, end",
            paired(lawa(tuned), of(tuned)),
            main=name != "raw" and not name.startswith("post-hoc"),
        )
        for name, of in methods.items()
        if name != "LAWA"
    ]
    ends = {
        name: {rate: estimate(list(of(rate).values())) for rate in rates}
        for name, of in methods.items()
    }
    rows = [
        [name, *(cell(by_rate[rate], signed=False) for rate in rates)]
        for name, by_rate in ends.items()
    ]
    differences = [
        [name, *(cell(paired(of(rate), methods["raw"](rate))) for rate in rates)]
        for name, of in methods.items()
        if name != "raw"
    ]
    made = ["end", "curve", "methods"]
    tables = [
        Table(
            "Final loss of the constant run by peak learning rate",
            made,
            ["weights", *rates],
            rows,
        ),
        Table("The same, minus raw", made, ["weights", *rates], differences),
    ]
    drawn = [
        name for name in ends if not name.startswith("post-hoc") or name.endswith(_DRAWN_WIDTH)
    ]
    drawn.remove("SWA early")  # so high that the other curves would overlap
    lines = [
        line(name, [(float(rate), ends[name][rate]) for rate in rates], kind)
        for kind, name in enumerate(drawn)
    ]
    title = "Loss at the end (SWA early: the table)"
    chart = Chart("methods", title, "peak learning rate", _LOSS, lines, log_x=True)
    return Section(
        "Compared with other averages and a cooldown",
        "It beats EMA and SWA.",
        comparisons,
        tables,
        [chart],
    )


def as_a_decay(results: Results) -> Section:
    """Claim 6: it emulates a learning-rate decay, and its gain fades as the rate decays."""
    rows, series = [], {}
    for rate in results.rates:
        for step in results.plan["forecasts"]:
            predicted = _predictions(results, rate, step)
            end = step + step // 4
            real = results.by_seed("cooldown", rate, RAW, end, end=end)
            errors = {name: paired(losses, real) for name, losses in predicted.items()}
            rows.append(
                [
                    rate,
                    str(step),
                    cell(estimate(list(real.values())), signed=False),
                    *map(cell, errors.values()),
                ]
            )
            if rate == results.tuned:
                series[step] = predicted | {"cooldown (real)": real}
    names = list(_predictions(results, results.tuned, results.plan["forecasts"][0]))
    table = Table(
        "Loss of the constant run's average at a step minus that of the cooldown from there, "
        "which trains on a "
        "quarter more tokens",
        ["log", "curve", f"merge-{results.plan['forecasts'][-1]}"],
        ["peak", "step", "cooldown's loss", *names],
        rows,
    )
    lines = [
        line(name, [(step, estimate(list(series[step][name].values()))) for step in series], kind)
        for kind, name in enumerate(["cooldown (real)", *names])
    ]
    chart = Chart(
        "forecast",
        f"Forecast of a cooldown, peak {results.tuned}",
        "step at which it begins",
        _LOSS,
        lines,
    )
    text = "It acts as a surrogate for learning-rate decay, and fades as the rate decays."
    return Section("As a learning-rate decay", text, _decay_comparisons(results), [table], [chart])


def _predictions(results: Results, rate: str, step: int) -> dict[str, BySeed]:
    """Compare averages of the constant run at `step` with its cooldown."""
    labels = Labels.of(results)
    names = {
        "raw": RAW,
        "LAWA": labels.lawa,
        "matched EMA": labels.matched,
        "1-sqrt merge": merge_label(results, step + step // 4),
    }
    return {name: results.by_seed("constant", rate, label, step) for name, label in names.items()}


def _decay_comparisons(results: Results) -> list[Comparison]:
    steps, tuned, start = results.plan["steps"], results.tuned, results.plan["cooldown"]
    cosine, middle = results.by_seed("cosine", tuned, RAW, steps), step_at(results, 0.4)
    cooldown = results.by_seed("cooldown", tuned, RAW, steps, end=steps)
    found = [
        Comparison(
            6,
            f"{name} of constant {tuned} at {start} against its cooldown to {steps}",
            paired(losses, cooldown),
            main=True,
        )
        for name, losses in _predictions(results, tuned, start).items()
        if name != "raw"
    ]
    lawa = results.by_seed("constant", tuned, Labels.of(results).lawa, steps)
    fading = paired(
        lawa_change(results, "cosine", tuned, steps), lawa_change(results, "cosine", tuned, middle)
    )
    against_cosine = f"LAWA of constant {tuned} against raw of cosine {tuned}, end"
    found += [
        Comparison(
            6,
            f"{name} of constant {tuned} against its cooldown, both at {steps}",
            change,
            main=True,
        )
        for name in ("matched EMA", "1-sqrt merge")
        if (change := paired(_ends(results)[name](tuned), cooldown)) is not None
    ]
    return [
        *found,
        Comparison(6, against_cosine, paired(lawa, cosine), main=True),
        Comparison(6, f"cooldown against cosine, raw, {tuned}, end", paired(cooldown, cosine)),
        Comparison(
            6, f"what LAWA changes of cosine {tuned} at the end against at 40%", fading, main=True
        ),
    ]
