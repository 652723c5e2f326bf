"""Which files on this machine a SOURCE means: a file, a folder or a glob.

Why a rule of our own: the order of the files is the order of the documents, so it must be the same
everywhere; and a file that is skipped is named.

    paths, skipped = find_files("corpus/")
"""

import glob
from pathlib import Path

from llmtrain.data.readers import KINDS, kind_of
from llmtrain.errors import UserError


def find_files(source: str) -> tuple[list[Path], list[Path]]:
    """The files that a path, a folder or a glob means, in order, and those of a folder that are skipped.

    A folder is walked and sorted by path; hidden files are left out, and files of another kind are
    the second list. A file that is named, or matched by a glob, must be of a known kind.

    Raises:
        UserError: nothing is there, or a file's kind is not known.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(
            p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))
        )
        known = [p for p in found if kind_of(p.name)]
        if not known:
            raise UserError(
                f"{source} holds no file of a known kind ({', '.join(KINDS)})",
                hint="name a folder with text in one of these kinds",
            )
        return known, [p for p in found if not kind_of(p.name)]
    if path.is_file():
        paths = [path]
    else:
        # Path.glob knows no absolute pattern.
        matches = (Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207  (takes absolute patterns)
        paths = sorted(match for match in matches if match.is_file())
    if not paths:
        raise UserError(
            f"{source} matches no file"
            if glob.has_magic(source)
            else f"{source}: no such file or folder",
            hint="SOURCE is a file, a folder, a glob in quotes, openwebtext, hub:NAME[:CONFIG] or sotu",
        )
    for each in paths:
        if not kind_of(each.name):
            raise UserError(f"{each} is of an unknown kind", hint=f"known are {', '.join(KINDS)}")
    return paths, []


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)
