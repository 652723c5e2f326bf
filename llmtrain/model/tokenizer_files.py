"""The files from which Hugging Face's libraries make a tokenizer with our ids.

Why our own: the package ships GPT-2's ranks, and neither a download nor another library is needed to say
the same in the format of the `tokenizers` library. Bytes are byte-pair encoding without a single merge.

    for name, content in tokenizer_files(load_tokenizer("gpt2"), block_size=1024).items(): ...

One thing differs: text that spells `<|endoftext|>` becomes that token there, and ordinary text here, and
in `fast_tokenizer`.
"""

import json
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.model.tokenizer import Tokenizer
from llmtrain.storage.json_files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + n) for n, byte in enumerate(_OTHERS)
}
"""GPT-2's own sign for each byte, so that a vocabulary is text without spaces (Radford et al. 2019)."""


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, str]:
    """File name → content.

    Args:
        tokenizer: one of ours.
        block_size: the longest input of the model, in tokens.
    """
    vocabulary = _vocabulary(tokenizer) | {END_OF_TEXT: tokenizer.eot}
    merges = [f"{_spelled(left)} {_spelled(right)}" for left, right in merges_of(tokenizer.pieces)]
    is_gpt2 = tokenizer.name == "gpt2"
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": is_gpt2,
    }
    fast = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(tokenizer.eot)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    settings = {
        # GPT2Tokenizer would cut text into words first; where nothing is merged that is needless.
        "tokenizer_class": "GPT2Tokenizer" if is_gpt2 else "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    return {
        "tokenizer.json": _json(fast),
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(special),
        "vocab.json": _json(vocabulary),
        "merges.txt": "".join(["#version: 0.2\n", *(f"{merge}\n" for merge in merges)]),
    }


def is_spoken(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether a folder of weights brings no other tokenizer than this: no file of one, or one with our ids.

    Raises:
        UserError: the file is damaged.
    """
    for name in ("tokenizer.json", "vocab.json"):
        if (folder / name).is_file():
            document = read_json(folder / name)
            model = document.get("model") if name == "tokenizer.json" else {"vocab": document}
            theirs = model.get("vocab") if isinstance(model, dict) else None
            return isinstance(theirs, dict) and _vocabulary(tokenizer).items() <= theirs.items()
    return True


@cache
def fast_tokenizer(tokenizer: Tokenizer) -> "PreTrainedTokenizerFast":
    """The `transformers` tokenizer of these files; needs the package transformers.

    Text that spells `<|endoftext|>` stays ordinary text, as it does in `Tokenizer.encode`.
    """
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    wrap: Any = PreTrainedTokenizerFast  # which has no types
    wrapped: PreTrainedTokenizerFast = wrap(
        tokenizer_object=Backend.from_str(
            tokenizer_files(tokenizer, block_size=1)["tokenizer.json"]
        ),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    return wrapped


def merges_of(pieces: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair of pieces that each piece of several bytes was merged from, in the order of ids.

    A piece's id is the rank of its merge, so its bytes, encoded with the pieces before it, end as that pair.
    """
    ranks = {piece: id for id, piece in enumerate(pieces) if piece}
    merges = []
    for piece, rank in ranks.items():
        if len(piece) > 1:
            left, right = _merged(piece, ranks, below=rank)
            merges.append((left, right))
    return merges


def _merged(text: bytes, ranks: dict[bytes, int], *, below: int) -> list[bytes]:
    """The parts of `text` after all merges of a rank under `below`, the lowest first."""
    parts = [text[i : i + 1] for i in range(len(text))]
    while True:
        pairs = [ranks.get(left + right, below) for left, right in pairwise(parts)]
        lowest = min(pairs, default=below)
        if lowest == below:
            return parts
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """The id of each piece of text; that of end-of-text is none."""
    return {_spelled(piece): id for id, piece in enumerate(tokenizer.pieces) if piece}


def _spelled(piece: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in piece)


def _added(eot: int) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": eot, "content": END_OF_TEXT, **flags, "special": True}


def _json(document: object) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
