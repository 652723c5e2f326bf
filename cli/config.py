"""`llmtrain config`: check, complete and compare configurations."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from .common import JsonFlag, SetOption, console, print_json, print_text

if TYPE_CHECKING:
    from llmtrain.config.schema import RunConfig


def config(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A YAML file or a run folder.")],
    settings: SetOption = None,
    diff: Annotated[
        Path | None,
        typer.Option(metavar="OTHER", help="Show only differences to this file or run."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check a configuration and print it with --set and all defaults applied.

    The output is a configuration with the same meaning. The exit code is 2 if a key is invalid.
    """
    from llmtrain.config.loading import dump_config

    resolved = _load(file, settings or [])
    if diff is not None:
        _print_differences(resolved, _load(diff, []), (str(file), str(diff)), as_json=as_json)
    elif as_json:
        print_json(resolved.model_dump(mode="json"))
    else:
        print_text(dump_config(resolved), end="")


def _load(path: Path, settings: list[str]) -> "RunConfig":
    from llmtrain.config.loading import load_config
    from llmtrain.storage.run_folder import require_run

    return load_config(require_run(path).config if path.is_dir() else path, settings)


def _print_differences(
    here: "RunConfig", other: "RunConfig", names: tuple[str, str], *, as_json: bool
) -> None:
    from llmtrain.config.schema import flatten

    one, two = flatten(here), flatten(other)
    pairs = {key: (one.get(key), two.get(key)) for key in one | two}
    changed = {key: values for key, values in pairs.items() if values[0] != values[1]}
    if as_json:
        print_json({key: {"here": a, "other": b} for key, (a, b) in changed.items()})
    elif not changed:
        console.print(f"{names[0]} and {names[1]} are equivalent")
    else:
        table = Table("key", *names, box=box.SIMPLE)
        for key, values in changed.items():
            table.add_row(key, *("" if v is None else str(v) for v in values))
        console.print(table)
