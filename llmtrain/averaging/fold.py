"""An average whose inputs are never on disk together: each is summed and deleted before the next comes.

Why: five checkpoints of a 12B model are 120 GB, and a window is downloaded once and never needed again.
The float64 sum lies in a file and is read and rewritten for each input, so that the numbers are those
of the one-pass merge, to the bit; what needs two inputs at once (distances between them) is not checked.

    fold(series, plan, MergeOptions(discard_inputs=True), progress=None)
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from llmtrain.averaging.audit import refuse_duplicates
from llmtrain.averaging.average import (
    check_claims,
    final_of,
    output_dtypes,
    prepare_folder,
    weights_only,
)
from llmtrain.averaging.merge import WeightedSum, merge
from llmtrain.averaging.provenance import KnownHashes, hashes_of, provenance, require_same
from llmtrain.averaging.spec import Average, AverageSpec, MergeOptions
from llmtrain.checkpoints.checkpoint import Checkpoint
from llmtrain.checkpoints.safetensors_files import open_safetensors
from llmtrain.checkpoints.series import Input, Series, require_same_tensors
from llmtrain.checkpoints.tensors import FLOATS, TensorSpec
from llmtrain.checkpoints.writer import WeightsWriter, layout_bytes
from llmtrain.errors import UserError
from llmtrain.storage.commit import staged_folder
from llmtrain.storage.disk import disk_errors


def fold(
    series: Series,
    plan: AverageSpec,
    settings: MergeOptions,
    progress: Callable[[int, int], None] | None,
) -> Average:
    """Make one average, opening (and so downloading) and deleting its inputs one by one.

    Args:
        series: where the inputs come from.
        plan: the average.
        settings: as for `average`; hashes are always computed.
        progress: called with inputs done and in all.

    Raises:
        UserError: as `average`.
    """
    if settings.strict:
        raise UserError(
            "--strict needs two checkpoints at once, and --discard-inputs keeps one",
            hint="leave out one of them",
        )
    if plan.decays is not None:
        raise UserError(
            "--discard-inputs and --like-online exclude each other", hint="leave out one of them"
        )
    check_claims(series, plan.inputs, settings, audited=plan.audited)
    if plan.target.exists():
        _require_declared(plan, settings)
        return Average(plan, kept=True)
    factors, divisor = WeightedSum(tuple(range(len(plan.inputs))), plan.weights).exact()
    opened: dict[Input, Checkpoint] = {}
    hashes: dict[Input, KnownHashes] = {}
    total: Checkpoint | None = None
    with staged_folder(plan.target) as folder:
        for number, source in enumerate(plan.inputs):
            checkpoint = opened[source] = source.open()
            _check(series, opened, hashes, settings)
            total = _add(folder, number, total, checkpoint, factors[number], settings)
            if number + 1 == len(plan.inputs):
                document = provenance(plan, opened, hashes, settings)
                writer = prepare_folder(folder, checkpoint, document, settings)
            if checkpoint.disposable:
                shutil.rmtree(checkpoint.folder)
            if progress is not None:
                progress(number + 1, len(plan.inputs))
        assert total is not None, "a plan has at least one input"
        dtypes = {name: spec.dtype for name, spec in checkpoint.tensors.items()}
        dtypes |= output_dtypes(checkpoint, settings)
        with writer:
            merge(
                [total], [WeightedSum((0,), (1.0,), divisor=divisor)], [writer.write], dtypes=dtypes
            )
        total.files[0].unlink()
    if checkpoint.disposable:
        shutil.rmtree(
            checkpoint.folder.parent, ignore_errors=True
        )  # what the client left beside them
    return Average(plan, kept=False)


def _check(
    series: Series,
    opened: dict[Input, Checkpoint],
    hashes: dict[Input, KnownHashes],
    settings: MergeOptions,
) -> None:
    """Compare the newest opened input with those before it, and hash it."""
    source = list(opened)[-1]
    require_same_tensors(list(opened.values()))
    hashes[source] = hashes_of(source, opened[source], compute=True)
    if not settings.allow_duplicates:
        refuse_duplicates(
            {known.step: held.files for known, held in hashes.items()}, final_of(series)
        )


def _add(
    folder: Path,
    number: int,
    total: Checkpoint | None,
    checkpoint: Checkpoint,
    factor: float,
    settings: MergeOptions,
) -> Checkpoint:
    """The float64 sum with one more input, in a new file; the old one is deleted."""
    specs = {
        name: TensorSpec("F64", spec.shape) if spec.dtype in FLOATS else spec
        for name, spec in checkpoint.tensors.items()
    }
    path = folder / f"sum-{number}.safetensors"
    inputs = [checkpoint] if total is None else [total, checkpoint]
    weights = (factor,) if total is None else (1.0, factor)
    layout = {path.name: specs}
    with (
        disk_errors(path, needed=layout_bytes(layout)),
        WeightsWriter(folder, layout, {}) as writer,
    ):
        dtypes = {name: spec.dtype for name, spec in specs.items()}
        mixture = WeightedSum(tuple(range(len(inputs))), weights)
        merge(inputs, [mixture], [writer.write], dtypes=dtypes, integers=settings.integers)
    for old in total.files if total is not None else ():
        old.unlink()
    return open_safetensors(path, checkpoint.step, checkpoint.location)


def _require_declared(plan: AverageSpec, settings: MergeOptions) -> None:
    """Raise unless the folder that exists was made of inputs with the hashes declared now."""
    inputs = [
        {"step": source.step, "weight": weight, "sha256": KnownHashes(declared, "recorded").sha256}
        for source, weight in zip(plan.inputs, plan.weights, strict=True)
        if (declared := weights_only(source.declared()))
    ]
    wanted = {
        "arithmetic": "float64 sums, rounded once",
        "dtype": settings.dtype or "as the inputs",
        "max_shard_bytes": settings.max_shard,
        "integers": settings.integers,
    }
    require_same(plan.target, wanted | {"inputs": inputs})
