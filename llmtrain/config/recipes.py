"""The configurations that come with the package, so that an installed one needs no checkout.

Why two places: a wheel has them inside the package, a checkout (whose package is installed as it lies
there) beside it.

    for recipe in recipes(): print(recipe.name, recipe.summary)
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.storage.commit import write_atomically

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


@dataclass(frozen=True)
class Recipe:
    """One configuration."""

    name: str
    path: Path

    @property
    def text(self) -> str:
        """The whole file, its header with command, hardware and expected loss included."""
        return self.path.read_text(encoding="utf-8")

    @property
    def summary(self) -> str:
        """The first line of its header."""
        return self.text.partition("\n")[0].removeprefix("#").strip()


def recipes() -> list[Recipe]:
    """All of them, by name."""
    folder = next(folder for folder in _FOLDERS if folder.is_dir())
    return sorted(
        (Recipe(path.stem, path) for path in folder.glob("*.yaml")), key=lambda each: each.name
    )


def recipe(name: str) -> Recipe:
    """The one called `name`.

    Raises:
        UserError: there is none.
    """
    known = {each.name: each for each in recipes()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise UserError(
            f"there is no recipe {name!r}" + (f"; did you mean {near[0]}?" if near else ""),
            hint=f"there are {', '.join(known)}",
        )
    return known[name]


def copy_recipe(name: str, to: Path) -> None:
    """Write a recipe to a new file.

    Raises:
        UserError: there is none of that name, or the file exists.
        WriteFailed: the disk is full or cannot be written to.
    """
    found = recipe(name)
    if to.exists():
        raise UserError(f"{to} exists already", hint="name a new file: --to FILE")
    write_atomically(to, found.text)
