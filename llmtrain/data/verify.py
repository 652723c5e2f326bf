"""Find every committed folder below a path and check every byte of it.

Why one function for all kinds: data folders record their hashes in a manifest, weights and states
in `integrity.json`, and whoever wonders about a disk wants both looked at.

    problems = [p for check in verify_below(Path("runs/demo")) for p in check.problems]
"""

from dataclasses import dataclass
from pathlib import Path

from llmtrain.data.manifest import MANIFEST_FILE
from llmtrain.data.shards import data_problems
from llmtrain.errors import UserError
from llmtrain.storage import commit, integrity, run_folder


@dataclass(frozen=True)
class Check:
    """What was found in one committed folder."""

    folder: Path
    files: int
    bytes: int
    problems: list[str]


def verify_below(path: Path) -> list[Check]:
    """Check every committed folder at or below `path`, in the order of their paths.

    Leftovers of interrupted work (`.tmp-…`) are not committed and not looked at.

    Raises:
        UserError: there is no such folder, or nothing below it records hashes.
    """
    if not path.is_dir():
        raise UserError(
            f"{path} is no folder", hint="name a data folder, a folder of weights, or a run"
        )
    found = {
        record.parent
        for name in (MANIFEST_FILE, integrity.INTEGRITY_FILE)
        for record in path.rglob(name)
    }
    # A committed step without its record is damage as well.
    parents = [path, *(each for each in path.rglob("*") if each.is_dir())]
    found.update(step for parent in parents for step in run_folder.step_folders(parent).values())
    folders = sorted(folder for folder in found if not _temporary(folder.relative_to(path)))
    if not folders:
        raise UserError(
            f"nothing at or below {path} records its hashes ({MANIFEST_FILE} or {integrity.INTEGRITY_FILE})",
            hint="only folders that llmtrain wrote can be verified, and nanoGPT's have no hashes",
        )
    return [_check(folder) for folder in folders]


def _check(folder: Path) -> Check:
    problems = []
    try:
        if (folder / MANIFEST_FILE).is_file():
            problems += data_problems(folder)
        else:
            problems += integrity.integrity_problems(folder)
    except UserError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{folder} cannot be read: {error}")
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return Check(folder, len(sizes), sum(sizes), problems)


def _temporary(relative: Path) -> bool:
    return any(part.startswith(commit.TEMPORARY_PREFIX) for part in relative.parts)
