"""Run an experiment from its first run to its results, in resumable stages.

The CPU and GPU experiments differ only in their plan.

    experiment = Experiment("cpu", title, plan, root, ("prepare", "sotu"), workers=2)
    experiment.run("all", results)
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from llmtrain.config.loading import load_config
from llmtrain.storage.json_files import read_json
from reproduction import execute, measure
from reproduction.choice import largest_rate, tuned_rate
from reproduction.execute import Job, stoppable
from reproduction.page import write_page
from reproduction.plan import Plan, Training, first_seed, further_seeds, text
from reproduction.results import Results


@dataclass(frozen=True)
class Experiment:
    """A plan that is trained, measured and reported."""

    name: str
    """Stem of the JSON file with the results."""
    title: str
    plan: Plan
    root: Path
    """Folder of the runs."""
    prepare: tuple[str, ...]
    """Arguments of the command that prepares the data."""
    workers: int
    """Commands at a time."""

    def run(self, stage: str, folder: Path) -> None:
        """Run a stage (`all` and `runs` are several) and write the results to `folder`.

        Raises:
            SystemExit: stopped, or a command failed.
        """
        stages: dict[str, Callable[[], None]] = {
            "first": self.first,
            "seeds": self.seeds,
            "measure": self.measure,
            "report": lambda: self.report(folder),
        }
        several = {"all": list(stages), "runs": ["first", "seeds"]}
        with stoppable():
            for each in several.get(stage, [stage]):
                stages[each]()

    def first(self) -> None:
        """Prepare the data and train every rate with the first seed."""
        execute.run([Job("prepare", self.prepare)], self.root, 1)
        self._train(first_seed(self.plan))

    def seeds(self) -> None:
        """Train the further seeds at the rates chosen from the first seed."""
        tuned, largest, rates = self.chosen()
        print(
            f"tuned for cosine: {tuned}; largest that trains: {largest}; "
            f"all seeds: {', '.join(rates)}"
        )
        self._train(further_seeds(self.plan, rates, tuned))

    def measure(self) -> None:
        """Evaluate ends, windows and methods."""
        jobs = measure.measurements(self.plan, self.root, self.trainings())
        execute.run(jobs, self.root / "measured", self.workers)

    def report(self, folder: Path) -> None:
        """Write the results as JSON, and the page of all results in `folder` anew."""
        self.results().write(folder / f"{self.name}.json")
        print(f"page: {write_page(folder)}")

    def chosen(self) -> tuple[str, str, list[str]]:
        """Return the tuned rate, the largest that trains, and the rates with every seed."""
        tuned, largest = tuned_rate(self.plan, self.root), largest_rate(self.plan, self.root)
        rates = (
            {tuned, largest, text(float(tuned) / 3)} if self.plan.third else set(self.plan.rates)
        )
        return tuned, largest, sorted(rates, key=float)

    def trainings(self) -> list[Training]:
        """Return all trainings of the plan."""
        tuned, _, rates = self.chosen()
        return [*first_seed(self.plan), *further_seeds(self.plan, rates, tuned)]

    def results(self) -> Results:
        """Read the results from the runs and their measurements."""
        tuned, largest, rates = self.chosen()
        runs = [measure.read_run(self.plan, self.root, training) for training in self.trainings()]
        plan = self.plan
        averages = load_config(plan.config, list(plan.settings)).averages
        sizes: dict[str, Any] = {
            key: value
            for key, value in asdict(plan).items()
            if key not in ("config", "settings", "third", "fifths")
        } | {
            "cooldown": plan.cooldown,
            "forecasts": plan.forecasts,
            "swa_early": plan.swa_early,
            "swa_late": plan.swa_late,
            "windows": measure.WINDOWS,
            "spacings": measure.SPACINGS,
            "widths": measure.WIDTHS,
            "kept": [average.label for average in averages if average.kind == "power-ema"],
        }
        return Results(
            self.title,
            self._made(),
            sizes,
            tuned,
            largest,
            rates,
            measure.commands(self.plan),
            runs,
        )

    def _made(self) -> dict[str, Any]:
        """Return the date, the first run's machine and the number of validation tokens."""
        about = read_json(self.root / first_seed(self.plan)[0].name / "environment.json")
        keys = ("device", "cores", "llmtrain", "torch", "python", "precision")
        on = {key: about[key] for key in keys}
        on["device"] = about["processor"] if on["device"] == "cpu" else on["device"]
        tokens = load_config(self.plan.config, list(self.plan.settings)).eval.tokens
        return {"date": date.today().isoformat()} | on | {"validation tokens": tokens or "all"}

    def _train(self, trainings: list[Training]) -> None:
        jobs = [
            Job(each.name, tuple(each.arguments(self.plan.config, self.root)), each.parent)
            for each in trainings
        ]
        execute.run(jobs, self.root, self.workers)
