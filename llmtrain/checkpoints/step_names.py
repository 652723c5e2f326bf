"""The step in the name of a checkpoint.

A labelled number is preferred: `step=1200`, `iter_0001200`, `global_step1200`, else `epoch=3`.
Otherwise the step is the number at the end of the name: `ckpt_1200`, `checkpoint-10k`. Decimals,
metrics, dates, ranks and the `-v1` of a second file do not count.
"""

import re
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

_LABELS = {
    "step": r"steps?",
    "iteration": r"iter(?:ation)?s?|it|(?:num_)?updates?|ba",
    "epoch": r"epochs?|ep",
}
"""Labels, the best first; `ba` is Composer's batch."""

_LABELLED = {
    label: re.compile(
        rf"(?<![A-Za-z])(?i:(?:global)?[-_ ]?(?:{words}))[=_: -]?"
        r"(\d+(?:\.\d+(?=[kM]))?)([kKM]?)(?![A-Za-z\d]|\.\d)"
    )
    for label, words in _LABELS.items()
}
_OTHER_STEPS = re.compile(r"(?i:val|valid|test|eval|warmup|max|total|decay|accum)[-_ ]?$")
"""Text before a label that makes it another quantity, such as `warmup_steps=100`."""

_EPOCH = "epochs"
_VALUE = r"\d+(?:\.\d+)?(?:e[-+]?\d+)?"
_IGNORED = [
    re.compile(pattern)
    for pattern in (
        # A date, with or without a time. Further digits after it could be a time or a step.
        r"(?<!\d)(?:19|20)\d\d([-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])(?:\d{4}|\d{6})?"
        r"(?!\d)(?:[T_ .-]*\d[\dhms:_.-]*)?",
        r"-v\d+$",
        rf"[A-Za-z][\w@]*=[-+]?{_VALUE}",
        r"(?<![A-Za-z])(?i:loss|acc|accuracy|ppl|perplexity|bleu|wer|f1|auc|score|bpb|lr|bs|rank|"
        rf"shard|seed|fold|stage|phase|run|[dtp]p|v|version)[-_]?{_VALUE}(?![A-Za-z\d])",
        r"\d+\.\d+(?![kK\d])(?:e[-+]?\d+)?|\d+e[-+]?\d+",
    )
]
_UNLABELLED = re.compile(r"(?:^|[^\d.])(\d+(?:\.\d+(?=[kK]))?)([kK]?)$")
_SERIES = re.compile(r"(?<![A-Za-z])(?i:stage|phase|fold|seed|run|ingredient)[-_=]?\d+")
"""Parts that tell apart several runs, or parts of a run, in one folder."""

_NEVER = re.compile(
    r"^\.|\d-of-\d|"
    r"(?<![A-Za-z])(?i:tmp|temp|partial|incomplete|rewound|old|bak|backup|copy)(?![A-Za-z])"
)
"""Hidden, unfinished and discarded checkpoints, and shards."""

_COMPANION = re.compile(
    r"(?<![A-Za-z])(?i:optim(?:izer)?s?|sched(?:uler)?s?|rng|scaler|best|last|latest|final)"
    r"(?![A-Za-z])"
)
"""Optimizer states, and copies of another checkpoint, next to a series."""


class StepName(NamedTuple):
    """The step that a name contains."""

    step: int
    """Training steps, or epochs if the name labels them so."""
    series: str
    """Equal for names that count the same thing."""

    @property
    def is_epoch(self) -> bool:
        """Return whether the step is a number of epochs."""
        return self.series.startswith(_EPOCH)


def parse_step(name: str) -> StepName | None:
    """Return the step in a name without its suffix, or None."""
    if _NEVER.search(name):
        return None
    parts = "".join(f" of {part.lower()}" for part in _SERIES.findall(name))
    for label, pattern in _LABELLED.items():
        for match in pattern.finditer(name):
            step = _integer(*match.groups())
            if step is not None and not _OTHER_STEPS.search(name[: match.start()]):
                return StepName(step, (_EPOCH if label == "epoch" else "step") + parts)
    for pattern in _IGNORED:
        name = pattern.sub("", name)
    name = name.rstrip("-_. ")
    number = _UNLABELLED.search(name)
    step = _integer(*number.groups()) if number else None
    if number is None or step is None:
        return None
    before = re.sub(r"\d+", "#", name[: number.start(1)].lower())
    return StepName(step, f"{before}#{parts}")


def parse_series(names: Iterable[str]) -> dict[str, StepName]:
    """Return the step of each name that has one, without optimizer states, `best` and `last`.

    If only such names have a step, return theirs.
    """
    found = {name: step for name in names if (step := parse_step(name)) is not None}
    return {n: step for n, step in found.items() if not _COMPANION.search(n)} or found


def _integer(digits: str, suffix: str) -> int | None:
    value = Fraction(digits) * {"": 1, "k": 1000, "K": 1000, "M": 1_000_000}[suffix]
    return int(value) if value.denominator == 1 else None
