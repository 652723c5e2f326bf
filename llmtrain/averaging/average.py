"""Averages of a series, from the plans to the committed folders.

Why: one place decides what is read, what is kept because it exists already, which proofs the inputs
must pass, and what a folder says about them; the numbers are `coefficients.py`, the bytes `merge.py`.

    average(series, make_plans(series, Request(method="lawa", every=1000)))
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtrain.averaging import audit
from llmtrain.averaging.merge import Norms, WeightedSum, merge
from llmtrain.averaging.provenance import (
    Hashes,
    hashes_of,
    input_hashes,
    provenance,
    require_same,
)
from llmtrain.averaging.spec import Average, AverageSpec, MergeOptions
from llmtrain.checkpoints.checkpoint import PROVENANCE_FILE, Checkpoint
from llmtrain.checkpoints.series import Input, Series, require_same_tensors
from llmtrain.checkpoints.tensors import FLOATS
from llmtrain.checkpoints.writer import WeightsWriter, copy_companions, layout_bytes, output_layout
from llmtrain.errors import UserError
from llmtrain.storage.commit import locked_folder, remove_abandoned, remove_leftovers, staged_folder
from llmtrain.storage.disk import require_room
from llmtrain.storage.json_files import write_json

AT_A_TIME = 64
BYTES_AT_A_TIME = 8 << 30
"""Averages computed in one pass, and what they may take on disk together: a kill loses at most these, and
two passes share k - 1 inputs."""

_WEIGHTS = (".safetensors", ".bin", ".pt")


Progress = Callable[[int, int], None]

_Wanted = tuple[AverageSpec, dict[str, Any]]
"""An average and its provenance."""


def average(
    series: Series,
    plans: Sequence[AverageSpec],
    settings: MergeOptions | None = None,
    *,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> list[Average]:
    """Make every planned average, reading each checkpoint once for up to `AT_A_TIME` of them.

    An average that is there already, of the same inputs and weights, is kept as it is, so that a command that
    was killed goes on where it was; only inputs of averages that are made are hashed.

    Args:
        series: where the inputs come from.
        plans: ascending by step.
        settings: how; default: `MergeOptions()`.
        progress: called with what is done and in all: inputs opened, inputs hashed, then the pieces of each
            pass; may raise to stop.
        warn: called with what the user should know.

    Raises:
        UserError: an input is missing, damaged, unlike the others or not what it claims, or a
            target holds something else.
        WriteFailed: the disk is full or cannot be written to.
    """
    settings = settings or MergeOptions()
    for parent in {plan.target.parent for plan in plans}:
        remove_abandoned(parent)
    if settings.discard_inputs:
        return [_fold_one(series, plans, settings, progress)]
    inputs = unique_inputs(plans)
    check_claims(series, inputs, settings, audited=all(plan.audited for plan in plans))
    checkpoints = {}
    for done, source in enumerate(inputs):
        if progress is not None:
            progress(done, len(inputs))  # opening may be a download
        checkpoints[source] = source.open()
    require_same_tensors(list(checkpoints.values()))
    hashes = input_hashes(checkpoints, compute=not series.trusted, progress=progress)
    if not settings.allow_duplicates and all(plan.audited for plan in plans):
        audit.refuse_duplicates(
            {source.step: known.files for source, known in hashes.items()},
            final_of(series, compute=True),
        )
    recorded = series.trusted and settings.verify
    if recorded:  # what is written says so, and is committed only if it turns out to be true
        hashes = {source: replace(known, source="computed") for source, known in hashes.items()}
    results, missing = {}, []
    for plan in plans:
        document = provenance(plan, checkpoints, hashes, settings)
        if plan.target.exists():
            require_same(plan.target, document)
            results[plan.target] = Average(plan, kept=True)
        else:
            missing.append((plan, document))
    unproved = set(checkpoints) if recorded else set()
    for group in _passes(missing, checkpoints, settings):
        _make(group, checkpoints, settings, progress, warn, unproved)
        results |= {plan.target: Average(plan, kept=False) for plan, _ in group}
    return [results[plan.target] for plan in plans]


def _fold_one(
    series: Series, plans: Sequence[AverageSpec], settings: MergeOptions, progress: Progress | None
) -> Average:
    if len(plans) != 1:
        raise UserError(
            f"--discard-inputs would download the inputs of {len(plans)} averages several times",
            hint="one average a command (--at STEP), or keep the inputs",
        )
    from llmtrain.averaging.fold import fold  # which needs this module

    return fold(series, plans[0], settings, progress)


def unique_inputs(plans: Sequence[AverageSpec]) -> list[Input]:
    """Every input of every plan once, by step."""
    return sorted({i for plan in plans for i in plan.inputs}, key=lambda i: (i.step, i.location))


def check_claims(
    series: Series, inputs: Sequence[Input], settings: MergeOptions, *, audited: bool
) -> None:
    """What can be known of the inputs before they are opened, or downloaded.

    Raises:
        UserError: known-bad revisions, or files declared to be the same at two steps.
    """
    if not settings.allow_known_bad:
        audit.refuse_known_bad(series.repository, [source.step for source in inputs])
    if audited and not settings.allow_duplicates:
        audit.refuse_duplicates(
            {i.step: weights_only(i.declared()) for i in inputs}, final_of(series)
        )


def final_of(series: Series, *, compute: bool = False) -> tuple[int, Hashes] | None:
    """The last step and the finished model's hashes; those that nobody declared can be computed."""
    if series.final is None:
        return None
    hashes: Hashes = weights_only(series.final.declared())
    if compute and not hashes and series.repository is None:
        hashes = hashes_of(series.final, series.final.open(), compute=True).files
    return series.final.step, hashes


def weights_only(hashes: Hashes) -> dict[str, str]:
    """The hashes of weights files among those of all files."""
    return {name: digest for name, digest in hashes.items() if name.endswith(_WEIGHTS)}


def check_trajectory(
    checkpoints: Sequence[Checkpoint],
    norms: Norms,
    settings: MergeOptions,
    warn: Callable[[str], None],
) -> None:
    """What the pass over the numbers has shown.

    Raises:
        UserError: a large tensor is the same at two steps; with `strict`, an outlier.
    """
    if not settings.allow_duplicates:
        audit.refuse_duplicate_tensors(checkpoints, norms)
    lines = audit.outliers(checkpoints, norms)
    if lines and settings.strict:
        raise UserError(
            "\n  ".join(lines), hint="choose a window without it, or leave out --strict"
        )
    for line in lines:
        warn(line)


def _passes(
    missing: Sequence[_Wanted], checkpoints: dict[Input, Checkpoint], settings: MergeOptions
) -> Iterator[list[_Wanted]]:
    """The averages to be made, in the groups in which they are committed."""
    group: list[_Wanted] = []
    size = 0
    for plan, document in missing:
        needed = output_bytes(checkpoints[plan.inputs[-1]], settings)
        if group and (len(group) == AT_A_TIME or size + needed > BYTES_AT_A_TIME):
            yield group
            group, size = [], 0
        group.append((plan, document))
        size += needed
    if group:
        yield group


def _make(
    group: Sequence[_Wanted],
    checkpoints: dict[Input, Checkpoint],
    settings: MergeOptions,
    progress: Progress | None,
    warn: Callable[[str], None],
    unproved: set[Input],
) -> None:
    """One pass: all averages of the group are committed at its end, or none is.

    Those of its inputs that are `unproved`, whose hashes were recorded, are hashed meanwhile and then no more so.
    """
    inputs = unique_inputs([plan for plan, _ in group])
    index = {source: i for i, source in enumerate(inputs)}
    opened = [checkpoints[source] for source in inputs]
    mixtures = [
        WeightedSum(tuple(index[source] for source in plan.inputs), plan.weights, plan.decays)
        for plan, _ in group
    ]
    needed = {
        plan.target: output_bytes(checkpoints[plan.inputs[-1]], settings) for plan, _ in group
    }
    require_room(group[0][0].target, sum(needed.values()))
    with ExitStack() as commits, ExitStack() as files:
        for label in {plan.target.parent for plan, _ in group if plan.is_default}:
            commits.enter_context(locked_folder(label))
            remove_leftovers(label)
        writers = []
        for plan, document in group:
            hashes: dict[str, str] = {}
            room = needed[plan.target]
            folder = commits.enter_context(staged_folder(plan.target, needed=room, hashes=hashes))
            newest = checkpoints[plan.inputs[-1]]
            writers.append(
                files.enter_context(prepare_folder(folder, newest, document, settings, hashes))
            )
        to_prove = unproved.intersection(inputs)
        found: dict[Path, str] = {}
        norms = merge(
            opened,
            mixtures,
            [writer.write for writer in writers],
            dtypes=output_dtypes(opened[-1], settings),
            integers=settings.integers,
            progress=progress,
            hashes=found if to_prove else None,
        )
        if all(plan.audited for plan, _ in group):
            check_trajectory(opened, norms, settings, warn)
        for source in to_prove:
            hashes_of(source, checkpoints[source], compute=True, known=found)
        unproved -= to_prove


def prepare_folder(
    folder: Path,
    newest: Checkpoint,
    document: dict[str, Any],
    settings: MergeOptions,
    hashes: dict[str, str] | None = None,
) -> WeightsWriter:
    """Everything but the numbers of an average; they, and the hashes, go through the writer."""
    copy_companions(newest, folder, settings.dtype)
    write_json(folder / PROVENANCE_FILE, document)
    layout = output_layout(newest, dtype=settings.dtype, max_shard=settings.max_shard)
    return WeightsWriter(folder, layout, newest.metadata, hashes)


def output_bytes(newest: Checkpoint, settings: MergeOptions) -> int:
    """What an average takes on disk, but for a few kilobytes."""
    return layout_bytes(output_layout(newest, dtype=settings.dtype, max_shard=settings.max_shard))


def output_dtypes(newest: Checkpoint, settings: MergeOptions) -> dict[str, str]:
    """The dtype of each float tensor that is written in another than its own."""
    if settings.dtype is None:
        return {}
    return {name: settings.dtype for name, spec in newest.tensors.items() if spec.dtype in FLOATS}
