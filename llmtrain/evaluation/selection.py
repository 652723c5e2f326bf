"""Which weights a word stands for where one set is wanted: to write text with, to hand over.

Why apart from `targets.py`: measuring wants all of a run's weights, using wants the best of them.

    weights, raw = choose_weights("runs/demo")
"""

import math

from llmtrain.checkpoints.resolve import Target, find_targets
from llmtrain.evaluation.results import stored_rows
from llmtrain.storage.run_folder import RAW


def choose_weights(name: str | None) -> tuple[Target, Target | None]:
    """One set of weights, and the raw ones of its step where it is an average and they are there.

    Args:
        name: a folder of weights; a run, for its newest average (of several at that step the one that
            `eval` found best, else the first by name) or, without averages, its newest snapshot;
            OWNER/NAME or OWNER/NAME@REVISION on the hub; None: the newest run.

    Raises:
        UserError: it is none of these.
        RunFailed: the hub cannot be reached.
    """
    return _best(find_targets(name))


def _best(targets: list[Target]) -> tuple[Target, Target | None]:
    last = targets[-1]
    newest = [target for target in targets if target.step == last.step]
    raw = next((target for target in newest if target.label == RAW), None)
    averages = [target for target in newest if target.label != RAW]
    if len(averages) > 1:
        assert last.run is not None
        rows = [
            row for row in stored_rows(last.run) if row.step == last.step and row.split == "val"
        ]
        gains = {row.label: row.delta for row in rows if row.delta is not None}
        return min(
            averages, key=lambda target: (gains.get(target.label, math.inf), target.label)
        ), raw
    return last, raw if last is not raw else None
