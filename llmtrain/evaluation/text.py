"""Loss and perplexities of any text file, comparable between models whose tokens differ.

Why per word and per byte: a perplexity per token depends on the tokenizer, one per word (WikiText's measure) or
per byte does not. The text is one document behind an end-of-text token, so that each of its tokens is predicted.
Strided windows give each token more context than disjoint ones and a lower loss: the result says which they were.

    results = measure_text(targets, Path("wikitext.txt"), TextOptions(stride=512), on_progress)
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import TypeAdapter

from llmtrain.checkpoints.resolve import Target
from llmtrain.config.loading import load_config
from llmtrain.errors import RunFailed, UserError
from llmtrain.evaluation.cache import cached
from llmtrain.evaluation.hf_models import IdArray, encoding_of, load_causal, require_ids
from llmtrain.evaluation.loss import LossResult, evaluate
from llmtrain.evaluation.results import weights_sha256
from llmtrain.runtime.device import (
    Precision,
    keep_freed_memory,
    resolve_device,
    resolve_precision,
)


@dataclass(frozen=True)
class TextOptions:
    """How to measure."""

    stride: int | None = None
    """Tokens that each window after the first predicts; None: disjoint windows."""
    batch: int = 16
    """Windows in one forward pass."""
    device: str = "auto"


@dataclass(frozen=True)
class TextResult:
    """A text as one set of weights predicts it. A perplexity is None where it does not fit a float."""

    file: str
    sha256: str
    windows: Literal["disjoint", "strided"]
    stride: int
    """Tokens that a window after the first predicts."""
    context: int
    """Tokens that a window holds."""
    loss: float
    """Nats per token."""
    perplexity: float | None
    """Per token."""
    word_perplexity: float | None
    """Per word: what stands between white space."""
    byte_perplexity: float | None
    """Per byte of UTF-8."""
    bits_per_byte: float
    tokens: int
    words: int
    bytes: int
    precision: str
    seconds: float


_FORM = TypeAdapter(TextResult)


def measure_text(
    targets: list[Target],
    path: Path,
    settings: TextOptions,
    on_progress: Callable[[Target, str, int, int], None],
    *,
    warn: Callable[[str], None] = lambda message: None,
) -> list[TextResult]:
    """Measure the text with each target, or take what was measured before.

    Args:
        targets: what to measure.
        path: a text file in UTF-8.
        settings: how.
        on_progress: called with the target, what is measured, windows done and in all; may raise to stop.
        warn: called with what the user should know.

    Raises:
        UserError: the file is missing, empty or no UTF-8; the stride is longer than a window; nobody knows how
            to encode text for a target.
        RunFailed: a loss is not finite.
    """
    text = _Text(path, _read(path))
    device = resolve_device(settings.device)
    results = []
    for target in targets:
        asked = load_config(target.run.config).train.precision if target.run else "auto"
        precision = resolve_precision(asked, device)
        identity = [weights_sha256(target.path), text.sha256, settings.stride, precision]
        measure = partial(_measure_one, target, text, settings, device, precision, on_progress)
        result = cached(target, "text", identity, _FORM, measure, warn)
        results.append(
            replace(result, file=str(path))
        )  # the same text may have been kept under another name
    return results


@dataclass(frozen=True)
class _Text:
    path: Path
    content: str

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def _measure_one(
    target: Target,
    text: _Text,
    settings: TextOptions,
    device: torch.device,
    precision: Precision,
    on_progress: Callable[[Target, str, int, int], None],
) -> TextResult:
    model, encoding = load_causal(target.path), encoding_of(target.path)
    stride = settings.stride or model.block_size
    if stride > model.block_size:
        raise UserError(
            f"--stride {stride:,} is longer than a window of {target.path}, {model.block_size:,} tokens",
            hint="a shorter one, or none for disjoint windows",
        )
    ids = np.concatenate([[encoding.eot], encoding.encode(text.content)])
    require_ids(target.path, ids, model)
    with keep_freed_memory(device):
        result = evaluate(
            model.to(device),
            IdArray(ids),
            np.zeros(
                model.config.vocab_size, dtype=np.int64
            ),  # bytes are counted in the text itself
            block_size=model.block_size,
            stride=stride,
            batch=settings.batch,
            device=device,
            precision=precision,
            on_progress=lambda done, total: on_progress(target, text.path.name, done, total),
        )
    if not math.isfinite(result.loss):
        raise RunFailed(
            f"the loss of {target.path} on {text.path} is {result.loss:g}",
            hint="its weights are damaged or its training diverged: llmtrain verify tells which",
        )
    return _result(result, text, model.block_size, stride, precision)


def _result(
    loss: LossResult, text: _Text, context: int, stride: int, precision: Precision
) -> TextResult:
    nats, words, n_bytes = (
        loss.loss * loss.tokens,
        len(text.content.split()),
        len(text.content.encode()),
    )
    return TextResult(
        file=str(text.path),
        sha256=text.sha256,
        windows="disjoint" if stride == context else "strided",
        stride=stride,
        context=context,
        loss=loss.loss,
        perplexity=_exp(loss.loss),
        word_perplexity=_exp(nats / words) if words else None,
        byte_perplexity=_exp(nats / n_bytes),
        bits_per_byte=nats / n_bytes / math.log(2),
        tokens=loss.tokens,
        words=words,
        bytes=n_bytes,
        precision=precision,
        seconds=loss.seconds,
    )


def _read(path: Path) -> str:
    try:
        text = (
            path.read_bytes().decode()
        )  # as it is: reading as text would turn its line ends into \n
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start:,})", hint="--text takes a plain text file"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}", hint="--text takes a plain text file"
        ) from None
    if not text:
        raise UserError(f"{path} is empty", hint="--text takes a plain text file")
    return text


def _exp(nats: float) -> float | None:
    return math.exp(nats) if nats < 700 else None
