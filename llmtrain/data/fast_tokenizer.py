"""Our tokenizers as Hugging Face knows them, with the same ids.

Why: a folder of weights holds no tokenizer files, since its ids are those of `tokenizer.py`; but what reads
text through `transformers` wants an object of its own. Nothing is downloaded: it is built from the same table.

    fast_tokenizer(load_tokenizer("gpt2")).encode("Hello world")  # [15496, 995]
"""

from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from llmtrain.data.tokenizer import TOKENIZERS, Tokenizer, load_tokenizer
from llmtrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


@cache
def fast_tokenizer(tokenizer: Tokenizer) -> "PreTrainedTokenizerFast":
    """The `transformers` tokenizer with the ids of `tokenizer`; needs the package transformers.

    Text that spells `<|endoftext|>` stays ordinary text, as it does in `Tokenizer.encode`.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    letters = _letters()
    ids = {piece: i for i, piece in enumerate(tokenizer.pieces[: tokenizer.eot])}
    spelled = {piece: "".join(letters[byte] for byte in piece) for piece in ids}
    merges = [_halves(piece, ids) for piece in ids if len(piece) > 1]
    backend = Backend(
        models.BPE(
            vocab={spelled[piece]: i for piece, i in ids.items()},
            merges=[(spelled[left], spelled[right]) for left, right in merges],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # by GPT-2's pattern
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    wrap: Any = PreTrainedTokenizerFast  # which has no types
    wrapped: PreTrainedTokenizerFast = wrap(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    return wrapped


def tokenizer_of(eot: int, what: object) -> Tokenizer:
    """The tokenizer whose end-of-text token is the one that a folder of weights names.

    Raises:
        UserError: none of ours has it.
    """
    for name in TOKENIZERS:
        if load_tokenizer(name).eot == eot:
            return load_tokenizer(name)
    raise UserError(
        f"{what} ends a text with token {eot:,}, so its tokenizer is none of {', '.join(TOKENIZERS)}",
        hint="put the files of its tokenizer (tokenizer.json) beside its weights",
    )


def _letters() -> dict[int, str]:
    """The letter that stands for each byte in GPT-2's vocabulary file (OpenAI's `bytes_to_unicode`)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _halves(piece: bytes, ids: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The last merge that makes `piece`: byte-pair encoding of it with the merges before its own."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 2:
        ranks = [ids.get(left + right, len(ids)) for left, right in pairwise(parts)]
        first = ranks.index(min(ranks))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]
