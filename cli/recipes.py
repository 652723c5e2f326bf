"""`llmtrain recipes`: list, print and copy the included configurations."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
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

    The header of each one has the commands, the hardware, the expected loss and the source.
    """
    from llmtrain.config.recipes import copy_recipe, find_recipe
    from llmtrain.errors import UserError

    if name is None and to is not None:
        raise UserError("--to needs the NAME of a recipe", hint="list them: llmtrain recipes")
    if name is not None and as_json:
        raise UserError("--json applies to the list only", hint="omit NAME or --json")
    if name is None:
        _print_list(as_json)
    elif to is None:
        typer.echo(find_recipe(name).text, nl=False)
    else:
        copy_recipe(name, to)
        command = f"llmtrain pretrain --config {shlex.quote(str(to))}"
        console.print(f"wrote {to}. Next: {command}", markup=False)


def _print_list(as_json: bool) -> None:
    from llmtrain.config.recipes import list_recipes

    found = list_recipes()
    if as_json:
        print_json([{"name": r.name, "summary": r.summary, "path": str(r.path)} for r in found])
        return
    name = Column("recipe", no_wrap=True)
    table = Table(name, "what it trains", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for recipe in found:
        table.add_row(escape(recipe.name), escape(recipe.summary))
    console.print(table)
    console.print("copy one: llmtrain recipes NAME --to FILE", markup=False)
