"""Write scripts/results/README.md: the verdicts, then every table and figure.

Why: generated, because a number typed by hand cannot be reproduced.

    write_page(Path("scripts/results"))
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtrain.evaluation.report.charts import draw
from llmtrain.storage.run_folder import RAW
from reproduction.gains import by_rate, by_step, by_window, savings
from reproduction.plan import WINDOW
from reproduction.pythia import Series, read_all
from reproduction.results import Results
from reproduction.rivals import as_a_decay, by_method
from reproduction.section import Labels, Section, cell
from reproduction.spike import in_a_spike
from reproduction.statistics import Estimate

SECTIONS = (by_step, by_rate, by_window, by_method, in_a_spike, as_a_decay, savings)
EXPERIMENTS = {
    "cpu": "scripts/reproduce_cpu",
    "gpu-short": "scripts/reproduce_gpu --short FILE",
    "gpu": "scripts/reproduce_gpu",
}
"""The command that makes each JSON file."""

_COLUMNS = ("claim", "first against second", "on", "Δ", "seeds", "verdict")
_HEAD = """# Does averaging pay?

The claims of *Early Weight Averaging meets High Learning Rates for LLM Pre-training* (arXiv
2306.03241), tested on our own runs. This page is generated from the JSON files in this folder.
Losses are nats per token on the validation split.

A difference Δ is the first loss minus the second, averaged over seeds, ± its standard error. Both
sides of a pair use the same seed and the same validation tokens. **Verdict**: *gain* if the first
loss is lower by at least two standard errors, *loss* if it is higher by as much, else
*no difference*. For LAWA's change (its loss minus the raw loss), a *gain* is a larger decrease.
Two standard errors are a weak rule for few seeds: noise alone passes it in 18% of comparisons with
three seeds and in 30% with two. A value without ± comes from one seed (verdict *one seed*), so it
also differs from means of several seeds by the choice of the seed.
"""


def write_page(folder: Path) -> Path:
    """Write README.md and the figures from the JSON files in `folder`."""
    found = {
        name: Results.read(folder / f"{name}.json")
        for name in EXPERIMENTS
        if (folder / f"{name}.json").exists()
    }
    sections = {name: [make(results) for make in SECTIONS] for name, results in found.items()}
    series = folder / "pythia.json"
    made, public = read_all(series) if series.exists() else ({}, [])
    verdicts = [*_verdicts(found, sections), *_of_public(public)]
    parts = [_HEAD, "## Verdicts\n", _claims(sections), markdown(_COLUMNS, verdicts)]
    for name, results in found.items():
        parts += _experiment(folder, name, results, sections[name])
    if public:
        parts += _public(made, public)
    page = folder / "README.md"
    page.write_text("\n".join(parts).rstrip() + "\n")
    return page


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _claims(sections: dict[str, list[Section]]) -> str:
    """Return the list of numbered claims."""
    claims = {
        section.comparisons[0].claim: section.text
        for each in sections.values()
        for section in each
        if section.comparisons
    }
    return "".join(f"{number}. {text}\n" for number, text in sorted(claims.items()))


def _verdicts(found: dict[str, Results], sections: dict[str, list[Section]]) -> list[list[str]]:
    rows = []
    for name, command in EXPERIMENTS.items():
        if name not in found:
            rows.append(["", f"`{command}`", "", "", "", "not run yet"])
            continue
        device = f"{name}: {found[name].made['device']}"
        compared = [each for section in sections[name] for each in section.comparisons if each.main]
        rows += [
            [str(each.claim), each.what, device, *_judged(each.difference)] for each in compared
        ]
    return rows


def _judged(difference: Estimate | None) -> list[str]:
    """Return the cells Δ, seeds and verdict."""
    if difference is None:
        return ["n/a", "0", "not measured"]
    return [difference.signed, str(difference.seeds), difference.verdict]


def _of_public(public: Sequence[Series]) -> list[list[str]]:
    """Return the comparison of the paper's window halfway through each series."""
    if not public:
        return [["", "`scripts/reproduce_pythia`", "", "", "", "not run yet"]]
    rows = []
    for series in public:
        step, every = series.steps[(len(series.steps) - 1) // 2], series.spacings[0]
        size = WINDOW if WINDOW in series.sizes else series.sizes[0]
        value = series.change(step, size, every)
        what = f"LAWA {size}×{every} against raw, bits/byte: {series.name}, step {step}"
        rows.append(["1", what, "public weights", *_judged(value)])
    return rows


def _public(made: dict[str, Any], public: Sequence[Series]) -> list[str]:
    facts = markdown(["", ""], [[key, str(value)] for key, value in made.items()])
    parts = [
        "## Public series\n",
        "Made by `scripts/reproduce_pythia`; numbers: [pythia.json](pythia.json).\n",
        facts,
    ]
    for series in public:
        rows = [
            [
                str(step),
                str(every),
                *(cell(series.change(step, size, every)) for size in series.sizes),
            ]
            for step in series.steps
            for every in series.spacings
        ]
        parts += [
            f"### {series.name}\n",
            "Bits per byte of LAWA minus those of the raw weights. Made by `llmtrain average "
            "SERIES --every N --window k --at STEP --discard-inputs --out FOLDER` and "
            "`llmtrain eval FOLDER --json`.\n",
            markdown(["step", "N", *(f"k = {size}" for size in series.sizes)], rows),
        ]
        refused = [each for each in series.measured.values() if each.refused is not None]
        parts += [
            f"- {each.window.name}: {each.refused.splitlines()[0]}"
            for each in refused
            if each.refused
        ]
        parts.append("")
    return parts


def _experiment(
    folder: Path, name: str, results: Results, sections: Sequence[Section]
) -> list[str]:
    parts = [f"## {results.title}\n", _about(name, results)]
    for number, section in enumerate(sections, start=1):
        claim = section.comparisons[0].claim if section.comparisons else None
        parts.append(f"### {section.title}\n")
        parts.append(f"Claim {claim}: {section.text}\n" if claim else f"{section.text}\n")
        if section.comparisons:
            rows = [[each.what, *_judged(each.difference)] for each in section.comparisons]
            parts.append(markdown(["first against second", "Δ", "seeds", "verdict"], rows))
        for table in section.tables:
            made = "; ".join(f"`{results.commands[key]}`" for key in table.made)
            parts += [f"{table.caption}. Made with {made}.\n", markdown(table.head, table.rows)]
        for chart in section.charts:
            figure = folder / f"{name}-{number}-{chart.name}.svg"
            known = [line for line in chart.lines if line.x]
            figure.write_text(draw(replace(chart, lines=known)).svg)
            parts.append(f"![{chart.title}]({figure.name})\n")
    return [*parts, "### Runs\n", _runs(results)]


def _about(name: str, results: Results) -> str:
    facts = markdown(["", ""], [[key, str(value)] for key, value in results.made.items()])
    choice = (
        f"The tuned rate is {results.tuned}: the first seed's cosine run with the lowest final raw "
        f"loss. The largest rate that trains is {results.largest}: its constant run ends with a "
        "lower raw loss than the lowest rate has after a fifth of the steps. All seeds: "
        f"{', '.join(results.rates)}; "
        "one seed at the other rates. "
        f"The seed sets initial weights and data order.\n"
    )
    return (
        f"Made by `{EXPERIMENTS[name]}`; numbers: [{name}.json]({name}.json).\n\n{facts}\n{choice}"
    )


def _runs(results: Results) -> str:
    labels = Labels.of(results)
    rows = []
    for run in results.runs:
        if run.failure is not None:
            rows.append([run.name, "", "", "", "", run.failure.splitlines()[0]])
            continue
        ends = [
            run.losses.get(label, {}).get(run.end) for label in (RAW, labels.lawa, labels.matched)
        ]
        if ends[1] is None:
            ends[1] = run.losses.get(labels.online_lawa, {}).get(run.end)
        shown = ["" if loss is None else f"{loss:.4f}" for loss in ends]
        rows.append([run.name, str(run.end), *shown, f"{run.seconds_per_step or 0:.3f}"])
    commands = "\n".join(run.command for run in results.runs)
    table = markdown(
        ["run", "last step", "raw", "LAWA", "matched EMA", "seconds a step (median)"], rows
    )
    summary = "<details><summary>The commands; ROOT is the folder of the runs</summary>"
    return f"{table}\n{summary}\n\n```\n{commands}\n```\n</details>\n"
