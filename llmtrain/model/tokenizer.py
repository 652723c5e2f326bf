"""Text to token ids and back: GPT-2's byte-pair encoding, or plain bytes.

Why: a run must not depend on a download, so the GPT-2 ranks are part of the package (and their
hash is checked); and a demo on two cores wants a vocabulary of 257, which bytes give for free.
A tokenizer here is a table of the bytes of every id and a way to encode; decoding is a look-up.

    ids = load_tokenizer("gpt2").encode("Hello world")  # uint16 array [15496, 995]
"""

import base64
import hashlib
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
import numpy.typing as npt

from llmtrain.errors import RunFailed, UserError

TOKENIZERS = ("gpt2", "byte")

GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
"""Of the unpacked rank file; the hash that tiktoken itself demands of its `r50k_base`."""

_R50K_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)

_WHITESPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""The regular expression engine's `\\s` (Unicode White_Space); Python's own has four more."""

_LONG_WHITESPACE = re.compile(rf"[{_WHITESPACE}]{{10000,}}(?=[{_WHITESPACE}][^{_WHITESPACE}])")

_SAFE_CUT = re.compile(rb"[\t-\r ](?=[!-~])")
"""An ASCII whitespace byte before a visible ASCII one. No token crosses the point before it."""

PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Tokenizer:
    """An immutable tokenizer; safe to share between threads.

    `pieces[i]` is the text (bytes) of token `i`; the last is end-of-text, which stands for none.
    """

    name: str
    sha256: str
    """Hex hash that identifies the vocabulary: two tokenizers with one hash give the same ids."""
    pieces: tuple[bytes, ...]
    _encode: Callable[[str], npt.NDArray[np.uint16]]

    @property
    def eot(self) -> int:
        """Id of the end-of-text token, which follows every document and never comes from text."""
        return len(self.pieces) - 1

    @property
    def vocab_size(self) -> int:
        """Number of ids, end-of-text included."""
        return len(self.pieces)

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        """Token ids of `text`, shape (tokens,), without end-of-text.

        Whatever the text spells (`<|endoftext|>` too) is ordinary text. A lone surrogate, which no
        UTF-8 file can hold, is encoded as U+FFFD, as tiktoken does.
        """
        try:
            return self._encode(text)
        except UnicodeEncodeError:
            return self._encode(well_formed(text))

    def decode_bytes(self, ids: npt.ArrayLike) -> bytes:
        """The bytes that `ids` stand for; end-of-text stands for none.

        Raises:
            UserError: an id is not in the vocabulary.
        """
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        wrong = array[(array < 0) | (array > self.eot)]
        if wrong.size:
            raise UserError(
                f"token id {wrong[0]} is outside the vocabulary of {self.name} (0 to {self.eot})",
                hint="were these tokens written with another tokenizer?",
            )
        return b"".join(self.pieces[i] for i in array.tolist())

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of `ids`; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of text of each id, shape (vocab_size,); 0 for end-of-text.

        `token_bytes()[ids].sum()` is the length in UTF-8 of the text that `ids` were made from.
        """
        return np.array([len(piece) for piece in self.pieces], dtype=np.int64)


@cache
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: "gpt2" or "byte". Never reads the network.

    Raises:
        UserError: there is none of that name.
        RunFailed: the ranks that ship with the package are damaged.
    """
    if name == "gpt2":
        return _gpt2()
    if name == "byte":
        return _byte()
    raise UserError(f"unknown tokenizer {name!r}", hint=f"choose one of: {', '.join(TOKENIZERS)}")


def _byte() -> Tokenizer:
    def encode(text: str) -> npt.NDArray[np.uint16]:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)

    sha256 = hashlib.sha256(
        b"byte: ids 0-255 are the bytes of UTF-8, 256 is end-of-text"
    ).hexdigest()
    return Tokenizer("byte", sha256, (*(bytes([byte]) for byte in range(256)), b""), encode)


def _gpt2() -> Tokenizer:
    import tiktoken

    ranks = _gpt2_ranks()
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=_R50K_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": len(ranks)},
        explicit_n_vocab=len(ranks) + 1,
    )

    def encode_part(text: str) -> npt.NDArray[np.uint16]:
        # Releases the GIL, so that threads encode in parallel.
        ids = encoding.encode_to_numpy(text, allowed_special=frozenset(), disallowed_special=())
        return ids.astype(np.uint16)

    def encode(text: str) -> npt.NDArray[np.uint16]:
        try:
            return encode_part(text)
        except UnicodeEncodeError:
            raise
        except ValueError:
            # The regular expression's stack ends at about a million whitespace characters in a row.
            return np.concatenate([encode_part(part) for part in _cut_long_whitespace(text)])

    return Tokenizer(
        "gpt2", GPT2_RANKS_SHA256, (*sorted(ranks, key=ranks.__getitem__), b""), encode
    )


def _gpt2_ranks() -> dict[bytes, int]:
    packed = resources.files("llmtrain.model").joinpath("gpt2.tiktoken.xz").read_bytes()
    try:
        content = lzma.decompress(packed)
    except lzma.LZMAError:
        content = b""
    if hashlib.sha256(content).hexdigest() != GPT2_RANKS_SHA256:
        raise RunFailed(
            "llmtrain/data/gpt2.tiktoken.xz is damaged: its hash is not that of the GPT-2 ranks",
            hint="install llmtrain again",
        )
    lines = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def well_formed(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD: valid in UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def cut(text: bytes | memoryview, size: int = PIECE_BYTES) -> Iterator[bytes | memoryview]:
    """Cut UTF-8 text into pieces of at least `size` bytes whose tokens, joined, are those of the whole.

    Before the last whitespace character of a run GPT-2's pattern always starts a new token, on
    either side of the cut as in the whole; so one huge document is encoded in bounded memory. Text
    without such a point in reach (no spaces at all) makes a longer piece.
    """
    start = 0
    while len(text) - start > size:
        match = _SAFE_CUT.search(text, start + size)
        if match is None:
            break
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def _cut_long_whitespace(text: str) -> Iterator[str]:
    start = 0
    for match in _LONG_WHITESPACE.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def tokenizer_ending_with(eot: int, what: object) -> Tokenizer:
    """The tokenizer whose end-of-text token is the one that a folder of weights names; no two share one.

    Raises:
        UserError: none of ours has it.
    """
    for name in TOKENIZERS:
        if load_tokenizer(name).eot == eot:
            return load_tokenizer(name)
    raise UserError(
        f"{what} ends a text with token {eot:,}, so its tokenizer is none of {', '.join(TOKENIZERS)}",
        hint="put the files of its tokenizer (tokenizer.json) beside its weights, or name one of these: --tokenizer",
    )
