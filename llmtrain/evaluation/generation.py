"""Text from a model, a token at a time, with the keys and values of what was read kept.

Why apart from `model.py`: training never needs a cache, and what is compiled for training should not carry
one. Here the same layers are walked with a cache; a test holds the outcome equal to transformers'.

    model, tokenizer = load_generator(Path("runs/demo/averages/lawa-5x20/step-00000900"))
    print("".join(write(model, tokenizer, "My fellow Americans", Sampling())))

Shapes in names as in `model.py`: B sequences, T tokens, C width, H heads, D width of a head, V vocabulary.
"""

import codecs
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.checkpoints.gpt2_folder import Shape, load_model, load_shape
from llmtrain.errors import RunFailed, UserError
from llmtrain.model.gpt import GPT, Attention, Block
from llmtrain.model.tokenizer import Tokenizer, has_same_ids, load_tokenizer, tokenizer_for_eot
from llmtrain.runtime.device import resolve_device

_COLDEST = 1e-6
"""The lowest temperature above 0: logits divided by less would not fit a float32."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_tokens: int = 256
    """The text ends here, or where the model ends it."""
    temperature: float = 0.8
    """Logits are divided by this; 0: always the likeliest token."""
    top_k: int | None = None
    """Choose among so many of the likeliest."""
    top_p: float | None = None
    """Choose among the fewest of the likeliest whose probabilities add up to this."""
    seed: int = 1337

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: a value is out of its range.
        """
        wrong = {
            "max_tokens": self.max_tokens < 1 and "is below 1",
            "temperature": not (self.temperature == 0 or _COLDEST <= self.temperature < math.inf)
            and f"is neither 0 nor a number from {_COLDEST:g} on",
            "top_k": self.top_k is not None and self.top_k < 1 and "is below 1",
            "top_p": self.top_p is not None
            and not 0 < self.top_p <= 1
            and "is not above 0 and at most 1",
            "seed": not 0 <= self.seed < 2**63 and "is no seed from 0 to 2^63 - 1",
        }
        for name, problem in wrong.items():
            if problem:
                raise UserError(
                    f"{name} {getattr(self, name)} {problem}", hint="see llmtrain generate --help"
                )


class Cache:
    """Keys and values of the tokens that were read, for every layer; room for the model's block size."""

    def __init__(self, model: GPT) -> None:
        """Make room for one sequence, on the model's device."""
        config, weight = model.config, model.transformer.wte.weight
        shape = (
            2,
            config.n_layer,
            1,
            config.n_head,
            model.block_size,
            config.n_embd // config.n_head,
        )
        self._kept = torch.empty(shape, device=weight.device, dtype=weight.dtype)
        self.length = 0
        """Tokens read."""

    def extend(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Append what `layer` computed of new tokens; all keys and values so far."""
        end = self.length + k_BHTD.shape[2]
        for kept, new in zip(self._kept[:, layer], (k_BHTD, v_BHTD), strict=True):
            kept[:, :, self.length : end] = new
        keys, values = self._kept[:, layer, :, :, :end]
        return keys, values


def next_logits(model: GPT, tokens_BT: Tensor, cache: Cache) -> Tensor:
    """Read tokens (1, T) behind those in the cache; logits (V,) of what follows the last.

    Several tokens at a time go into an empty cache only.
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


def _attend(attention: Attention, x_BTC: Tensor, layer: int, cache: Cache) -> Tensor:
    """`Attention.forward` with what came before from the cache."""
    B, T, C = x_BTC.shape
    qkv = attention.c_attn(x_BTC).view(B, T, 3, attention.n_head, C // attention.n_head)
    q_BHTD, k_BHTD, v_BHTD = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    keys, values = cache.extend(layer, k_BHTD, v_BHTD)
    y_BHTD = F.scaled_dot_product_attention(
        q_BHTD, keys, values, is_causal=T > 1, scale=attention.scale
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
    """The ids that follow the prompt, one by one, up to `max_tokens` or before the end-of-text token.

    Where the context is full, its newer half is read again at the front of an empty one: GPT-2 knows no
    position beyond its block size.

    Args:
        model: in evaluation mode.
        prompt: token ids; none: a new document.
        sampling: how each is chosen.
        eot: id of the end-of-text token.
        vocabulary: ids from this one on are rows that pad the embedding and never chosen; None: there are none.

    Raises:
        RunFailed: the logits are not finite.
    """
    device = model.transformer.wte.weight.device
    generator = torch.Generator().manual_seed(sampling.seed)
    context = list(prompt or [eot])[-model.block_size :]
    cache, unread = Cache(model), context
    for _ in range(sampling.max_tokens):
        if cache.length == model.block_size:
            context = context[-max(model.block_size // 2, 1) :]
            cache.length, unread = 0, context
        logits_V = next_logits(model, torch.tensor([unread], device=device), cache)
        logits_V = logits_V[:vocabulary].float().cpu()
        if not logits_V.isfinite().all():
            raise RunFailed(
                "the logits of the model are not finite",
                hint="its weights are damaged or its training diverged: llmtrain verify tells which",
            )
        token = choose(logits_V, sampling, generator)
        if token == eot:
            return
        yield token
        context, unread = [*context, token], [token]


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id, drawn on the CPU so that a seed means the same everywhere."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probabilities = F.softmax(narrowed(logits_V / sampling.temperature, sampling), dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def narrowed(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Logits with -inf for what top-k, and then top-p, leave out; top-p: Holtzman et al. 2020 (nucleus)."""
    if sampling.top_k is not None and sampling.top_k < len(logits_V):
        least = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -math.inf)
    if sampling.top_p is not None:
        ordered, ids = logits_V.sort(descending=True)
        probabilities = F.softmax(ordered, dim=-1)
        beyond = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits_V = logits_V.index_fill(0, ids[beyond], -math.inf)
    return logits_V


def tokenizer_of(folder: Path, shape: Shape, name: str | None = None) -> Tokenizer:
    """The tokenizer of a folder of weights.

    Args:
        folder: for messages.
        shape: its model's.
        name: of the tokenizer; None: the one whose end-of-text token the folder's config names. Every
            folder names that token, wherever its run and its data are, and no two of ours share one.

    Raises:
        UserError: it is none of ours, or has more ids than the model.
    """
    tokenizer = load_tokenizer(name) if name else tokenizer_for_eot(shape.eot, folder)
    if tokenizer.vocab_size > shape.model.vocab_size:
        raise UserError(
            f"{folder} has {shape.model.vocab_size:,} rows of embeddings, "
            f"the {tokenizer.name} tokenizer {tokenizer.vocab_size:,} ids",
            hint="name the tokenizer the model was trained with: --tokenizer gpt2 or --tokenizer byte",
        )
    if name is None and not has_same_ids(folder, tokenizer):
        raise UserError(
            f"the tokenizer files in {folder} give other ids than ours do",
            hint="its text cannot be written here; where ours is meant all the same: --tokenizer gpt2 or byte",
        )
    return tokenizer


def load_generator(
    folder: Path, *, tokenizer: str | None = None, device: str = "auto"
) -> tuple[GPT, Tokenizer]:
    """The model of a folder of weights, on a device and in float32, and its tokenizer.

    Args:
        folder: GPT-2 weights, ours or anyone's.
        tokenizer: see `tokenizer_of`.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        UserError: no GPT-2 weights, no such device, or a tokenizer that is not ours or not the model's.
    """
    found = tokenizer_of(folder, load_shape(folder), tokenizer)
    return load_model(folder).to(resolve_device(device)), found


def generate_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, sampling: Sampling
) -> Iterator[str]:
    """The text that follows the prompt, in pieces as they come; see `generate` and `text_of`."""
    prompt_ids = tokenizer.encode(prompt).tolist()
    return text_of(
        generate(model, prompt_ids, sampling, eot=tokenizer.eot, vocabulary=tokenizer.vocab_size),
        tokenizer,
    )


def text_of(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of ids, each character once its last byte is there.

    Bytes that can be no part of a character become U+FFFD; one that is cut off at the end is left out.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        if text := decoder.decode(tokenizer.decode_bytes([token])):
            yield text
