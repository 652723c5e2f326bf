"""What a run came to: the losses of raw and averaged weights by step, and what spikes did to it.

Why from files alone: the report reads what training and `eval` measured, computes no loss itself,
and can be made again on a machine without the weights.

    curves = loss_curves(RunFolder(Path("runs/demo"))); curves["raw"]
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from llmtrain.evaluation.results import Row, stored_rows
from llmtrain.storage.json_files import read_events
from llmtrain.storage.run_folder import RAW, RunFolder

Curve = list[tuple[int, float]]
"""(step, loss in nats per token), by step."""


def loss_curves(run: RunFolder) -> dict[str, Curve]:
    """Validation loss by step for raw and each average; raw first.

    Takes what `eval` measured (see `newest_rows`), and what training logged on as many tokens.
    """
    rows = _comparable(stored_rows(run))
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for event in read_events(run.metrics):
        if rows and event.get("val/tokens") != rows[0].tokens:
            continue
        for key, loss in event.items():
            if key.startswith("val/loss") and loss is not None and math.isfinite(loss):
                curves[key.removeprefix("val/loss").lstrip("/") or RAW][event["step"]] = loss
    for row in rows:
        if row.step is not None:
            curves[row.label][row.step] = row.loss
    return {
        label: sorted(curves[label].items())
        for label in sorted(curves, key=lambda name: (name != RAW, name))
    }


@dataclass(frozen=True)
class Interventions:
    """How often training met a spike or a number that is not finite, and what it did."""

    nonfinite: int
    """Steps whose loss or gradient norm was not finite."""
    spikes: int
    """Steps whose loss or gradient norm was far above those before them."""
    skipped: int
    """Of both, the steps whose update was left out."""
    rewinds: int
    """Times that the run went back."""

    def __str__(self) -> str:
        return (
            f"spikes {self.spikes:,}, not finite {self.nonfinite:,}: skipped {self.skipped:,} steps, "
            f"rewound {self.rewinds:,} times"
        )


def interventions(run: RunFolder) -> Interventions:
    """What `metrics.jsonl` tells of them, with what rewinds took back."""
    events = [*read_events(run.metrics), *read_events(run.rewound_metrics)]
    kinds = Counter(
        (event["incident"], event["action"] == "skip") for event in events if "incident" in event
    )
    return Interventions(
        nonfinite=kinds["nonfinite", True] + kinds["nonfinite", False],
        spikes=kinds["spike", True] + kinds["spike", False],
        skipped=kinds["nonfinite", True] + kinds["spike", True],
        rewinds=sum("rewound_from" in event for event in events),
    )


def newest_rows(run: RunFolder) -> list[Row]:
    """For raw and each average that `eval` measured, the result of its newest step, all on the same windows."""
    newest = {
        row.label: row for row in _comparable(stored_rows(run))
    }  # by label and step: the last one stays
    return list(newest.values())


def _comparable(rows: Sequence[Row]) -> list[Row]:
    """Results measured on the same validation windows: of those with most results, the largest windows."""
    groups = defaultdict(list)
    for row in rows:
        if row.split == "val":
            groups[row.data, row.tokens, row.precision].append(row)
    return max(groups.values(), key=lambda group: (len(group), group[0].tokens), default=[])
