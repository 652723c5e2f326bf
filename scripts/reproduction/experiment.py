"""An experiment from its first run to its results, in stages that can each be started again.

Why here: the CPU's and the GPU's differ in their plan alone.

    Experiment("cpu", title, plan, Path("runs/reproduce"), ("prepare", "sotu"), workers=2).run("all", results)
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
    """One plan, trained, measured and reported."""

    name: str
    """Of the JSON file of its results."""
    title: str
    plan: Plan
    root: Path
    """Where the runs lie."""
    prepare: tuple[str, ...]
    """The command that makes the data."""
    workers: int
    """Commands at a time."""

    def run(self, stage: str, folder: Path) -> None:
        """A stage, or for `all` and `runs` several; the results go to `folder`.

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
        """Prepare the data, and train every rate with the first seed."""
        execute.run([Job("prepare", self.prepare)], self.root, 1)
        self._train(first_seed(self.plan))

    def seeds(self) -> None:
        """Train what the first seed's results ask for."""
        tuned, largest, rates = self.chosen()
        print(
            f"tuned for cosine: {tuned}; the largest that trains: {largest}; all seeds: {', '.join(rates)}"
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
        """The tuned rate, the largest that trains, and all that all seeds are given, ascending."""
        tuned, largest = tuned_rate(self.plan, self.root), largest_rate(self.plan, self.root)
        rates = (
            {tuned, largest, text(float(tuned) / 3)} if self.plan.third else set(self.plan.rates)
        )
        return tuned, largest, sorted(rates, key=float)

    def trainings(self) -> list[Training]:
        """All of them."""
        tuned, _, rates = self.chosen()
        return [*first_seed(self.plan), *further_seeds(self.plan, rates, tuned)]

    def results(self) -> Results:
        """What the files of the runs, and of their measurements, tell."""
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
        """The day, what the first run was trained on, and how much of the validation split is looked at."""
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
