"""Average, evaluate and delete windows over a public series one by one, to fit one disk.

A checkpoint of a 12B series has 24 GB. With `--discard-inputs` the disk holds a sum, one input and
one average. The price: shared inputs of two windows are downloaded twice.

    for window in windows(["EleutherAI/pythia-1b-deduped"], (36_000,), (5,), (1000,)):
        measure(window, ...)
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
"""Published steps near the quarters of the series."""
SIZES = (3, 5, 10)
SPACINGS = (1000, 2000, 3000)


@dataclass(frozen=True)
class Window:
    """The checkpoints of one average; size 1 is the raw weights."""

    series: str
    step: int
    size: int
    every: int

    @property
    def name(self) -> str:
        """Stem of its files."""
        return f"{self.series.rpartition('/')[2]}-{self.step}-{self.size}x{self.every}"


@dataclass(frozen=True)
class Measured:
    """The result of a window."""

    window: Window
    loss: float | None
    """Nats per token of the model's own tokenizer."""
    bits_per_byte: float | None
    refused: str | None
    """The reason for a missing average, such as a revision with wrong weights."""


def windows(
    series: Sequence[str], steps: Sequence[int], sizes: Sequence[int], spacings: Sequence[int]
) -> Iterator[Window]:
    """Return the raw weights and every size and spacing at each step of each series."""
    for name in series:
        for step in steps:
            yield Window(name, step, 1, spacings[0])
            for size in sizes:
                for every in spacings:
                    yield Window(name, step, size, every)


def measure(window: Window, root: Path, options: Sequence[str], keep_inputs: bool) -> None:
    """Average and evaluate a window unless its result exists, then delete the average.

    Args:
        window: the window.
        root: folder of the measurements and, temporarily, of the average.
        options: further arguments of `llmtrain eval`, such as the data.
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
    """Return the stored result, or None."""
    output = root / f"{window.name}.json"
    if not output.exists():
        refused = failure(root, window.name)
        return None if refused is None else Measured(window, None, None, refused)
    (row,) = json.loads(output.read_text())
    return Measured(window, row["loss"], row["bits_per_byte"], None)


def write(measured: Sequence[Measured], made: dict[str, Any], path: Path) -> None:
    """Write the result as JSON."""
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
        """Steps of the measurements."""
        return sorted({window.step for window in self.measured})

    @property
    def sizes(self) -> list[int]:
        """Window sizes, without 1."""
        return sorted({window.size for window in self.measured} - {1})

    @property
    def spacings(self) -> list[int]:
        """Window spacings."""
        return sorted({window.every for window in self.measured})

    def change(self, step: int, size: int, every: int) -> Estimate | None:
        """Return the average's bits per byte minus those of the raw weights at that step."""
        raw = self.measured.get(Window(self.name, step, 1, self.spacings[0]))
        ours = self.measured.get(Window(self.name, step, size, every))
        if raw is None or ours is None or raw.bits_per_byte is None or ours.bits_per_byte is None:
            return None
        return Estimate(ours.bits_per_byte - raw.bits_per_byte, None, 1)


def read_all(path: Path) -> tuple[dict[str, Any], list[Series]]:
    """Read the output of `write`: its origin and each series."""
    document = json.loads(path.read_text())
    found = [
        Measured(**each | {"window": Window(**each["window"])}) for each in document["windows"]
    ]
    names = dict.fromkeys(each.window.series for each in found)
    return document["made"], [
        Series(n, {e.window: e for e in found if e.window.series == n}) for n in names
    ]
