"""The results of an experiment: losses of every run by weights and step, and how they came about. JSON.

Why one small file: tables and figures can be made anew from it without the runs, and by anyone.

    results = Results.read(Path("scripts/results/cpu.json")); results.by_seed("constant", "6e-3", "raw", 1800)
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Losses = dict[str, dict[int, float]]
"""Label of the weights → step → validation loss in nats per token."""
BySeed = dict[int, float]


@dataclass(frozen=True)
class Run:
    """One training run and what was measured of it."""

    name: str
    kind: str
    """As `Training.kind`."""
    rate: str
    """Peak learning rate, as in its name."""
    seed: int
    command: str
    measured: list[str]
    """What was measured of it afterwards; the command of each is in `Results.commands`."""
    seconds_per_step: float | None
    failure: str | None
    """What it failed with, or that it has not ended; then it has no losses."""
    losses: Losses

    @property
    def end(self) -> int:
        """Its last step."""
        return max(self.losses["raw"])


@dataclass(frozen=True)
class Results:
    """Everything that the tables are made of."""

    title: str
    made: dict[str, Any]
    """When, and on what."""
    plan: dict[str, Any]
    """The sizes, as `Plan` names them."""
    tuned: str
    largest: str
    rates: list[str]
    """Those that all seeds were given, ascending."""
    commands: dict[str, str]
    """What was measured → the command, for RUN."""
    runs: list[Run]

    def write(self, path: Path) -> None:
        """As JSON, losses to six digits."""
        document = json.loads(
            json.dumps(asdict(self)), parse_float=lambda text: round(float(text), 6)
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Results":
        """What `write` wrote."""
        document = json.loads(path.read_text())
        runs = [
            Run(
                **run
                | {
                    "losses": {
                        k: {int(s): v for s, v in c.items()} for k, c in run["losses"].items()
                    }
                }
            )
            for run in document.pop("runs")
        ]
        return cls(**document, runs=runs)

    def of(self, kind: str, rate: str, end: int | None = None) -> list[Run]:
        """The runs of a schedule and a rate that trained (to step `end`), by seed."""
        found = [
            run for run in self.runs if (run.kind, run.rate, run.failure) == (kind, rate, None)
        ]
        return sorted((run for run in found if end in (None, run.end)), key=lambda run: run.seed)

    def by_seed(
        self, kind: str, rate: str, label: str, step: int, end: int | None = None
    ) -> BySeed:
        """Seed → loss of these weights at this step, of the seeds that have it."""
        runs = self.of(kind, rate, end)
        return {
            run.seed: run.losses[label][step] for run in runs if step in run.losses.get(label, {})
        }
