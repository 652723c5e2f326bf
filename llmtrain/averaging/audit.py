"""Checks of the inputs: digests, known-bad revisions and duplicates.

Some public series contain wrong weights, and an average of them loads without an error. The checks
are nearly free: they use recorded digests, and norms from the merge.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from llmtrain.averaging.merge import CHUNK, Norms, chunks
from llmtrain.averaging.request import MergeOptions
from llmtrain.averaging.trajectory import outliers
from llmtrain.checkpoints.checkpoint import WEIGHTS_SUFFIXES, Checkpoint
from llmtrain.checkpoints.series import Input, Series
from llmtrain.checkpoints.windows import describe_steps
from llmtrain.errors import UserError
from llmtrain.storage.integrity import Algorithm, Digest, combined_digest, digest_of

LARGE = 4096
"""Tensors with at least this many elements cannot match by chance."""

_SHOWN = 12


@dataclass(frozen=True)
class InputDigests:
    """Digests of the weights files of one input."""

    files: Mapping[str, Digest]
    source: str
    """`recorded` when the files were committed, or `computed` now."""

    @classmethod
    def declared(cls, source: Input) -> "InputDigests":
        """Return the recorded digests of an input without opening it; empty if there are none."""
        found = source.declared()
        return cls({n: d for n, d in found.items() if n.endswith(WEIGHTS_SUFFIXES)}, "recorded")

    @property
    def combined(self) -> Digest:
        """Digest of the input: see `combined_digest`."""
        return combined_digest(self.files)

    def as_json(self) -> dict[str, Any]:
        """Return the entries of a provenance file."""
        whole = self.combined
        entry: dict[str, Any] = {**whole.as_json(), f"{whole.algorithm}_source": self.source}
        if len(self.files) > 1:
            entry["files"] = {name: digest.hex for name, digest in self.files.items()}
        return entry


def input_digests(
    checkpoints: Mapping[Input, Checkpoint],
    progress: Callable[[int, int], None],
    algorithm: Algorithm = "blake3",
) -> dict[Input, InputDigests]:
    """Return `digests_of` every input; `progress` may raise to stop."""
    found: dict[Input, InputDigests] = {}
    pool = ThreadPoolExecutor(2)  # hashing releases the GIL
    try:
        known = pool.map(lambda each: digests_of(each, algorithm), checkpoints.values())
        for source, digests in zip(checkpoints, known, strict=True):
            found[source] = digests
            progress(len(found), len(checkpoints))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return found


def digests_of(checkpoint: Checkpoint, algorithm: Algorithm = "blake3") -> InputDigests:
    """Return the recorded digests of one input, which `merge` verifies, or compute them."""
    residual = checkpoint.residual.files if checkpoint.residual else ()
    paths = {path.name: path for path in (*checkpoint.files, *residual)}
    recorded = {name: checkpoint.recorded[name] for name in paths if name in checkpoint.recorded}
    if len(recorded) == len(paths):
        return InputDigests(recorded, "recorded")
    if recorded:  # the hub records SHA-256 of large files only
        algorithm = next(iter(recorded.values())).algorithm
    computed = {n: recorded.get(n) or digest_of(path, algorithm) for n, path in paths.items()}
    return InputDigests(computed, "computed")


def check_metadata(series: Series, inputs: Sequence[Input], options: MergeOptions) -> None:
    """Raise a UserError for known-bad revisions and for declared duplicates, before a download."""
    if not options.allow_known_bad:
        refuse_known_bad(series.repository, [source.step for source in inputs])
    declared = {source: InputDigests.declared(source) for source in inputs}
    check_digests(series, declared, options, compute=False)


def check_digests(
    series: Series,
    digests: Mapping[Input, InputDigests],
    options: MergeOptions,
    *,
    compute: bool = True,
) -> None:
    """Raise a UserError if a weights file is identical at two steps.

    If `compute`, also hash the finished model, unless it is on the hub.
    """
    if options.allow_duplicates:
        return
    final = None
    if series.final is not None:
        known = InputDigests.declared(series.final)
        if compute and not known.files and series.repository is None:
            algorithms = [known.combined.algorithm for known in digests.values()]
            known = digests_of(series.final.open(), *algorithms[:1])
        final = series.final.step, known.files
    refuse_duplicates({source.step: known.files for source, known in digests.items()}, final)


def check_norms(
    checkpoints: Sequence[Checkpoint], norms: Norms, options: MergeOptions, *, verified: bool
) -> list[str]:
    """Return one warning for each outlier; with `strict`, raise. Also reject duplicate tensors.

    `verified` snapshots of a run equal what training wrote, so only `strict` checks them for
    outliers.
    """
    if not options.allow_duplicates:
        refuse_duplicate_tensors(checkpoints, norms)
    if verified and not options.strict:
        return []
    lines = list(outliers(checkpoints, norms).values())
    if lines and options.strict:
        raise UserError(
            "\n  ".join(lines), hint="choose a window without it, or leave out --checks strict"
        )
    return lines


def known_bad(repository: str | None, steps: Sequence[int]) -> dict[int, str]:
    """Return the steps of a hub series with wrong weights, each with the defect and its source."""
    data = json.loads((files("llmtrain.averaging") / "known_bad.json").read_text())
    by_name = {name.lower(): entries for name, entries in data.items()}  # as on the hub
    bad: dict[int, str] = {}
    for entry in by_name.get((repository or "").lower(), []):
        for item in entry["steps"]:
            listed = range(item[0], item[1] + 1, item[2]) if isinstance(item, list) else [item]
            bad |= {step: f"{entry['what']} ({entry['issue']})" for step in listed if step in steps}
    return bad


def refuse_known_bad(repository: str | None, steps: Sequence[int]) -> None:
    """Raise a UserError if a step has known wrong weights."""
    if bad := known_bad(repository, steps):
        lines = "\n  ".join(f"step {step:,} {what}" for step, what in sorted(bad.items())[:_SHOWN])
        raise UserError(
            f"{repository} has revisions with known wrong weights:\n  {lines}",
            hint="choose a window without them, or add --checks allow-known-bad",
        )


def refuse_duplicates(
    digests: Mapping[int, Mapping[str, Digest]],
    final: tuple[int, Mapping[str, Digest]] | None = None,
) -> None:
    """Raise a UserError if a file, in `digests` by step and name, is the same at two steps.

    `final` is the last step and the files of the finished model, which no other step may contain.
    """
    holders: dict[Digest, dict[int, str]] = defaultdict(dict)
    for step, names in digests.items():
        for name, digest in names.items():
            holders[digest].setdefault(step, name)
    final_step, final_files = final or (0, {})
    final_names = {digest: name for name, digest in final_files.items()}
    found = []
    for digest, by_step in holders.items():
        steps, name = sorted(by_step), next(iter(by_step.values()))
        if len(steps) > 1:
            found.append(f"{name} is the same at steps {describe_steps(steps)}")
        early = [step for step in steps if step != final_step]
        if early and digest in final_names:
            same = f"{final_names[digest]} of the finished model"
            found.append(f"{name} at {describe_steps(early)} is {same}")
    _refuse(found)


def refuse_duplicate_tensors(checkpoints: Sequence[Checkpoint], norms: Norms) -> None:
    """Raise a UserError if a large tensor is bitwise identical at two steps.

    Equal float64 norms select candidates, which are then compared. Constant tensors, such as zero
    biases, do not count. A tensor that is identical in three or more inputs, and in all of them, is
    frozen or a buffer and does not count either.
    """
    specs = checkpoints[-1].tensors
    found = []
    for column, name in enumerate(norms.names):
        if specs[name].count < LARGE:
            continue
        rows: dict[float, list[int]] = defaultdict(list)
        for row, norm in enumerate(norms.norm[:, column]):
            rows[float(norm)].append(row)
        for first, *others in rows.values():
            same = [row for row in others if _equal(checkpoints[first], checkpoints[row], name)]
            steps = sorted({checkpoints[row].step for row in (first, *same)})
            frozen = 1 + len(same) == len(checkpoints) > 2
            if same and len(steps) > 1 and not frozen:
                found.append(f"{name} is the same at steps {describe_steps(steps)}")
    _refuse(found)


def _refuse(found: Sequence[str]) -> None:
    if found:
        more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise UserError(
            "different steps have the same content:\n  " + "\n  ".join(found[:_SHOWN]) + more,
            hint="choose a window without the wrong one, or add --checks allow-duplicates",
        )


def _equal(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Return whether a tensor has the same bits in both checkpoints and is not constant."""
    first, constant = None, True
    buffers = np.empty((2, CHUNK * 8), np.uint8)
    with ExitStack() as stack:
        readers = [stack.enter_context(checkpoint.reader()) for checkpoint in (one, other)]
        for chunk in chunks({name: one.tensors[name]}):
            a, b = (
                reader.read(name, chunk.start, chunk.stop, buffer)
                for reader, buffer in zip(readers, buffers, strict=True)
            )
            if not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
                return False
            first = a[0].copy() if first is None else first
            constant = constant and bool((a == first).all())
    return not constant
