"""Measure runs with `llmtrain eval` and `average --sweep`, and read the printed JSON.

Each JSON file is the output of one command, so a measurement is taken once and the tables can be
rebuilt from the files.

    execute.run(measurements(plan, root, trainings), root / "measured", workers=2)
"""

import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.config.loading import load_config
from llmtrain.storage.json_files import read_events
from llmtrain.storage.run_folder import RunFolder
from reproduction.choice import missing, validation
from reproduction.execute import Job
from reproduction.plan import WINDOW, Plan, Training
from reproduction.results import Losses, Run

WIDTHS = (0.02, 0.03, 0.05, 0.075, 0.1, 0.15)
"""Relative widths of post-hoc EMAs."""
_MEASURED = ("constant", "cosine", "cooldown")
WINDOWS = (2, 3, 5, 10)
SPACINGS = (1, 2, 3, 5, 8)
"""Spacings of a window's checkpoints, in snapshots."""


def measurements(plan: Plan, root: Path, trainings: Sequence[Training]) -> list[Job]:
    """Return the measurements: final losses, LAWA curves, windows and methods.

    Runs that have not ended are left out. For the rest the training log suffices.
    """
    jobs = []
    for training in trainings:
        if training.kind in _MEASURED and missing(root, training) is None:
            jobs.append(_end(root, training))
            jobs += _sweeps(plan, root, training)
    return jobs


def _end(root: Path, training: Training) -> Job:
    """Return the command that evaluates raw weights and all averages at the last step."""
    run = RunFolder(root / training.name)
    last = training.end
    labels = [average.label for average in load_config(run.config).averages]
    kept = [str(run.average(label, last)) for label in labels if run.average(label, last).is_dir()]
    return _job(root, training, "end", ["eval", str(run.snapshot(last)), *kept])


def _sweeps(plan: Plan, root: Path, training: Training) -> list[Job]:
    return [
        _job(root, training, what, ["average", str(root / training.name), *words])
        for what, words in sweeps(plan).items()
        if training.kind == "constant" or (training.kind == "cosine" and what == "curve")
    ]


def sweeps(plan: Plan) -> dict[str, list[str]]:
    """Return the arguments of `llmtrain average RUN` for each sweep."""
    every = plan.spacing
    windows, spacings = _listed(WINDOWS), _listed([every * factor for factor in SPACINGS])
    methods = (
        f"method=swa,decay,posthoc-ema every={every} from={plan.swa_early},{plan.swa_late} "
        f"window={plan.merged(plan.steps)} shape=1-sqrt sigma-rel={_listed(WIDTHS)}"
    )
    found = {
        "curve": (f"window={WINDOW} every={every}", "all"),
        "windows": (f"window={windows} every={spacings}", "last"),
        "methods": (methods, "last"),
    }
    for step in plan.forecasts:
        window = plan.merged(step + step // 4)
        found[f"merge-{step}"] = (
            f"method=decay every={every} window={window} shape=1-sqrt",
            str(step),
        )
    return {what: ["--sweep", text, "--at", at] for what, (text, at) in found.items()}


def commands(plan: Plan) -> dict[str, str]:
    """Return each measurement's command, with RUN as a placeholder."""
    found = {
        what: shlex.join(["llmtrain", "average", "RUN", *words, "--json"])
        for what, words in sweeps(plan).items()
    }
    return found | {
        "end": "llmtrain eval RUN/snapshots/LAST RUN/averages/*/LAST --json",
        "log": "llmtrain pretrain",
    }


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _job(root: Path, training: Training, what: str, arguments: Sequence[str]) -> Job:
    name = f"{training.name}-{what}"
    return Job(name, (*arguments, "--json"), output=root / "measured" / f"{name}.json")


def read_run(plan: Plan, root: Path, training: Training) -> Run:
    """Read a run's log and measurements."""
    folder = RunFolder(root / training.name)
    shown = training.arguments(Path("configs") / plan.config.name, Path("ROOT"))
    known = missing(root, training)
    losses: Losses = validation(folder.path) if known is None else {}
    measured = []
    for path in (
        sorted((root / "measured").glob(f"{training.name}-*.json")) if known is None else []
    ):
        measured.append(path.stem.removeprefix(f"{training.name}-"))
        for label, curve in _losses(json.loads(path.read_text())).items():
            losses.setdefault(label, {}).update(curve)
    return Run(
        name=training.name,
        kind=training.kind,
        rate=training.rate,
        seed=training.seed,
        command=shlex.join(["llmtrain", *shown]),
        measured=measured,
        seconds_per_step=None if known else _seconds_per_step(folder),
        failure=known,
        losses=losses,
    )


def _losses(document: Any) -> Losses:
    """Parse the output of `eval --json` or `average --sweep --json`: label, step, loss."""
    found: Losses = {}
    if isinstance(document, list):
        for row in document:
            found.setdefault(row["label"], {})[row["step"]] = row["loss"]
        return found
    curves = {"raw": document["raw"]} | {each["label"]: each for each in document["candidates"]}
    return {
        label: {int(step): loss for step, loss in each["losses"].items()}
        for label, each in curves.items()
    }


def _seconds_per_step(run: RunFolder) -> float:
    """Return the median over the log, because runs are paused and share their machine."""
    speeds = [
        event["tokens_per_second"]
        for event in read_events(run.metrics)
        if "tokens_per_second" in event
    ]
    return float(load_config(run.config).tokens_per_step / statistics.median(speeds))
