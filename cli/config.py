"""`llmtrain config`: a configuration, checked and whole.

llmtrain config configs/gpt2-small.yaml --diff configs/gpt2-small-highlr.yaml
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .common import console, print_json

if TYPE_CHECKING:
    from llmtrain.config.schema import RunConfig


def config(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="YAML file, or the folder of a run.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.KEY=VALUE", help="Override a key of FILE; repeatable."
        ),
    ] = None,
    diff: Annotated[
        Path | None,
        typer.Option(
            metavar="OTHER",
            help="Show only what differs from this file or run.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Check a configuration and print all of it: the file, --set, and the defaults of what they leave out.

    What is printed is a configuration again, with the same meaning. Exit code 2 when something is wrong.
    """
    resolved = _load(file, settings or [])
    if diff is None:
        from llmtrain.config.loading import dump_config

        if as_json:
            print_json(resolved.model_dump(mode="json"))
        else:
            typer.echo(dump_config(resolved), nl=False)
        return
    differences = _differences(resolved, _load(diff, []))
    if as_json:
        print_json(
            {key: {"here": here, "other": other} for key, (here, other) in differences.items()}
        )
        return
    if not differences:
        console.print(f"{file} and {diff} mean the same", markup=False)
        return
    table = Table("key", escape(str(file)), escape(str(diff)), box=box.SIMPLE, padding=(0, 1, 0, 0))
    for key, values in differences.items():
        table.add_row(key, *(escape(_shown(value)) for value in values))
    console.print(table)


def _load(path: Path, settings: list[str]) -> "RunConfig":
    from llmtrain.config.loading import load_config
    from llmtrain.storage.run_folder import require_run

    return load_config(require_run(path).config if path.is_dir() else path, settings)


def _differences(here: "RunConfig", other: "RunConfig") -> dict[str, tuple[Any, Any]]:
    """Dotted key → its two values, in the order of the sections; None where a key is not there."""
    from llmtrain.config.schema import flatten

    one, two = flatten(here), flatten(other)
    return {
        key: (one.get(key), two.get(key)) for key in {**one, **two} if one.get(key) != two.get(key)
    }


def _shown(value: Any) -> str:
    return "" if value is None else str(value)
