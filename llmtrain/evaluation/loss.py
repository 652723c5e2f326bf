"""Loss on fixed windows of a split: mean nats per token, each token but the first predicted once.

Why one function for all weights: losses are comparable only if measured on the same tokens in the
same windows. Training, averaging and `llmtrain eval` all call `evaluate`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llmtrain.checkpoints.resolve import Target
from llmtrain.config.loading import load_config
from llmtrain.data.cache import local_folder
from llmtrain.data.sampler import n_windows, small_split, validation_windows
from llmtrain.data.shard_check import ShardCheck
from llmtrain.data.shards import Tokens
from llmtrain.data.token_data import TokenData, open_data
from llmtrain.errors import RunFailed, UserError
from llmtrain.evaluation.hf_models import HFModel, load_causal, reencode, require_ids
from llmtrain.evaluation.options import EvalOptions
from llmtrain.evaluation.results import EvalResult, Progress, cached, ignore
from llmtrain.evaluation.weights import discarded_inputs, weights_digest
from llmtrain.model.gpt import GPT, IGNORE
from llmtrain.model.tokenizer import load_tokenizer
from llmtrain.runtime.device import (
    Precision,
    autocast,
    keep_freed_memory,
    resolve_device,
    resolve_precision,
    to_device,
)
from llmtrain.runtime.distributed import World
from llmtrain.storage.run_folder import RAW
from llmtrain.storage.urls import is_url


@dataclass(frozen=True)
class LossResult:
    """The loss of a model on a split, in nats per predicted token."""

    loss: float
    tokens: int
    bytes: int
    """Bytes of text in those tokens; the end-of-text token has none."""
    seconds: float
    stderr: float | None = None
    """Standard error of `loss` in nats; None for a single window."""

    @property
    def perplexity(self) -> float | None:
        """See `exp`."""
        return exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """loss · tokens / (bytes · ln 2), or None without text."""
        return self.loss * self.tokens / (self.bytes * math.log(2)) if self.bytes else None


def exp(nats: float) -> float | None:
    """Return exp(nats), or None if it overflows."""
    return math.exp(nats) if nats < 700 else None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    reader: Tokens,
    token_bytes: npt.NDArray[np.int64],
    *,
    block_size: int,
    stride: int | None = None,
    batch: int,
    device: torch.device,
    precision: Precision,
    world: World | None = None,
    limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LossResult:
    """Return the loss of `model` on a split; the model keeps its training mode.

    The standard error assumes that the windows' losses are independent samples. Windows predict
    different tokens, but those of one document are correlated, so it is a lower bound.

    Args:
        model: on `device`; called with (tokens, targets, collect), returns their mean loss and
            passes the loss of each target to `collect`.
        token_bytes: bytes of text in each token, shape (vocabulary,).
        stride: tokens predicted in each window after the first; None for disjoint windows.
        world: processes that share the windows; all of them must call this function.
        on_progress: called with windows done and total; may raise to stop, on all ranks alike.
    """
    n_tokens = min(len(reader), limit or len(reader))
    if n_tokens < 2:
        raise UserError(
            f"the split has {n_tokens} tokens, too few to predict any",
            hint="prepare the data with a larger --val-fraction",
        )
    started = time.perf_counter()
    world = world or World()
    windows = validation_windows(n_tokens, block_size, stride)
    was_training = model.training
    model.eval()
    losses: list[tuple[Tensor, int]] = []
    nats: list[Tensor] = []
    predicted: list[npt.NDArray[np.int64]] = []
    n_bytes = 0
    try:
        with autocast(device, precision):  # around all batches: the weights are cast once
            for first in range(0, len(windows), world.size * batch):
                mine = first + world.rank * batch
                # FSDP's forward is collective, so ranks without windows repeat the first one.
                some = windows[mine : mine + batch] or windows[:1]
                tokens, targets = _fill(reader, some, block_size)
                collected: list[Tensor] = []
                loss = model(
                    to_device(tokens, device), to_device(targets, device), collected.append
                )
                if mine < len(windows):
                    counted = targets[targets != IGNORE]
                    losses.append((loss, counted.size))  # read at the end: no GPU sync per batch
                    nats.append(torch.cat(collected).view(targets.shape).sum(dim=1))
                    predicted.append(np.count_nonzero(targets != IGNORE, axis=1))
                    n_bytes += int(token_bytes[counted].sum())
                if on_progress is not None:
                    on_progress(min(first + world.size * batch, len(windows)), len(windows))
    finally:
        model.train(was_training)
    total = math.fsum(loss.item() * count for loss, count in losses)
    local = [total, sum(count for _, count in losses), n_bytes, *_moments(nats, predicted)]
    total, count, text, *moments = world.sums(local)
    stderr = _standard_error(total / count, count, moments)
    seconds = time.perf_counter() - started
    return LossResult(total / count, int(count), int(text), seconds, stderr)


def _moments(nats: list[Tensor], tokens: list[npt.NDArray[np.int64]]) -> list[float]:
    """Return the number of windows and the sums of nats², nats · tokens and tokens² over them."""
    if not nats:
        return [0.0] * 4
    s, n = torch.cat(nats).cpu().numpy().astype(np.float64), np.concatenate(tokens)
    return [len(s), float(s @ s), float(s @ n), float(n @ n)]


def _standard_error(loss: float, tokens: float, moments: list[float]) -> float | None:
    """Return the standard error of the ratio sum(nats) / sum(tokens) over windows."""
    windows, nats2, product, tokens2 = moments
    if windows < 2:
        return None
    residual = max(nats2 - 2 * loss * product + loss**2 * tokens2, 0.0)
    return math.sqrt(windows / (windows - 1) * residual) / tokens


def _fill(
    reader: Tokens, windows: list[tuple[int, int, int]], block_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return inputs and targets of shape (windows, block_size); context targets are ignored."""
    tokens = np.zeros((len(windows), block_size), dtype=np.int64)
    targets = np.full((len(windows), block_size), IGNORE, dtype=np.int64)
    for row, (start, length, predicted) in enumerate(windows):
        window = reader.read(start, length)
        tokens[row, : length - 1] = window[:-1]
        targets[row, length - 1 - predicted : length - 1] = window[-predicted:]
    return tokens, targets


def require_finite(result: LossResult, name: str) -> LossResult:
    """Return the result; raise RunFailed if its loss is not finite."""
    if not math.isfinite(result.loss):
        raise RunFailed(
            f"the loss of {name} is {result.loss:g}",
            hint="check the weights with llmtrain verify; if intact, training diverged",
        )
    return result


def measure_losses(
    targets: list[Target],
    options: EvalOptions,
    on_progress: Progress,
    *,
    warn: Callable[[str], None] = ignore,
) -> list[EvalResult]:
    """Return the loss of each target, measured or cached; raw weights must precede averages."""
    resolved = [_resolve(target, options) for target in targets]
    if len({each.tokens for each in resolved}) > 1:
        warn("the runs are evaluated on different numbers of tokens: pass --tokens N to compare")
    open_once = cache(open_data)
    raw: dict[tuple[Path, int | None], float] = {}
    warned: set[str] = set()
    results = []
    for target, each in zip(targets, resolved, strict=True):
        assert each.data is not None
        result = _cached_loss(target, each, open_once(each.data), on_progress, warn)
        small = small_split(n_windows(result.tokens + 1, result.block_size), "window")
        if small and small not in warned:
            warned.add(small)
            warn(f"{each.data}, {each.split} split: {small}")
        if target.run is not None:
            place = (target.run.path.resolve(), target.step)
            if target.label == RAW:
                raw[place] = result.loss
            result = result.with_delta(raw.get(place))
        results.append(result)
    return results


def has_data(target: Target, options: EvalOptions) -> bool:
    """Return whether the options or the run of a target name data that exists."""
    if options.data is not None or target.run is None:
        return options.data is not None
    path = load_config(target.run.config).data.path
    return is_url(path) or Path(path).is_dir()


def _resolve(target: Target, options: EvalOptions) -> EvalOptions:
    """Fill the options left open from the config of the target's run."""
    if target.run is None:
        if options.data is None:
            raise UserError(
                f"{target.path} does not belong to a run, so its data is unknown",
                hint="pass --data, such as --data data/openwebtext",
            )
        return options
    config = load_config(target.run.config)
    data = options.data or local_folder(config.data.path)
    if options.data is None and not data.is_dir():
        raise UserError(
            f"the training data of {target.run.path} is not found: {data} does not exist",
            hint="pass its current location: --data FOLDER",
        )
    return replace(
        options,
        data=data,
        tokens=options.tokens or (config.eval.tokens if options.split == "val" else None),
        batch=options.batch or config.eval.batch,
        precision=options.precision or config.train.precision,
    )


def _cached_loss(
    target: Target,
    options: EvalOptions,
    data: TokenData,
    on_progress: Progress,
    warn: Callable[[str], None],
) -> EvalResult:
    split, device = options.split, resolve_device(options.device)
    precision = resolve_precision(options.precision or "auto", device)
    weights = weights_digest(target.path)
    limit = min(data.tokens(split), options.tokens or data.tokens(split))

    def measure() -> EvalResult:
        model = load_causal(target.path)
        reader, token_bytes, n_bytes = _prepare(target, model, data, split, limit, warn)
        with ShardCheck(data.files[split]) as check, keep_freed_memory(device):
            result = evaluate(
                model.to(device),
                reader,
                token_bytes,
                block_size=model.block_size,
                batch=options.batch or 16,
                device=device,
                precision=precision,
                limit=limit if n_bytes is None else None,
                on_progress=partial(on_progress, target, split),
            )
            check.wait(partial(on_progress, target, split, 1, 1))
        require_finite(result, str(target.path))
        result = result if n_bytes is None else replace(result, bytes=n_bytes)
        return EvalResult(
            label=target.label,
            step=target.step,
            path=str(target.path),
            run=run,
            **asdict(result),
            perplexity=result.perplexity,
            bits_per_byte=result.bits_per_byte,
            delta=None,
            split=split,
            block_size=model.block_size,
            precision=precision,
            data=data.sha256,
            weights=str(weights),
        )

    run = target.run.path.resolve().name if target.run else None
    identity = f" {data.sha256} {split} {limit} {precision}"
    result = cached(target, "", weights, identity, EvalResult, measure, warn)
    discarded = bool(discarded_inputs(target.path, target.run))
    path = str(target.path)  # the cached path and run may have been renamed
    return replace(result, path=path, run=run, delta=None, discarded=discarded)


def _prepare(
    target: Target,
    model: GPT | HFModel,
    data: TokenData,
    split: str,
    limit: int,
    warn: Callable[[str], None],
) -> tuple[Tokens, npt.NDArray[np.int64], int | None]:
    """Return the tokens for a model, bytes per id and, if the text was re-encoded, its bytes."""
    if reencoded := reencode(target.path, data, split, limit):
        ids, n_bytes = reencoded
        require_ids(target.path, ids.read(0, len(ids)), model)
        warn(
            f"{target.path} has another tokenizer, so the text of {data.folder} was re-encoded: "
            "compare its bits/byte, not its loss per token"
        )
        return ids, np.zeros(model.config.vocab_size, dtype=np.int64), n_bytes
    if data.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{data.folder} has a vocabulary of {data.vocab_size:,} ({data.tokenizer}), "
            f"{target.path} one of {model.config.vocab_size:,}",
            hint="evaluate on data prepared with the tokenizer of the model",
        )
    return data.reader(split), load_tokenizer(data.tokenizer).token_bytes(), None
