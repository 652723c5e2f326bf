"""The configurations in `configs/`, which are part of the installed package.

for recipe in list_recipes(): print(recipe.name, recipe.summary)
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.storage.commit import write_atomically

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
"""Folders in a wheel and in a checkout."""


@dataclass(frozen=True)
class Recipe:
    """An included configuration."""

    name: str
    path: Path

    @property
    def text(self) -> str:
        """Content of the file, whose header has commands, hardware and expected loss."""
        return self.path.read_text(encoding="utf-8")

    @property
    def summary(self) -> str:
        """First line of the header."""
        return self.text.partition("\n")[0].removeprefix("#").strip()


def list_recipes() -> list[Recipe]:
    """Return all recipes, sorted by name."""
    folder = next(folder for folder in _FOLDERS if folder.is_dir())
    return [Recipe(path.stem, path) for path in sorted(folder.glob("*.yaml"), key=lambda p: p.stem)]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the suggestion of the most similar known word, or an empty string."""
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def find_recipe(name: str) -> Recipe:
    """Return the recipe `name`, or raise a UserError."""
    known = {recipe.name: recipe for recipe in list_recipes()}
    if name not in known:
        raise UserError(
            f"unknown recipe {name!r}{did_you_mean(name, known)}",
            hint=f"choose one of {', '.join(known)}",
        )
    return known[name]


def copy_recipe(name: str, to: Path) -> None:
    """Copy a recipe to the new file `to`; raise a UserError if it exists."""
    recipe = find_recipe(name)
    if to.exists():
        raise UserError(f"{to} already exists", hint="choose a new file: --to FILE")
    write_atomically(to, recipe.text)
