"""`llmtrain inspect`: what lies in checkpoints, without loading a model.

llmtrain inspect runs/demo
"""

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
        bool, typer.Option("--tensors", help="Each tensor: dtype, shape, norm, distance.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash again what was hashed when it was written.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Show steps, tensors, parameters, dtypes, SHA-256, norms, distances and provenance of checkpoints.

    The norm is that of all float tensors together; the distance is from the checkpoint before.
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
        print_json(
            [
                asdict(facts) if tensors else asdict(facts) | {"tensors": len(facts.tensors)}
                for facts in found
            ]
        )
        return
    _print(found, tensors)


def _print(found: "list[Facts]", tensors: bool) -> None:
    from rich.table import Table

    from .common import console, warn

    table = Table(
        "step", "tensors", "parameters", "dtypes", "norm", "distance", "sha256", "path",
        box=None, header_style="bold",
    )  # fmt: skip  # one line of column names
    for facts in found:
        table.add_row(
            f"{facts.step:,}",
            f"{len(facts.tensors):,}",
            f"{facts.parameters:,}",
            " ".join(f"{dtype}:{count}" for dtype, count in facts.dtypes.items()),
            "n/a" if facts.norm is None else f"{facts.norm:.6g}",
            "" if facts.distance is None else f"{facts.distance:.4g}",
            facts.sha256[:12],
            facts.path,
        )
    console.print(table)
    for facts in found:
        if facts.provenance is not None:
            _print_provenance(facts)
        if tensors:
            _print_tensors(facts)
        for problem in facts.problems:
            warn(problem)


def _print_provenance(facts: "Facts") -> None:
    from .common import console

    about = facts.provenance or {}
    console.print(f"{facts.path}: {about.get('method', 'unknown')}", markup=False)
    for source in about.get("inputs", []):
        if isinstance(source, dict):
            console.print(
                f"  {source.get('weight')} × {source.get('path')} ({source.get('sha256', '')[:12]})",
                markup=False,
            )


def _print_tensors(facts: "Facts") -> None:
    from rich.table import Table

    from .common import console

    table = Table(
        "tensor",
        "dtype",
        "shape",
        "norm",
        "distance",
        box=None,
        header_style="bold",
        title=facts.path,
    )
    for tensor in facts.tensors:
        table.add_row(
            tensor.name,
            tensor.dtype,
            " × ".join(map(str, tensor.shape)) or "scalar",
            "" if tensor.norm is None else f"{tensor.norm:.6g}",
            "" if tensor.distance is None else f"{tensor.distance:.4g}",
        )
    console.print(table)
