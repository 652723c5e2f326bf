"""What an average says about itself: method, weights, and for each input what and where it was.

Why: an average without this is a file of numbers. With it, anyone can tell whether two averages are
the same, and make it again; and a command that is repeated keeps what is there.

    document = provenance(plan, checkpoints, hashes, MergeOptions())
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain import __version__
from llmtrain.checkpoints.checkpoint import PROVENANCE_FILE, Checkpoint
from llmtrain.checkpoints.series import Input
from llmtrain.errors import UserError
from llmtrain.storage.integrity import integrity_problems, sha256_of
from llmtrain.storage.json_files import read_json

if TYPE_CHECKING:
    from llmtrain.averaging.spec import AverageSpec, MergeOptions

Hashes = Mapping[str, str]
"""File name → SHA-256."""


@dataclass(frozen=True)
class KnownHashes:
    """The hashes of one input's weights files."""

    files: Hashes
    source: str
    """`recorded` when the files were committed (their sizes agree), or `computed` now."""

    @property
    def sha256(self) -> str:
        """Of the file; of several, that of the lines `<sha256>  <name>` in the order of names."""
        if len(self.files) == 1:
            return next(iter(self.files.values()))
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def input_hashes(
    checkpoints: Mapping[Input, Checkpoint],
    *,
    compute: bool,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Input, KnownHashes]:
    """The hashes of every input's weights files.

    Args:
        checkpoints: the opened inputs.
        compute: hash the files even where hashes are declared, and compare.
        progress: called with inputs done and in all; may raise to stop.

    Raises:
        UserError: a file is not what was declared.
    """
    found: dict[Input, KnownHashes] = {}
    with ThreadPoolExecutor(2) as pool:  # hashing leaves the interpreter's lock to others
        known = pool.map(lambda item: hashes_of(*item, compute=compute), checkpoints.items())
        try:
            for source, hashes in zip(checkpoints, known, strict=True):
                found[source] = hashes
                if progress is not None:
                    progress(len(found), len(checkpoints))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def hashes_of(
    source: Input, checkpoint: Checkpoint, *, compute: bool, known: Mapping[Path, str] | None = None
) -> KnownHashes:
    """The hashes of one input's weights files; see `input_hashes`.

    Computing them, the small files beside the weights, which an average takes over, are compared too.
    Those in `known` were computed a moment ago, when the file was read.
    """
    declared = source.declared()
    if not compute and all(path.name in declared for path in checkpoint.files):
        return KnownHashes(
            {path.name: declared[path.name] for path in checkpoint.files}, "recorded"
        )
    beside = [
        checkpoint.folder / name for name in declared if name.endswith((".json", ".txt", ".model"))
    ]
    computed = {
        path: (known or {}).get(path) or sha256_of(path)
        for path in {*checkpoint.files, *(path for path in beside if path.is_file())}
    }
    for path, digest in computed.items():
        if declared.get(path.name, digest) != digest:
            raise UserError(
                f"{path} has another SHA-256 than when it was written",
                hint="the file is damaged: restore it, or average a window without this step",
            )
    return KnownHashes({path.name: computed[path] for path in checkpoint.files}, "computed")


def provenance(
    plan: AverageSpec,
    checkpoints: Mapping[Input, Checkpoint],
    hashes: Mapping[Input, KnownHashes],
    settings: MergeOptions,
) -> dict[str, Any]:
    """What `provenance.json` says of an average."""
    inputs = []
    for source, weight in zip(plan.inputs, plan.weights, strict=True):
        origin, known = checkpoints[source].origin, hashes[source]
        entry: dict[str, Any] = {
            "path": checkpoints[source].location,
            "step": source.step,
            "weight": weight,
            "lr": origin.lr if origin else None,
            "tokens": origin.tokens if origin else None,
            "sha256": known.sha256,
            "sha256_source": known.source,
        }
        if len(known.files) > 1:
            entry["files"] = dict(known.files)
        inputs.append(entry)
    sums = "float64 sums, rounded once"
    return {
        "llmtrain": __version__,
        "method": plan.method,
        "label": plan.label,
        "step": plan.step,
        "options": plan.options,
        "arithmetic": sums if plan.decays is None else "float32 recursion, as online",
        "dtype": settings.dtype or "as the inputs",
        "max_shard_bytes": settings.max_shard,
        "integers": settings.integers,
        "inputs": inputs,
    }


def require_same(target: Path, wanted: Mapping[str, Any]) -> None:
    """Raise a UserError unless the folder that exists is the average that is wanted."""
    path = target / PROVENANCE_FILE
    there = read_json(path) if path.exists() else {}
    try:
        same = _essence(there) == _essence(wanted) and all(
            math.isclose(a["weight"], b["weight"], rel_tol=1e-9, abs_tol=1e-15)
            for a, b in zip(there["inputs"], wanted["inputs"], strict=True)
        )
    except (
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
    ):  # no provenance that llmtrain wrote
        same = False
    if same and (problems := integrity_problems(target, hashes=False)):
        raise UserError(
            f"{target} exists and is damaged: {problems[0]}",
            hint="delete it and repeat the command",
        )
    if not same:
        raise UserError(
            f"{target} exists and is not the average of these checkpoints with these weights",
            hint="--label NAME or --out DIR writes beside it" + ("; or delete it" if there else ""),
        )


def _essence(document: Mapping[str, Any]) -> list[object]:
    """What decides the numbers of an average, but for the weights of its inputs."""
    return [
        document.get("arithmetic"),
        document.get("dtype"),
        document.get("max_shard_bytes"),
        document.get("integers", "equal"),
        [(i.get("step"), i.get("sha256")) for i in document.get("inputs") or []],
    ]
