"""Windows over a public series: averaged, evaluated and deleted one by one, so that one machine's disk is enough.

Why one by one: what a window reads of a 12B series is 24 GB a checkpoint. With `--discard-inputs` the disk holds a
sum, one input and one average; the price is that windows download what they share again.

    for window in windows(["EleutherAI/pythia-1b-deduped"], (36_000,), (5,), (1000,)): measure(window, …)
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reproduction.execute import Job, failure, run
from reproduction.statistics import Estimate

SERIES = tuple(
    f"EleutherAI/pythia-{size}-deduped" for size in ("1b", "1.4b", "2.8b", "6.9b", "12b")
)
STEPS = (36_000, 71_000, 107_000, 143_000)
"""Quarters of the series, at steps that were published."""
SIZES = (3, 5, 10)
SPACINGS = (1000, 2000, 3000)


@dataclass(frozen=True)
class Window:
    """The checkpoints of one average; of size 1: the raw weights."""

    series: str
    step: int
    size: int
    every: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.series.rpartition('/')[2]}-{self.step}-{self.size}x{self.every}"


@dataclass(frozen=True)
class Measured:
    """What a window came to."""

    window: Window
    loss: float | None
    """Nats per token, of whatever tokens the model has."""
    bits_per_byte: float | None
    refused: str | None
    """Why there is no average of it: revisions that are not what they claim, say."""


def windows(
    series: Sequence[str], steps: Sequence[int], sizes: Sequence[int], spacings: Sequence[int]
) -> Iterator[Window]:
    """Of each series at each step the raw weights, and every size with every spacing."""
    for name in series:
        for step in steps:
            yield Window(name, step, 1, spacings[0])
            for size in sizes:
                for every in spacings:
                    yield Window(name, step, size, every)


def measure(window: Window, root: Path, options: Sequence[str], keep_inputs: bool) -> None:
    """Average and evaluate a window, unless that was done, and delete the average.

    Args:
        window: of which series.
        root: where measurements are kept, and an average lies for a while.
        options: further words for `llmtrain eval`: the data.
        keep_inputs: leave downloads in the hub's cache, for windows that share them.
    """
    folder, output = root / window.name, root / f"{window.name}.json"
    words = ["average", window.series, "--every", str(window.every), "--window", str(window.size)]
    words += [
        "--at",
        str(window.step),
        "--out",
        str(folder),
        *([] if keep_inputs else ["--discard-inputs"]),
    ]
    if not output.exists():
        run([Job(window.name, tuple(words), refusable=True)], root, 1)
        if failure(root, window.name) is None:
            run(
                [
                    Job(
                        f"{window.name}-eval",
                        ("eval", str(folder), *options, "--json"),
                        output=output,
                    )
                ],
                root,
                1,
            )
    if folder.exists():
        shutil.rmtree(folder)


def read(window: Window, root: Path) -> Measured | None:
    """What was measured; None: nothing yet."""
    output = root / f"{window.name}.json"
    if not output.exists():
        refused = failure(root, window.name)
        return None if refused is None else Measured(window, None, None, refused)
    (row,) = json.loads(output.read_text())
    return Measured(window, row["loss"], row["bits_per_byte"], None)


def write(measured: Sequence[Measured], made: dict[str, Any], path: Path) -> None:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"made": made, "windows": [asdict(each) for each in measured]}, indent=1) + "\n"
    )


@dataclass(frozen=True)
class Series:
    """All windows of one series."""

    name: str
    measured: dict[Window, Measured]

    @property
    def steps(self) -> list[int]:
        """At which it was measured."""
        return sorted({window.step for window in self.measured})

    @property
    def sizes(self) -> list[int]:
        """Of the windows, but for the raw weights."""
        return sorted({window.size for window in self.measured} - {1})

    @property
    def spacings(self) -> list[int]:
        """Of the windows."""
        return sorted({window.every for window in self.measured})

    def change(self, step: int, size: int, every: int) -> Estimate | None:
        """Bits per byte of the average minus those of the raw weights of that step."""
        raw = self.measured.get(Window(self.name, step, 1, self.spacings[0]))
        ours = self.measured.get(Window(self.name, step, size, every))
        if raw is None or ours is None or raw.bits_per_byte is None or ours.bits_per_byte is None:
            return None
        return Estimate(ours.bits_per_byte - raw.bits_per_byte, None, 1)


def read_all(path: Path) -> tuple[dict[str, Any], list[Series]]:
    """What `write` wrote: how it was made, and each series."""
    document = json.loads(path.read_text())
    found = [
        Measured(**each | {"window": Window(**each["window"])}) for each in document["windows"]
    ]
    names = dict.fromkeys(each.window.series for each in found)
    return document["made"], [
        Series(n, {e.window: e for e in found if e.window.series == n}) for n in names
    ]
