"""`llmtrain recipes`: the configurations that come with the package.

llmtrain recipes gpt2-small --to gpt2-small.yaml
"""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Column, Table

from .common import console, print_json


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Which one to print or copy.", show_default="list them all")
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Copy it to this new file.", show_default="print it"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the list as JSON and nothing else.")
    ] = False,
) -> None:
    """List the configurations that come with llmtrain, print one, or copy one to a file of your own.

    The header of each says the command, the hardware, the loss to expect and its source.
    """
    from llmtrain.config import recipes as library
    from llmtrain.errors import UserError

    if name is None:
        if to is not None:
            raise UserError(
                "--to copies one recipe, and none is named", hint="llmtrain recipes lists them"
            )
        found = library.list_recipes()
        if as_json:
            print_json(
                [
                    {"name": each.name, "summary": each.summary, "path": str(each.path)}
                    for each in found
                ]
            )
            return
        table = Table(
            Column("recipe", no_wrap=True), "what it trains", box=box.SIMPLE, padding=(0, 1, 0, 0)
        )
        for each in found:
            table.add_row(escape(each.name), escape(each.summary))
        console.print(table)
        console.print("llmtrain recipes NAME --to FILE copies one", markup=False)
    elif as_json:
        raise UserError(
            "--json goes with the list, not with one recipe", hint="leave out NAME or --json"
        )
    elif to is None:
        typer.echo(library.find_recipe(name).text, nl=False)
    else:
        library.copy_recipe(name, to)
        next_command = f"llmtrain pretrain --config {shlex.quote(str(to))}"
        console.print(f"{to}: written. Next: {next_command}", markup=False)
