"""Averages of a series, from the specs to the committed folders.

Phases: `audit.check_metadata`, open the inputs, `audit.check_digests`, then for each group of
averages `merge`, which verifies the inputs, `audit.check_norms` and commit.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtrain.averaging import audit
from llmtrain.averaging.merge import WeightedSum, merge
from llmtrain.averaging.request import Integers, MergeOptions
from llmtrain.averaging.spec import (
    Average,
    AverageSpec,
    algorithm_for,
    provenance,
    require_declared,
    require_same,
    unique_inputs,
    weighted_sums,
)
from llmtrain.checkpoints.checkpoint import PROVENANCE_FILE, Checkpoint
from llmtrain.checkpoints.safetensors_files import open_safetensors
from llmtrain.checkpoints.series import Input, Series, require_same_tensors
from llmtrain.checkpoints.tensors import FLOATS, TensorSpec
from llmtrain.checkpoints.writer import WeightsWriter, copy_companions, layout_bytes, output_layout
from llmtrain.errors import RunFailed, UserError
from llmtrain.storage.cache import file_identity
from llmtrain.storage.commit import remove_abandoned, remove_leftovers, staged_folder
from llmtrain.storage.disk import disk_errors, require_room
from llmtrain.storage.integrity import DamagedFile, write_integrity
from llmtrain.storage.json_files import write_json
from llmtrain.storage.locks import locked_folder
from llmtrain.storage.safe_files import reject_links

MAX_GROUP = 64
"""Averages in one merge. A kill loses at most one group; two groups share k - 1 inputs."""

MAX_GROUP_BYTES = 8 << 30
"""Disk space of the averages in one merge."""

Progress = Callable[[int, int], None]
_Identity = tuple[int, ...]
Documented = tuple[AverageSpec, dict[str, Any]]
"""A spec and the content of its provenance file."""


def average(
    series: Series,
    specs: Sequence[AverageSpec],
    options: MergeOptions | None = None,
    *,
    progress: Progress = lambda done, total: None,
    warn: Callable[[str], None] = lambda message: None,
) -> list[Average]:
    """Make the averages and commit each to its folder; keep those that exist with the same inputs.

    `progress` is called with the work done and the total of each phase, and may raise to stop.
    `specs` are ascending by step.

    Raises:
        UserError: an input is missing, damaged or unlike the others, fails a check, or a target
            contains something else.
        WriteFailed: the disk is full or not writable.
    """
    options = options or MergeOptions()
    for parent in {spec.target.parent for spec in specs if spec.is_default}:
        reject_links(parent.parents[1], parent)  # RUN/averages/LABEL
    for parent in {spec.target.parent for spec in specs}:
        remove_abandoned(parent)
    if options.discard_inputs and (len(specs) != 1 or options.strict):
        raise UserError(
            "--discard-inputs keeps one checkpoint on disk, so it makes one average without strict",
            hint="select an average with --at STEP and leave out --checks strict",
        )
    if not all(spec.audited for spec in specs):
        options = replace(options, allow_duplicates=True)
    inputs = unique_inputs(specs)
    audit.check_metadata(series, inputs, options)
    if options.discard_inputs:
        return [_average_in_turn(series, specs[0], options, progress, warn)]
    checkpoints = {}
    for done, source in enumerate(inputs):
        progress(done, len(inputs))
        checkpoints[source] = source.open()  # may download it
    require_same_tensors(list(checkpoints.values()))
    identities = {path: _identity(path) for each in checkpoints.values() for path in each.files}
    for note in dict.fromkeys(note for each in checkpoints.values() for note in each.notes):
        warn(note)
    digests = audit.input_digests(checkpoints, progress, algorithm_for(specs))
    audit.check_digests(series, digests, options)
    verify = options.verify or not series.trusted
    if verify:  # the merge computes these digests, and commits only if they agree
        digests = {source: replace(each, source="computed") for source, each in digests.items()}
    documented = [(spec, provenance(spec, checkpoints, digests, options)) for spec in specs]
    for spec, document in documented:
        if spec.target.exists():
            require_same(spec.target, document)
    missing = [(spec, document) for spec, document in documented if not spec.target.exists()]
    made = {spec.target for spec, _ in missing}
    needed = _output_bytes(checkpoints[inputs[-1]], options)
    size = min(MAX_GROUP, max(1, MAX_GROUP_BYTES // max(1, needed)))
    for first in range(0, len(missing), size):
        group = missing[first : first + size]
        used = unique_inputs([spec for spec, _ in group])
        opened = {source: checkpoints[source] for source in used}
        verified_run = verify and series.trusted and all(each.recorded for each in opened.values())
        files = {path: identities[path] for each in opened.values() for path in each.files}
        _merge_group(
            group, opened, files, options, progress, warn, verify=verify, verified_run=verified_run
        )
    return [Average(spec, cached=spec.target not in made) for spec in specs]


def _merge_group(
    group: Sequence[Documented],
    checkpoints: Mapping[Input, Checkpoint],
    files: Mapping[Path, _Identity],
    options: MergeOptions,
    progress: Progress,
    warn: Callable[[str], None],
    *,
    verify: bool,
    verified_run: bool,
) -> None:
    """Merge a group in one pass and commit it.

    If `verify`, compare the inputs with their records. `verified_run` is true if all inputs are
    snapshots of a run with records, so their distances are measured only with `strict`.
    """
    opened = list(checkpoints.values())
    sums = weighted_sums([spec for spec, _ in group], list(checkpoints))
    needed = _output_bytes(opened[-1], options)
    require_room(group[0][0].target, needed * len(group))
    if moved := [file for file in files if not file.exists()]:
        hint = "run the command again with the new path"
        raise RunFailed(f"{moved[0]} was moved or deleted", hint=hint)
    with ExitStack() as commits, ExitStack() as outputs:
        for parent in {spec.target.parent for spec, _ in group if spec.is_default}:
            commits.enter_context(locked_folder(parent))
            remove_leftovers(parent)
        writers = []
        for spec, document in group:
            folder = commits.enter_context(staged_folder(spec.target, needed=needed))
            writer = _prepare(folder, checkpoints[spec.inputs[-1]], document, options)
            writers.append(outputs.enter_context(writer))
        try:
            norms = merge(
                opened,
                sums,
                [writer.write for writer in writers],
                dtypes=_output_dtypes(opened[-1], options),
                integers=options.integers,
                progress=progress,
                verify=verify,
                distances=options.strict or not verified_run,
            )
        except (DamagedFile, FileNotFoundError):
            _require_unchanged(files)
            raise
        if all(spec.audited for spec, _ in group):
            for line in audit.check_norms(opened, norms, options, verified=verified_run):
                warn(line)
        outputs.close()
        for writer in writers:
            write_integrity(writer.folder, writer.digests())
        _require_unchanged(files)


def _identity(path: Path) -> _Identity:
    """Return device, inode, size and mtime, which differ after a rewind replaced the file."""
    return file_identity(path)[:4]  # a hard link or chmod changes the ctime only


def _require_unchanged(files: Mapping[Path, _Identity]) -> None:
    """Raise a UserError if an input was replaced after it was opened."""
    for path, identity in files.items():
        if not path.exists() or _identity(path) != identity:
            hint = "run the command again; after a rewind, first wait until training has caught up"
            raise UserError(f"{path} was replaced while it was averaged", hint=hint)


def _prepare(
    folder: Path,
    newest: Checkpoint,
    document: dict[str, Any],
    options: MergeOptions,
) -> WeightsWriter:
    copy_companions(newest, folder, options.dtype)
    write_json(folder / PROVENANCE_FILE, document)
    layout = output_layout(newest, dtype=options.dtype)
    return WeightsWriter(folder, layout, newest.metadata)


def _output_bytes(newest: Checkpoint, options: MergeOptions) -> int:
    return layout_bytes(output_layout(newest, dtype=options.dtype))


def _output_dtypes(newest: Checkpoint, options: MergeOptions) -> dict[str, str]:
    if options.dtype is None:
        return {}
    return {name: options.dtype for name, spec in newest.tensors.items() if spec.dtype in FLOATS}


# --- one input on disk at a time ----------------------------------------------------------------


def _average_in_turn(
    series: Series,
    spec: AverageSpec,
    options: MergeOptions,
    progress: Progress,
    warn: Callable[[str], None],
) -> Average:
    """Make one average, opening (downloading), adding and deleting its inputs one by one.

    The float64 sum is a file that is rewritten for each input, so the result is bitwise that of one
    merge. Distances between inputs are not checked.

    Why: five checkpoints of a 12B model take 120 GB.
    """
    if spec.target.exists():
        require_declared(spec, options)
        return Average(spec, cached=True)
    factors, divisor = WeightedSum(tuple(range(len(spec.inputs))), spec.weights).factors()
    opened: dict[Input, Checkpoint] = {}
    digests: dict[Input, audit.InputDigests] = {}
    total: Checkpoint | None = None
    with staged_folder(spec.target) as folder:
        for number, source in enumerate(spec.inputs):
            checkpoint = opened[source] = source.open()
            require_same_tensors(list(opened.values()))
            found = audit.digests_of(checkpoint)  # `_add` verifies them
            digests[source] = replace(found, source="computed")
            audit.check_digests(series, digests, options)
            path = folder / f"sum-{number}.safetensors"
            total = _add(total, checkpoint, factors[number], path, options.integers)
            if number + 1 == len(spec.inputs):
                for note in checkpoint.notes:
                    warn(note)
                document = provenance(spec, opened, digests, options)
                writer = _prepare(folder, checkpoint, document, options)
            if checkpoint.disposable:
                shutil.rmtree(checkpoint.folder)
            progress(number + 1, len(spec.inputs))
        assert total is not None, "a spec has at least one input"
        dtypes = {name: each.dtype for name, each in checkpoint.tensors.items()}
        dtypes |= _output_dtypes(checkpoint, options)
        with writer:
            merge([total], [WeightedSum((0,), (1.0,), divisor)], [writer.write], dtypes=dtypes)
        total.files[0].unlink()
    if checkpoint.disposable:  # remove leftovers of the hub client
        shutil.rmtree(checkpoint.folder.parent, ignore_errors=True)
    return Average(spec, cached=False)


def _add(
    total: Checkpoint | None,
    checkpoint: Checkpoint,
    factor: float,
    path: Path,
    integers: Integers,
) -> Checkpoint:
    """Write the float64 sum with one more input to a new file, and delete the previous file."""
    specs = {
        name: TensorSpec("F64", spec.shape) if spec.dtype in FLOATS else spec
        for name, spec in checkpoint.tensors.items()
    }
    inputs = [checkpoint] if total is None else [total, checkpoint]
    weights = (factor,) if total is None else (1.0, factor)
    layout = {path.name: specs}
    with (
        disk_errors(path, needed=layout_bytes(layout)),
        WeightsWriter(path.parent, layout, {}) as writer,
    ):
        dtypes = {name: spec.dtype for name, spec in specs.items()}
        added = WeightedSum(tuple(range(len(inputs))), weights)
        merge(inputs, [added], [writer.write], dtypes=dtypes, integers=integers)
    for old in total.files if total is not None else ():
        old.unlink()
    return open_safetensors(path, checkpoint.step, checkpoint.location)
