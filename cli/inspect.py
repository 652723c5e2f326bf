"""`llmtrain inspect`: describe checkpoints without loading a model."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .common import JsonFlag, ProgressLine, console, print_json, warn

if TYPE_CHECKING:
    from llmtrain.averaging.inspection import Facts, TensorFacts


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
        bool, typer.Option("--verify", help="No effect: hashes are always recomputed.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show steps, tensors, parameters, dtypes, hashes, norms and provenance of checkpoints.

    The norm is that of all float tensors together; the distance is from the previous checkpoint.
    """
    from llmtrain.averaging.inspection import inspect_path

    with ProgressLine("reading") as line:
        found = [facts for path in paths for facts in inspect_path(path, progress=line.update)]
    if as_json:
        counts = [{} if tensors else {"tensors": len(facts.tensors)} for facts in found]
        print_json([asdict(facts) | count for facts, count in zip(found, counts, strict=True)])
        return
    columns = "step tensors parameters dtypes norm distance hash path"
    _print_table(None, columns, [_row(facts) for facts in found])
    if zeros := max((facts.zero_biases for facts in found), default=0):
        note = "zero biases that the Hugging Face layout adds are not counted as parameters"
        console.print(f"{zeros:,} {note}", markup=False)
    for facts in found:
        if facts.provenance is not None:
            _print_inputs(facts.path, facts.provenance)
        if tensors:
            rows = [_tensor_row(tensor) for tensor in facts.tensors]
            _print_table(facts.path, "tensor dtype shape norm distance", rows)
        for problem in facts.problems:
            warn(problem)


def _row(facts: "Facts") -> tuple[str, ...]:
    return (
        "" if facts.step is None else f"{facts.step:,}",
        f"{len(facts.tensors):,}",
        f"{facts.parameters:,}",
        " ".join(f"{dtype}:{count}" for dtype, count in facts.dtypes.items()),
        _number(facts.norm, 6) or "n/a",
        _number(facts.distance, 4),
        (facts.blake3 or facts.sha256 or "")[:12],
        facts.path,
    )


def _tensor_row(tensor: "TensorFacts") -> tuple[str, ...]:
    shape = " × ".join(map(str, tensor.shape)) or "scalar"
    measures = _number(tensor.norm, 6), _number(tensor.distance, 4)
    return tensor.name, tensor.dtype, shape, *measures


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _print_inputs(path: str, provenance: dict[str, Any]) -> None:
    console.print(f"{path}: {provenance.get('method', 'unknown')}")
    for source in provenance.get("inputs", []):
        if isinstance(source, dict):
            line = f"  {source.get('weight')} × {source.get('path')}"
            digest = str(source.get("blake3") or source.get("sha256") or "")
            console.print(f"{line} ({digest[:12]})")


def _print_table(title: str | None, columns: str, rows: list[tuple[str, ...]]) -> None:
    table = Table(*columns.split(), box=None, header_style="bold", title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
