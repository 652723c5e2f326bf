"""Which learning rates all seeds are given, decided from the results of the first one.

Why a rule: a rate picked by eye could be picked for its outcome.

    tuned, largest = choose(plan, Path("runs/reproduce"))
"""

import math
from pathlib import Path

from llmtrain.evaluation.targets import RAW
from llmtrain.events import read_events
from llmtrain.files import RunFolder
from reproduction.execute import failure
from reproduction.plan import Plan
from reproduction.results import Losses


def validation(run: Path) -> Losses:
    """Validation loss by weights and step, as training logged it."""
    losses: Losses = {}
    for event in read_events(RunFolder(run).metrics):
        for key, loss in event.items():
            if key.startswith("val/loss") and loss is not None:
                label = key.removeprefix("val/loss").removeprefix("/") or RAW
                losses.setdefault(label, {})[event["step"]] = loss
    return losses


def tuned_rate(plan: Plan, root: Path) -> str:
    """The rate at which the first seed's cosine run ends with the lowest raw validation loss.

    Raises:
        SystemExit: no run of it has finished.
    """
    ends = {rate: _end(plan, root, plan.cosine(rate, plan.seeds[0]).name) for rate in plan.rates}
    best = min(ends, key=lambda rate: ends[rate])
    if math.isinf(ends[best]):
        raise SystemExit("no cosine run of the first seed has finished: run --stage runs")
    return best


def largest_rate(plan: Plan, root: Path) -> str:
    """The largest rate that trains: at which the first seed's constant run ends, raw, with a lower loss
    than that of the lowest rate has after a fifth of the steps (its first evaluation).
    """
    seed = plan.seeds[0]
    early = validation(root / plan.constant(plan.rates[0], seed).name)[RAW]
    bound = early[min(early)]
    fit = [rate for rate in plan.rates if _end(plan, root, plan.constant(rate, seed).name) < bound]
    return fit[-1]


def _end(plan: Plan, root: Path, name: str) -> float:
    """Validation loss of the last step, in nats per token; infinite for a run that failed or has not ended."""
    if failure(root, name) is not None:
        return math.inf
    return validation(root / name).get(RAW, {}).get(plan.steps, math.inf)
