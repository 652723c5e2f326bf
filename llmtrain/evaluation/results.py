"""Measured losses, kept so that the same weights on the same data are measured once.

Why by content: a result belongs to the bytes of the weights and of the data, not to their names. A
retrained snapshot or a re-prepared split is another measurement; a moved folder is the same.

    rows = measure(targets, Settings(data=Path("data/openwebtext")), on_progress)
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from llmtrain.checkpoints.checkpoint import weights_files
from llmtrain.checkpoints.resolve import Target
from llmtrain.config.loading import load_config
from llmtrain.data.cache import local_folder
from llmtrain.data.shards import Tokens
from llmtrain.data.token_data import TokenData, open_data
from llmtrain.errors import RunFailed, UserError
from llmtrain.evaluation.cache import store
from llmtrain.evaluation.hf_models import HFModel, load_causal, reencoded, require_ids
from llmtrain.evaluation.loss import LossResult, evaluate
from llmtrain.model.gpt import GPT
from llmtrain.model.tokenizer import load_tokenizer
from llmtrain.runtime.device import (
    Precision,
    keep_freed_memory,
    resolve_device,
    resolve_precision,
)
from llmtrain.storage.integrity import INTEGRITY_FILE, read_integrity, sha256_of
from llmtrain.storage.json_files import read_json
from llmtrain.storage.run_folder import RAW, RunFolder
from llmtrain.storage.urls import is_url


@dataclass(frozen=True)
class EvalOptions:
    """How to measure. None: as the target's run does it, else the default."""

    data: Path | None = None
    split: str = "val"
    tokens: int | None = None
    """Use only the first so many tokens of the split."""
    batch: int | None = None
    precision: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Row:
    """One measured set of weights."""

    label: str
    step: int | None
    path: str
    run: str | None
    """Name of the run's folder."""
    loss: float
    """Nats per token."""
    perplexity: float | None
    """None where it does not fit a float."""
    bits_per_byte: float | None
    tokens: int
    bytes: int
    seconds: float
    delta: float | None
    """Loss minus that of the raw weights of the same step and run; None where there are none."""
    split: str
    block_size: int
    precision: str
    data: str
    """SHA-256 of the data's manifest."""
    weights: str
    """SHA-256 of the weights file."""


_ROW = TypeAdapter(Row)


def measure(
    targets: list[Target],
    settings: EvalOptions,
    on_progress: Callable[[Target, int, int], None],
    *,
    warn: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Measure each target, or take what was measured before.

    Args:
        targets: what to measure, raw before the averages of its step.
        settings: how.
        on_progress: called with the target, windows done and windows in all; may raise to stop.
        warn: called with what the user should know.

    Raises:
        UserError: no data is known, data and model do not fit, weights are damaged.
        RunFailed: a loss is not finite.
    """
    raw: dict[tuple[Path, int | None], float] = {}
    opened: dict[Path, TokenData] = {}
    rows = []
    everything = [_resolve(target, settings) for target in targets]
    if len({resolved.tokens for resolved in everything}) > 1:
        warn(
            "not all are measured on as many tokens, as the runs' configs say: --tokens N makes them alike"
        )
    for target, resolved in zip(targets, everything, strict=True):
        assert resolved.data is not None
        if resolved.data not in opened:
            opened[resolved.data] = open_data(resolved.data)
        row = _measure_one(target, resolved, opened[resolved.data], on_progress, warn)
        if target.run is not None:
            place = (target.run.path.resolve(), target.step)
            if target.label == RAW:
                raw[place] = row.loss
            if place in raw:
                row = replace(row, delta=row.loss - raw[place])
        rows.append(row)
    return rows


def stored_rows(run: RunFolder) -> list[Row]:
    """Every result kept under the run's `evals/`, by label and step; differences from raw filled in.

    Left out are those of weights that have been made anew since.
    """
    found = [
        row for path in sorted(run.evals.glob("[!.]*.json")) if (row := _read_row(path)) is not None
    ]
    rows = [row for row in found if _is_current(run, row)]
    raw = {_windows(row): row.loss for row in rows if row.label == RAW}
    filled = []
    for row in rows:
        base = raw.get(_windows(row))
        filled.append(replace(row, delta=None if base is None else row.loss - base))
    return sorted(filled, key=lambda row: (row.label != RAW, row.label, row.step or 0))


def _windows(row: Row) -> tuple[object, ...]:
    """What two results have in common where their difference means something."""
    return row.step, row.data, row.split, row.tokens, row.precision


def data_is_known(target: Target, settings: EvalOptions) -> bool:
    """Whether the user, or the target's run, names data that is there."""
    if settings.data is not None or target.run is None:
        return settings.data is not None
    path = load_config(target.run.config).data.path
    return is_url(path) or Path(path).is_dir()


def _resolve(target: Target, settings: EvalOptions) -> EvalOptions:
    """Fill what the user left open from the target's run.

    Raises:
        UserError: neither the user nor a run says which data.
    """
    if target.run is None:
        if settings.data is None:
            raise UserError(
                f"{target.path} belongs to no run, so the data is not known",
                hint="name it: --data data/openwebtext",
            )
        return replace(settings, batch=settings.batch or 16, precision=settings.precision or "auto")
    config = load_config(target.run.config)
    data = settings.data or local_folder(config.data.path)
    if settings.data is None and not data.is_dir():
        raise UserError(
            f"{target.run.path} was trained on {data}, which is not below this folder",
            hint="name where it is now: --data FOLDER",
        )
    return replace(
        settings,
        data=data,
        tokens=settings.tokens or (config.eval.tokens if settings.split == "val" else None),
        batch=settings.batch or config.eval.batch,
        precision=settings.precision or config.train.precision,
    )


def _measure_one(
    target: Target,
    settings: EvalOptions,
    data: TokenData,
    on_progress: Callable[[Target, int, int], None],
    warn: Callable[[str], None],
) -> Row:
    device = resolve_device(settings.device)
    precision = resolve_precision(settings.precision or "auto", device)
    weights = weights_sha256(target.path)
    limit = min(data.tokens(settings.split), settings.tokens or data.tokens(settings.split))
    key = hashlib.sha256(
        f"{weights} {data.sha256} {settings.split} {limit} {precision}".encode()
    ).hexdigest()
    step = "" if target.step is None else f"-step-{target.step:08d}"
    stored = target.run and target.run.evals / f"{target.label}{step}-{key[:16]}.json"
    if stored and stored.exists() and (row := _read_row(stored)) is not None:
        return replace(row, path=str(target.path), delta=None)
    model = load_causal(target.path)
    again = reencoded(target.path, data, settings.split, limit)
    if again is None:
        reader: Tokens = data.reader(settings.split)
        token_bytes = load_tokenizer(data.tokenizer).token_bytes()
        _require_vocabulary(target, model, data)
    else:
        require_ids(target.path, again.ids.read(0, len(again.ids)), model)
        warn(
            f"{target.path} has a tokenizer of its own: the text of {data.folder} was encoded with it; compare its "
            "bits/byte, not its loss per token"
        )
        reader, limit = again.ids, len(again.ids)
        token_bytes = np.zeros(model.config.vocab_size, dtype=np.int64)
    with keep_freed_memory(device):
        result = evaluate(
            model.to(device),
            reader,
            token_bytes,
            block_size=model.block_size,
            batch=settings.batch or 16,
            device=device,
            precision=precision,
            limit=limit,
            on_progress=lambda done, total: on_progress(target, done, total),
        )
    if again is not None:
        result = replace(result, bytes=again.bytes)
    if not math.isfinite(result.loss):
        raise RunFailed(
            f"the loss of {target.path} is {result.loss:g}",
            hint="its weights are damaged or its training diverged: llmtrain verify tells which",
        )
    row = _row(target, result, settings.split, model.block_size, precision, data.sha256, weights)
    if stored:
        store(stored, asdict(row), warn)
    return row


def _require_vocabulary(target: Target, model: GPT | HFModel, data: TokenData) -> None:
    """Raise a UserError if the data holds ids that the model has not."""
    if data.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{data.folder} has a vocabulary of {data.vocab_size:,} ({data.tokenizer}), "
            f"{target.path} one of {model.config.vocab_size:,}",
            hint="evaluate on data prepared with the tokenizer of the model",
        )


def _row(
    target: Target,
    result: LossResult,
    split: str,
    block_size: int,
    precision: Precision,
    data: str,
    weights: str,
) -> Row:
    return Row(
        label=target.label,
        step=target.step,
        path=str(target.path),
        run=target.run.path.resolve().name if target.run else None,
        loss=result.loss,
        perplexity=result.perplexity if math.isfinite(result.perplexity) else None,
        bits_per_byte=None if math.isnan(result.bits_per_byte) else result.bits_per_byte,
        tokens=result.tokens,
        bytes=result.bytes,
        seconds=result.seconds,
        delta=None,
        split=split,
        block_size=block_size,
        precision=precision,
        data=data,
        weights=weights,
    )


def _read_row(path: Path) -> Row | None:
    """A stored result; None for one of another version, which is then measured anew.

    Raises:
        UserError: it is damaged.
    """
    document = read_json(path)
    if document.keys() != Row.__dataclass_fields__.keys():
        return None
    try:
        row = _ROW.validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(
            f"{path}: {wrong['loc'][0]}: {wrong['msg']}",
            hint="delete the file: llmtrain eval measures it again",
        ) from None
    if not math.isfinite(row.loss):
        raise UserError(
            f"{path}: its loss is {row.loss}",
            hint="delete the file: llmtrain eval measures it again",
        )
    return row


def _is_current(run: RunFolder, row: Row) -> bool:
    """Whether the weights that were measured are those that lie there now, if any do."""
    if row.step is None:
        return False
    folder = run.snapshot(row.step) if row.label == RAW else run.average(row.label, row.step)
    return not folder.is_dir() or weights_sha256(folder) == row.weights


def weights_sha256(folder: Path) -> str:
    """Of the weights file; of several, of their hashes in the order of names.

    What was recorded when the folder was committed is taken while no file has been touched since.

    Raises:
        UserError: there are no weights.
    """
    # What others publish may hold torch's files only.
    paths = (
        sorted(folder.glob("pytorch_model*.bin")) if _is_torch(folder) else weights_files(folder)
    )
    record = folder / INTEGRITY_FILE
    untouched = record.exists() and all(
        p.stat().st_mtime_ns <= record.stat().st_mtime_ns for p in paths
    )
    known = read_integrity(folder) if untouched else {}
    hashes = [str(known[p.name]["sha256"]) if p.name in known else sha256_of(p) for p in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def _is_torch(folder: Path) -> bool:
    return not any(folder.glob("*.safetensors")) and any(folder.glob("pytorch_model*.bin"))
