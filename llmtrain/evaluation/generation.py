"""Text generation, one token at a time with a key-value cache.

Why not in the model: training never uses a cache, and the compiled model should not contain one.

Shape suffixes as in `model/gpt.py`.
"""

import codecs
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.checkpoints.gpt2_folder import Shape, load_model, load_shape
from llmtrain.errors import RunFailed, UserError
from llmtrain.evaluation.options import Sampling
from llmtrain.model.gpt import GPT, Attention, Block
from llmtrain.model.tokenizer import Tokenizer, has_same_ids, load_tokenizer, tokenizer_for_eot
from llmtrain.runtime.device import resolve_device


class KVCache:
    """Keys and values of one sequence in every layer, up to the model's block size."""

    def __init__(self, model: GPT) -> None:
        config, weight = model.config, model.transformer.wte.weight
        width = config.n_embd // config.n_head
        shape = (2, config.n_layer, 1, config.n_head, model.block_size, width)
        self._cached = torch.empty(shape, device=weight.device, dtype=weight.dtype)
        self.length = 0

    def extend(self, layer: int, new: Tensor) -> Tensor:
        """Append keys and values (2, B, H, T, D) of a layer, and return all of them."""
        end = self.length + new.shape[3]
        self._cached[:, layer, :, :, self.length : end] = new
        return self._cached[:, layer, :, :, :end]


def next_logits(model: GPT, tokens_BT: Tensor, cache: KVCache) -> Tensor:
    """Append tokens (1, T) to the cache and return the logits (V,) after the last one.

    Several tokens at once require an empty cache.
    """
    T = tokens_BT.shape[1]
    assert T == 1 or cache.length == 0
    transformer = model.transformer
    positions_T = torch.arange(cache.length, cache.length + T, device=tokens_BT.device)
    x_BTC = transformer.wte(tokens_BT) + transformer.wpe(positions_T)
    for layer, block in enumerate(transformer.h):
        assert isinstance(block, Block)
        x_BTC = x_BTC + _attend(block.attn, block.ln_1(x_BTC), layer, cache)
        x_BTC = x_BTC + block.mlp(block.ln_2(x_BTC))
    cache.length += T
    return F.linear(transformer.ln_f(x_BTC[0, -1]), transformer.wte.weight)


def _attend(attention: Attention, x_BTC: Tensor, layer: int, cache: KVCache) -> Tensor:
    """Compute `Attention.forward` with earlier keys and values from the cache."""
    B, T, C = x_BTC.shape
    qkv = attention.c_attn(x_BTC).view(B, T, 3, attention.n_head, C // attention.n_head)
    qkv_3BHTD = qkv.permute(2, 0, 3, 1, 4)
    k_BHTD, v_BHTD = cache.extend(layer, qkv_3BHTD[1:])
    y_BHTD = F.scaled_dot_product_attention(
        qkv_3BHTD[0], k_BHTD, v_BHTD, is_causal=T > 1, scale=attention.scale
    )
    y: Tensor = attention.c_proj(y_BHTD.transpose(1, 2).reshape(B, T, C))
    return y


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    eot: int,
    vocabulary: int | None = None,
) -> Iterator[int]:
    """Yield the ids after the prompt, until the end-of-text token or `max_tokens`.

    When the context is full, its more recent half is read again into an empty cache, because GPT-2
    positions end at its block size. An empty prompt starts a new document. Rows of the embedding
    after the first `vocabulary` are padding.
    """
    device = model.transformer.wte.weight.device
    generator = torch.Generator().manual_seed(sampling.seed)
    context = list(prompt or [eot])[-model.block_size :]
    cache, unread = KVCache(model), context
    for _ in range(sampling.max_tokens):
        if cache.length == model.block_size:
            context = context[-max(model.block_size // 2, 1) :]
            cache.length, unread = 0, context
        logits_V = next_logits(model, torch.tensor([unread], device=device), cache)
        logits_V = logits_V[:vocabulary].float().cpu()
        if not logits_V.isfinite().all():
            raise RunFailed(
                "the logits of the model are not finite",
                hint="check the weights with llmtrain verify; if intact, training diverged",
            )
        token = choose(logits_V, sampling, generator)
        if token == eot:
            return
        yield token
        context, unread = [*context, token], [token]


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return one id, drawn on the CPU so that the draws do not depend on the device."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probabilities = F.softmax(filter_logits(logits_V / sampling.temperature, sampling), dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def filter_logits(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Set the logits excluded by top-k, then top-p (nucleus, Holtzman et al. 2020), to -inf."""
    if sampling.top_k is not None and sampling.top_k < len(logits_V):
        least = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, ids = logits_V.sort(descending=True)
        probabilities = F.softmax(ordered, dim=-1)
        beyond = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        beyond[0] = False  # even if top_p rounds to 0
        logits_V = logits_V.index_fill(0, ids[beyond], -math.inf)
    return logits_V


def tokenizer_of(folder: Path, shape: Shape, name: str | None = None) -> Tokenizer:
    """Return a tokenizer by name, or the one whose end-of-text id the folder's config names."""
    tokenizer = load_tokenizer(name) if name else tokenizer_for_eot(shape.eot, folder)
    if tokenizer.vocab_size > shape.model.vocab_size:
        raise UserError(
            f"{folder} has {shape.model.vocab_size:,} embedding rows, but "
            f"the {tokenizer.name} tokenizer has {tokenizer.vocab_size:,} ids",
            hint="pass the tokenizer of the model: --tokenizer gpt2 or --tokenizer byte",
        )
    if name is None and not has_same_ids(folder, tokenizer):
        raise UserError(
            f"the tokenizer files in {folder} produce other ids than our {tokenizer.name} one",
            hint="to use ours anyway, pass --tokenizer gpt2 or --tokenizer byte",
        )
    return tokenizer


def load_generator(
    folder: Path, *, tokenizer: str | None = None, device: str = "auto"
) -> tuple[GPT, Tokenizer]:
    """Load the GPT-2 in a folder, on a device in float32, and its tokenizer."""
    found = tokenizer_of(folder, load_shape(folder), tokenizer)
    return load_model(folder).to(resolve_device(device)), found


def generate_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, sampling: Sampling
) -> Iterator[str]:
    """Yield the text after the prompt as it is generated; see `generate` and `stream_text`."""
    prompt_ids = tokenizer.encode(prompt).tolist()
    ids = generate(model, prompt_ids, sampling, eot=tokenizer.eot, vocabulary=tokenizer.vocab_size)
    return stream_text(ids, tokenizer)


def stream_text(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield each character when its last byte arrives; invalid bytes become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        if text := decoder.decode(tokenizer.decode_bytes([token])):
            yield text
