"""`llmtrain inspect`: describe checkpoints without loading a model."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llmtrain.averaging.inspection import Facts


def inspect(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH", help="Runs, folders of checkpoints, folders or files of weights."
        ),
    ],
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Show dtype, shape, norm and distance per tensor.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Recompute the hashes recorded on writing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Show steps, tensors, parameters, dtypes, SHA-256, norms and provenance of checkpoints.

    The norm is that of all float tensors together; the distance is from the previous checkpoint.
    """
    from llmtrain.averaging.inspection import inspect_path

    from .common import ProgressLine, print_json

    with ProgressLine("reading") as line:
        found = [
            facts
            for path in paths
            for facts in inspect_path(path, verify=verify, progress=line.update)
        ]
    if as_json:
        counts = [{} if tensors else {"tensors": len(facts.tensors)} for facts in found]
        print_json([asdict(facts) | count for facts, count in zip(found, counts, strict=True)])
    else:
        _print(found, tensors)


def _print(found: "list[Facts]", tensors: bool) -> None:
    from .common import console, warn

    columns = ("step", "tensors", "parameters", "dtypes", "norm", "distance", "sha256", "path")
    _print_table(
        None,
        columns,
        [
            (
                f"{facts.step:,}",
                f"{len(facts.tensors):,}",
                f"{facts.parameters:,}",
                " ".join(f"{dtype}:{count}" for dtype, count in facts.dtypes.items()),
                "n/a" if facts.norm is None else f"{facts.norm:.6g}",
                "" if facts.distance is None else f"{facts.distance:.4g}",
                facts.sha256[:12],
                facts.path,
            )
            for facts in found
        ],
    )
    for facts in found:
        if facts.provenance is not None:
            method = facts.provenance.get("method", "unknown")
            console.print(f"{facts.path}: {method}", markup=False)
            for source in facts.provenance.get("inputs", []):
                if isinstance(source, dict):
                    sha256 = source.get("sha256", "")[:12]
                    line = f"  {source.get('weight')} × {source.get('path')} ({sha256})"
                    console.print(line, markup=False)
        if tensors:
            _print_tensors(facts)
        for problem in facts.problems:
            warn(problem)


def _print_tensors(facts: "Facts") -> None:
    rows = [
        (
            tensor.name,
            tensor.dtype,
            " × ".join(map(str, tensor.shape)) or "scalar",
            "" if tensor.norm is None else f"{tensor.norm:.6g}",
            "" if tensor.distance is None else f"{tensor.distance:.4g}",
        )
        for tensor in facts.tensors
    ]
    _print_table(facts.path, ("tensor", "dtype", "shape", "norm", "distance"), rows)


def _print_table(
    title: str | None, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]
) -> None:
    from rich.table import Table

    from .common import console

    table = Table(*columns, box=None, header_style="bold", title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
