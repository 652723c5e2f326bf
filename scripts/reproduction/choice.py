"""Choose the learning rates that all seeds train, from the results of the first seed.

Why: a fixed rule. A rate picked by eye could be picked for its outcome.

    tuned_rate(plan, Path("runs/reproduce"))  # "6e-3"
"""

import math
from pathlib import Path

from llmtrain.storage.json_files import read_events
from llmtrain.storage.run_folder import RAW, RunFolder
from reproduction.execute import failure
from reproduction.plan import Plan, Training
from reproduction.results import Losses


def validation(run: Path) -> Losses:
    """Return the logged validation loss by weights and step."""
    losses: Losses = {}
    for event in read_events(RunFolder(run).metrics):
        for key, loss in event.items():
            if key.startswith("val/loss") and loss is not None:
                label = key.removeprefix("val/loss").removeprefix("/") or RAW
                losses.setdefault(label, {})[event["step"]] = loss
    return losses


def missing(root: Path, training: Training) -> str | None:
    """Return the reason a run has no result (it failed or has not ended), or None."""
    if training.end in validation(root / training.name).get(RAW, {}):
        return None
    return failure(root, training.name) or "has not ended"


def tuned_rate(plan: Plan, root: Path) -> str:
    """Return the rate whose first-seed cosine run ends with the lowest raw validation loss.

    Raises:
        SystemExit: no run of it has finished.
    """
    ends = {rate: _end(plan.cosine(rate, plan.seeds[0]), root) for rate in plan.rates}
    best = min(ends, key=lambda rate: ends[rate])
    if math.isinf(ends[best]):
        raise SystemExit("no cosine run of the first seed has ended: train the runs first")
    return best


def largest_rate(plan: Plan, root: Path) -> str:
    """Return the largest rate that trains.

    Its first-seed constant run ends with a lower raw loss than the lowest rate after a fifth
    of the steps.

    Raises:
        SystemExit: that run has not reached the step.
    """
    lowest = plan.constant(plan.rates[0], plan.seeds[0])
    bound = validation(root / lowest.name).get(RAW, {}).get(plan.steps // 5)
    if bound is None:
        raise SystemExit(
            f"{lowest.name} has no loss at step {plan.steps // 5:,}: train the runs first"
        )
    ends = {rate: _end(plan.constant(rate, plan.seeds[0]), root) for rate in plan.rates}
    return [rate for rate, loss in ends.items() if loss < bound][-1]


def _end(training: Training, root: Path) -> float:
    """Return the last validation loss (nats per token), or infinity without a result."""
    return validation(root / training.name).get(RAW, {}).get(training.end, math.inf)
