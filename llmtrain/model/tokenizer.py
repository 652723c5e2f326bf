"""Text to token ids and back: GPT-2's byte-pair encoding, or plain bytes."""

import base64
import hashlib
import json
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmtrain.errors import RunFailed, UserError
from llmtrain.storage.json_files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZERS = ("gpt2", "byte")
END_OF_TEXT = "<|endoftext|>"

CHUNK_BYTES = 1 << 20
"""Default size of the chunks in which long documents are encoded."""
_SHORT_CHUNK_BYTES = 10_000

GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
"""Hash of the unpacked ranks, the same that tiktoken requires for `r50k_base`."""

_R50K_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)

_WHITESPACE = (
    rb"(?:[\t-\r ]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]"
    rb"|\xe2\x81\x9f|\xe3\x80\x80)"
)
"""Unicode White_Space in UTF-8, which is `\\s` in tiktoken; Python's has four more characters."""

_SAFE_CUT = re.compile(_WHITESPACE + rb"(?!" + _WHITESPACE + rb"|\Z)")
"""Last whitespace character before other text. No token crosses the point before it."""

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + n) for n, byte in enumerate(_OTHERS)
}
"""GPT-2's printable character for each byte in vocabulary files (Radford et al. 2019)."""


@dataclass(frozen=True)
class Tokenizer:
    """An immutable tokenizer that threads may share."""

    name: str
    sha256: str
    """Hex hash of the vocabulary; tokenizers with equal hashes produce equal ids."""
    vocabulary: tuple[bytes, ...]
    """Bytes of each token id. The last id is end-of-text, which has none."""
    _encode: Callable[[str], npt.NDArray[np.uint16]]

    @property
    def vocab_size(self) -> int:
        """Number of ids, including end-of-text."""
        return len(self.vocabulary)

    @property
    def eot(self) -> int:
        """Id of the end-of-text token, which terminates documents and never results from text."""
        return self.vocab_size - 1

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        """Return the token ids of `text`, shape (tokens,), without end-of-text.

        Special tokens in the text (`<|endoftext|>`) are ordinary text. A lone surrogate is encoded
        as U+FFFD, as in tiktoken.
        """
        try:
            return self._encode(text)
        except UnicodeEncodeError:
            return self._encode(well_formed(text))

    def decode_bytes(self, ids: npt.ArrayLike) -> bytes:
        """Return the bytes of `ids`; raise a UserError for ids outside the vocabulary."""
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        wrong = array[(array < 0) | (array > self.eot)]
        if wrong.size:
            raise UserError(
                f"token id {wrong[0]} is outside the vocabulary of {self.name} (0 to {self.eot})",
                hint="decode with the tokenizer that produced these tokens",
            )
        return b"".join(self.vocabulary[i] for i in array.tolist())

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the text of `ids`, with U+FFFD for incomplete UTF-8 characters."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Return the number of bytes of each id, shape (vocab_size,); 0 for end-of-text."""
        return np.array([len(token) for token in self.vocabulary], dtype=np.int64)


@cache
def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer "gpt2" or "byte", without network access."""
    if name not in TOKENIZERS:
        hint = f"choose one of {', '.join(TOKENIZERS)}"
        raise UserError(f"unknown tokenizer {name!r}", hint=hint)
    return _gpt2() if name == "gpt2" else _byte()


def tokenizer_for_eot(eot: int, source: object) -> Tokenizer:
    """Return the tokenizer with this end-of-text id; an error names the weights folder `source`."""
    for tokenizer in map(load_tokenizer, TOKENIZERS):
        if tokenizer.eot == eot:
            return tokenizer
    raise UserError(
        f"{source} uses the end-of-text token {eot:,}, which belongs to neither of the tokenizers "
        f"{', '.join(TOKENIZERS)}",
        hint="add its tokenizer files (tokenizer.json) to the folder, or set --tokenizer",
    )


def _byte() -> Tokenizer:
    def encode(text: str) -> npt.NDArray[np.uint16]:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)

    definition = b"byte: ids 0-255 are the bytes of UTF-8, 256 is end-of-text"
    vocabulary = (*(bytes([byte]) for byte in range(256)), b"")
    return Tokenizer("byte", hashlib.sha256(definition).hexdigest(), vocabulary, encode)


def _gpt2() -> Tokenizer:
    import tiktoken

    ranks = _gpt2_ranks()
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=_R50K_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
        explicit_n_vocab=len(ranks) + 1,
    )

    def encode_part(text: str) -> npt.NDArray[np.uint16]:
        # encode_to_numpy releases the GIL, so threads encode in parallel.
        ids = encoding.encode_to_numpy(text, allowed_special=frozenset(), disallowed_special=())
        return ids.astype(np.uint16)

    def encode(text: str) -> npt.NDArray[np.uint16]:
        try:
            return encode_part(text)
        except ValueError:
            # About a million whitespace characters in a row overflow the regex engine's stack.
            parts = split_text(text.encode("utf-8"), _SHORT_CHUNK_BYTES)
            return np.concatenate([encode_part(str(part, "utf-8")) for part in parts])

    vocabulary = (*sorted(ranks, key=ranks.__getitem__), b"")
    return Tokenizer("gpt2", GPT2_RANKS_SHA256, vocabulary, encode)


def _gpt2_ranks() -> dict[bytes, int]:
    packed = resources.files("llmtrain.model").joinpath("gpt2.tiktoken.xz").read_bytes()
    try:
        content = lzma.decompress(packed)
    except lzma.LZMAError:
        content = b""
    if hashlib.sha256(content).hexdigest() != GPT2_RANKS_SHA256:
        message = "llmtrain/model/gpt2.tiktoken.xz is damaged: the hash does not match"
        raise RunFailed(message, hint="reinstall llmtrain")
    lines = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def well_formed(text: str) -> str:
    """Return `text` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def split_text(text: bytes | memoryview, size: int = CHUNK_BYTES) -> Iterator[bytes | memoryview]:
    """Split UTF-8 text into chunks of at least `size` bytes without changing its tokens.

    GPT-2's pattern always starts a token before the last whitespace character of a run, so the text
    is cut there. Chunks without such a point are longer.
    """
    start = 0
    while match := _SAFE_CUT.search(text, start + size):
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, str]:
    """Return the Hugging Face tokenizer files, content by name, for a model of this context length.

    These files encode `<|endoftext|>` in a text as that token, unlike `Tokenizer.encode`.
    """
    vocabulary = _spelled_ids(tokenizer) | {END_OF_TEXT: tokenizer.eot}
    merges = [f"{_spell(left)} {_spell(right)}" for left, right in _merges(tokenizer.vocabulary)]
    is_gpt2 = tokenizer.name == "gpt2"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = is_gpt2
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {"id": tokenizer.eot, "content": END_OF_TEXT, **flags, "special": True}
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    affixes = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    bpe_flags = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    fast = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            **dict.fromkeys(affixes),
            **bpe_flags,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    settings = {
        # GPT2Tokenizer splits text into words, which is useless without merges.
        "tokenizer_class": "GPT2Tokenizer" if is_gpt2 else "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    documents = {
        "tokenizer.json": fast,
        "tokenizer_config.json": settings,
        "special_tokens_map.json": special,
        "vocab.json": vocabulary,
    }
    files = {
        name: json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        for name, document in documents.items()
    }
    return files | {"merges.txt": "\n".join(["#version: 0.2", *merges, ""])}


def has_same_ids(folder: Path, tokenizer: Tokenizer) -> bool:
    """Return True unless a weights folder has tokenizer files with other ids than `tokenizer`."""
    for name in ("tokenizer.json", "vocab.json"):
        if (folder / name).is_file():
            document = read_json(folder / name)
            model = document.get("model") if name == "tokenizer.json" else {"vocab": document}
            ids = model.get("vocab") if isinstance(model, dict) else None
            return isinstance(ids, dict) and _spelled_ids(tokenizer).items() <= ids.items()
    return True


@cache
def fast_tokenizer(tokenizer: Tokenizer) -> "PreTrainedTokenizerFast":
    """Return the tokenizer for transformers; `<|endoftext|>` in a text is ordinary text."""
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # untyped
        tokenizer_object=Backend.from_str(tokenizer_files(tokenizer, 1)["tokenizer.json"]),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _merges(vocabulary: tuple[bytes, ...]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the two tokens that each longer token was merged from, in the order of ids.

    An id is the rank of its merge: merging its bytes by lower ranks ends with these two tokens.
    """
    ranks = {token: rank for rank, token in enumerate(vocabulary) if len(token) > 1}
    for token in ranks:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, len(vocabulary)) for left, right in pairwise(parts)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        yield parts[0], parts[1]


def _spelled_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the id of each token in GPT-2's printable spelling, without end-of-text."""
    return {_spell(token): id for id, token in enumerate(tokenizer.vocabulary) if token}


def _spell(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)
