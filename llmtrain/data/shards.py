"""A folder of prepared data as a whole: open it, read its splits, check every byte.

Why: training and evaluation see one object that says which tokenizer, how many tokens, and which
data this is (its hash), whether `llmtrain prepare` wrote the folder or nanoGPT did.

    data = open_data(Path("data/openwebtext")); data.reader("train").read(start=0, length=1025)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from llmtrain.data import nanogpt
from llmtrain.data.manifest import MANIFEST_FILE, SPLITS, TokenizerRecord, read_manifest
from llmtrain.data.token_files import (
    HEADER_BYTES,
    TokenFile,
    TokenReader,
    content_problem,
    shard_problem,
)
from llmtrain.errors import UserError
from llmtrain.model.tokenizer import load_tokenizer


@dataclass(frozen=True)
class TokenData:
    """A folder of tokens: what they are, how many, and a reader for each split.

    Attributes:
        sha256: identity of the data (of the manifest's content; for nanoGPT's files, of their sizes
            and of the first and last MiB of each).
        tokenizer_assumed: nanoGPT's files do not name their tokenizer; GPT-2's is taken for granted.
    """

    folder: Path
    tokenizer: str
    vocab_size: int
    eot: int
    sha256: str
    tokenizer_assumed: bool
    files: Mapping[str, tuple[TokenFile, ...]]
    _text_bytes: Mapping[str, int | None] = field(repr=False)
    mix: "tuple[tuple[TokenData, Fraction], ...]" = ()
    """Other data to train on beside this, and the share of each in a batch; see `mixture.py`."""

    def tokens(self, split: str) -> int:
        """Number of tokens of "train" or "val"."""
        return sum(file.tokens for file in self.files[split])

    def text_bytes(self, split: str) -> int | None:
        """UTF-8 bytes of the split's documents; None where nothing records it."""
        return self._text_bytes[split]

    def reader(self, split: str) -> TokenReader:
        """A reader of "train" or "val"; empty when the split is."""
        return TokenReader(self.files[split], self.vocab_size)


def open_data(folder: Path) -> TokenData:
    """The data of a folder that `llmtrain prepare` or nanoGPT wrote; headers and sizes are checked.

    Raises:
        UserError: there is no data, or a shard is missing or not what the manifest says.
    """
    if not (folder / MANIFEST_FILE).exists() and nanogpt.is_nanogpt(folder):
        return _open_nanogpt(folder)
    manifest = read_manifest(folder)
    for split in SPLITS:
        for shard in manifest.split_record(split).shards:
            problem = shard_problem(folder, shard)
            if problem:
                raise UserError(
                    problem, hint=f"restore it, or delete {folder} and prepare it again"
                )
    _check_tokenizer(folder, manifest.tokenizer)
    return TokenData(
        folder=folder,
        tokenizer=manifest.tokenizer.name,
        vocab_size=manifest.tokenizer.vocab_size,
        eot=manifest.tokenizer.eot,
        sha256=manifest.sha256,
        tokenizer_assumed=False,
        files={
            split: tuple(
                TokenFile(folder / shard.name, shard.tokens, HEADER_BYTES)
                for shard in manifest.split_record(split).shards
            )
            for split in SPLITS
        },
        _text_bytes={split: manifest.split_record(split).text_bytes for split in SPLITS},
    )


def open_split(folder: Path, split: str) -> TokenReader:
    """The tokens of one split of a data folder; see `open_data`."""
    return open_data(folder).reader(split)


def _open_nanogpt(folder: Path) -> TokenData:
    token_files = nanogpt.token_files(folder)
    tokenizer = load_tokenizer("gpt2")
    return TokenData(
        folder=folder,
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        eot=tokenizer.eot,
        sha256=nanogpt.identity(token_files),
        tokenizer_assumed=True,
        files=token_files,
        _text_bytes=dict.fromkeys(SPLITS),
    )


def tokenizer_record(name: str) -> TokenizerRecord:
    """What the manifest says of the tokenizer called `name`."""
    tokenizer = load_tokenizer(name)
    return TokenizerRecord(
        name=name, vocab_size=tokenizer.vocab_size, eot=tokenizer.eot, sha256=tokenizer.sha256
    )


def _check_tokenizer(folder: Path, record: TokenizerRecord) -> None:
    if tokenizer_record(record.name) != record:
        raise UserError(
            f"{folder} was prepared with another {record.name} tokenizer than this llmtrain has",
            hint="use the llmtrain that prepared it, or prepare the data again",
        )


def data_problems(folder: Path) -> list[str]:
    """Everything that is wrong with prepared data, every byte of it read; empty when all is well.

    Raises:
        UserError: the manifest itself is missing or damaged.
    """
    manifest = read_manifest(folder)
    problems = []
    listed = set()
    for split in SPLITS:
        for shard in manifest.split_record(split).shards:
            listed.add(shard.name)
            problem = shard_problem(folder, shard) or content_problem(
                folder, shard, manifest.tokenizer
            )
            if problem:
                problems.append(problem)
    strangers = (path for path in sorted(folder.glob("*.bin")) if path.name not in listed)
    return problems + [f"{path} is not in the manifest" for path in strangers]
