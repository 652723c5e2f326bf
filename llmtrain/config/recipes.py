"""The configurations in `configs/`, which are part of the installed package."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.storage.commit import write_atomically


def list_recipes() -> dict[str, Path]:
    """Return the files of all recipes by name, sorted."""
    package = Path(__file__).parents[1]  # in a checkout, configs/ is next to the package
    files = [*package.glob("configs/*.yaml")] or package.parent.glob("configs/*.yaml")
    return {path.stem: path for path in sorted(files, key=lambda path: path.stem)}


def summary(recipe: Path) -> str:
    """Return the first line of a recipe's header."""
    return recipe.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the suggestion of the most similar known word, or an empty string."""
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def read_recipe(name: str) -> str:
    """Return the text of the recipe `name`, or raise a UserError."""
    recipes = list_recipes()
    if name not in recipes:
        hint = f"choose one of {', '.join(recipes)}"
        raise UserError(f"unknown recipe {name!r}{did_you_mean(name, recipes)}", hint=hint)
    return recipes[name].read_text(encoding="utf-8")


def copy_recipe(name: str, to: Path) -> None:
    """Copy a recipe to the new file `to`; raise a UserError if it exists."""
    text = read_recipe(name)
    if to.exists():
        raise UserError(f"{to} already exists", hint="choose a new file: --to FILE")
    write_atomically(to, text)
