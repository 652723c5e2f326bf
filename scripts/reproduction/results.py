"""The results of an experiment as JSON: losses of every run by weights and step, and their origin.

Tables and figures can be rebuilt from this one file without the runs.

    results = Results.read(Path("scripts/results/cpu.json"))
    results.by_seed("constant", "6e-3", "raw", 1800)
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
    """One training run and its measurements."""

    name: str
    kind: str
    """See `Training.kind`."""
    rate: str
    """Peak learning rate, as in the name."""
    seed: int
    command: str
    measured: list[str]
    """Later measurements; `Results.commands` has their commands."""
    seconds_per_step: float | None
    failure: str | None
    """The failure, or a note that the run has not ended; then there are no losses."""
    losses: Losses

    @property
    def end(self) -> int:
        """The last step."""
        return max(self.losses["raw"])


@dataclass(frozen=True)
class Results:
    """All data behind the tables."""

    title: str
    made: dict[str, Any]
    """Date and machine."""
    plan: dict[str, Any]
    """The sizes, with the names of `Plan`."""
    tuned: str
    largest: str
    rates: list[str]
    """Rates trained with all seeds, ascending."""
    commands: dict[str, str]
    """The command of each measurement, with RUN as a placeholder."""
    runs: list[Run]

    def write(self, path: Path) -> None:
        """Write JSON with losses rounded to six digits."""
        document = json.loads(
            json.dumps(asdict(self)), parse_float=lambda text: round(float(text), 6)
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read the output of `write`."""
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
        """Return the runs of a schedule and rate that reached step `end`, by seed."""
        found = [
            run for run in self.runs if (run.kind, run.rate, run.failure) == (kind, rate, None)
        ]
        return sorted((run for run in found if end in (None, run.end)), key=lambda run: run.seed)

    def by_seed(
        self, kind: str, rate: str, label: str, step: int, end: int | None = None
    ) -> BySeed:
        """Return the loss of these weights at this step by seed."""
        runs = self.of(kind, rate, end)
        return {
            run.seed: run.losses[label][step] for run in runs if step in run.losses.get(label, {})
        }
