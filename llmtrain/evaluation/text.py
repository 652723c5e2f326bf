"""Loss and perplexity on a text file, comparable between models with different tokenizers.

Why per word and per byte: the perplexity per token depends on the tokenizer. The text is one
document after an end-of-text token, so each of its tokens is predicted. Strided windows give each
token more context than disjoint ones, and a lower loss; the result records which were used.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from llmtrain.checkpoints.resolve import Target
from llmtrain.config.loading import load_config
from llmtrain.errors import UserError
from llmtrain.evaluation.hf_models import IdArray, encoding_of, load_causal, require_ids
from llmtrain.evaluation.loss import evaluate, exp, require_finite
from llmtrain.evaluation.options import EvalOptions
from llmtrain.evaluation.results import Progress, cached, ignore
from llmtrain.evaluation.weights import weights_digest
from llmtrain.runtime.device import Precision, keep_freed_memory, resolve_device, resolve_precision


@dataclass(frozen=True)
class TextResult:
    """The loss of one set of weights on a text. A perplexity is None if it overflows."""

    file: str
    sha256: str
    windows: Literal["disjoint", "strided"]
    stride: int
    context: int
    """Tokens in a window."""
    loss: float
    """Nats per token."""
    perplexity: float | None
    word_perplexity: float | None
    byte_perplexity: float | None
    bits_per_byte: float
    tokens: int
    words: int
    bytes: int
    precision: str
    seconds: float
    stderr: float | None = None
    """Standard error of `loss`; see `EvalResult`."""


def measure_text(
    targets: list[Target],
    path: Path,
    options: EvalOptions,
    on_progress: Progress,
    *,
    warn: Callable[[str], None] = ignore,
) -> list[TextResult]:
    """Return the loss of each target on a text file, measured or cached."""
    text, device = _read(path), resolve_device(options.device)
    sha256 = hashlib.sha256(text.encode()).hexdigest()

    def measure(target: Target, precision: Precision) -> TextResult:
        model, encoding = load_causal(target.path), encoding_of(target.path)
        stride = options.stride or model.block_size
        if stride > model.block_size:
            raise UserError(
                f"--stride {stride:,} is longer than a window of {target.path}, "
                f"{model.block_size:,} tokens",
                hint="choose a shorter stride, or omit --stride for disjoint windows",
            )
        ids = np.concatenate([[encoding.eot], encoding.encode(text)])
        require_ids(target.path, ids, model)
        with keep_freed_memory(device):
            measured = evaluate(
                model.to(device),
                IdArray(ids),
                np.zeros(model.config.vocab_size, dtype=np.int64),  # bytes are counted in the text
                block_size=model.block_size,
                stride=stride,
                batch=options.batch or 16,
                device=device,
                precision=precision,
                on_progress=partial(on_progress, target, path.name),
            )
        require_finite(measured, f"{target.path} on {path}")
        nats, words = measured.loss * measured.tokens, len(text.split())
        n_bytes = len(text.encode())
        return TextResult(
            file=str(path),
            sha256=sha256,
            windows="disjoint" if stride == model.block_size else "strided",
            stride=stride,
            context=model.block_size,
            **asdict(replace(measured, bytes=n_bytes)),
            perplexity=measured.perplexity,
            word_perplexity=exp(nats / words) if words else None,
            byte_perplexity=exp(nats / n_bytes),
            bits_per_byte=nats / n_bytes / math.log(2),
            words=words,
            precision=precision,
        )

    results = []
    for target in targets:
        requested = load_config(target.run.config).train.precision if target.run else "auto"
        precision = resolve_precision(requested, device)
        weights = weights_digest(target.path)
        identity = f"\n{sha256}\n{options.stride}\n{precision}"
        measure_one = partial(measure, target, precision)
        result = cached(target, "text", weights, identity, TextResult, measure_one, warn)
        results.append(replace(result, file=str(path)))  # may be cached under another name
    return results


def _read(path: Path) -> str:
    hint = "--text takes a plain text file"
    try:
        text = path.read_bytes().decode()  # read_text would change line ends
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,})", hint=hint) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", hint=hint) from None
    if not text:
        raise UserError(f"{path} is empty", hint=hint)
    return text
