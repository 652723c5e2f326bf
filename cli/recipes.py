"""`llmtrain recipes`: list, print and copy the included configurations."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Column, Table

from .common import JsonFlag, console, print_json


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Recipe to print or copy.", show_default="list all")
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Copy it to this new file.", show_default="print it"),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the included configurations, print one, or copy one to a file.

    Each file's header states the commands, the hardware, the expected loss and the source.
    """
    from llmtrain.config.recipes import copy_recipe, read_recipe
    from llmtrain.errors import UserError

    if name is None:
        if to is not None:
            raise UserError("--to needs the NAME of a recipe", hint="list them: llmtrain recipes")
        _print_list(as_json)
    elif as_json:
        raise UserError("--json applies to the list only", hint="omit NAME or --json")
    elif to is None:
        typer.echo(read_recipe(name), nl=False)
    else:
        copy_recipe(name, to)
        command = f"llmtrain pretrain --config {shlex.quote(str(to))}"
        console.print(f"wrote {to}. Next: {command}")


def _print_list(as_json: bool) -> None:
    from llmtrain.config.recipes import list_recipes, summary

    recipes = list_recipes().items()
    found = [{"name": name, "summary": summary(path), "path": str(path)} for name, path in recipes]
    if as_json:
        print_json(found)
        return
    table = Table(Column("recipe", no_wrap=True), "what it trains", box=box.SIMPLE)
    for recipe in found:
        table.add_row(recipe["name"], recipe["summary"])
    console.print(table)
    console.print("copy one: llmtrain recipes NAME --to FILE")
