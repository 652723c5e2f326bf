"""Find the committed folders below a path and check every byte of them."""

from dataclasses import dataclass
from pathlib import Path

from llmtrain.data.manifest import MANIFEST_FILE, read_manifest
from llmtrain.data.shards import shard_problem
from llmtrain.errors import UserError
from llmtrain.storage import commit, integrity, run_folder


@dataclass(frozen=True)
class FolderCheck:
    """Size and problems of one committed folder."""

    folder: Path
    files: int
    bytes: int
    problems: list[str]


def verify_below(path: Path) -> list[FolderCheck]:
    """Check every committed folder at or below `path`, sorted; skip unfinished work (`.tmp-…`)."""
    if not path.is_dir():
        hint = "name a data folder, a weights folder, or a run"
        raise UserError(f"{path} is not a directory", hint=hint)
    records = (MANIFEST_FILE, integrity.INTEGRITY_FILE)
    found = {record.parent for name in records for record in path.rglob(name)}
    # Include step folders without a record: a missing record is damage as well.
    parents = [path, *(each for each in path.rglob("*") if each.is_dir())]
    found.update(step for parent in parents for step in run_folder.step_folders(parent).values())
    prefix = f"/{commit.TEMPORARY_PREFIX}"
    folders = sorted(each for each in found if prefix not in f"/{each.relative_to(path)}")
    if not folders:
        raise UserError(
            f"no hashes are recorded at or below {path} ({' or '.join(records)})",
            hint="verify folders that llmtrain wrote; nanoGPT's folders contain no hashes",
        )
    return [_check(folder) for folder in folders]


def _check(folder: Path) -> FolderCheck:
    try:
        if (folder / MANIFEST_FILE).is_file():
            problems = data_problems(folder)
        else:
            problems = integrity.integrity_problems(folder)
    except (UserError, OSError) as error:
        problems = [str(error)]
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return FolderCheck(folder, len(sizes), sum(sizes), problems)


def data_problems(folder: Path) -> list[str]:
    """Read every shard of a data folder and return all problems."""
    manifest = read_manifest(folder)
    found = (
        shard_problem(folder, each) or each.hash_problem(folder / each.name)
        for each in manifest.shards
    )
    listed = {shard.name for shard in manifest.shards}
    unlisted = (path for path in sorted(folder.glob("*.bin")) if path.name not in listed)
    return [*filter(None, found), *(f"{path} is not in the manifest" for path in unlisted)]
