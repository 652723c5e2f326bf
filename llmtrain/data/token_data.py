"""Open folders of tokens: written by `llmtrain prepare`, or nanoGPT's `train.bin` and `val.bin`."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from llmtrain.config.sections import DataConfig
from llmtrain.data.cache import local_folder
from llmtrain.data.manifest import MANIFEST_FILE, SPLITS, TokenizerRecord, read_manifest
from llmtrain.data.shards import HEADER_BYTES, TOKEN_BYTES, TokenFile, TokenReader, shard_problem
from llmtrain.errors import UserError
from llmtrain.model.tokenizer import load_tokenizer

_SAMPLE_BYTES = 1 << 20

Files = Mapping[str, tuple[TokenFile, ...]]


@dataclass(frozen=True)
class TokenData:
    """The tokens of a data folder.

    Attributes:
        sha256: identity of the data. For nanoGPT's files, a hash of their sizes and of the first
            and last MiB of each: hashing all 18 GB on every start would take too long.
        tokenizer_assumed: true for nanoGPT's files, which do not name their tokenizer.
        mix: further training data, each with its share of a batch.
    """

    folder: Path
    tokenizer: str
    vocab_size: int
    eot: int
    sha256: str
    tokenizer_assumed: bool
    files: Files
    mix: "tuple[tuple[TokenData, Fraction], ...]" = ()

    def tokens(self, split: str) -> int:
        """Return the number of tokens of "train" or "val", without `mix`."""
        return sum(file.tokens for file in self.files[split])

    def reader(self, split: str) -> TokenReader:
        """Return a reader of "train" or "val", which may be empty, without `mix`."""
        return TokenReader(self.files[split], self.vocab_size)

    @property
    def sources(self) -> "list[TokenData]":
        """This folder and those of `mix`."""
        return [self, *(part for part, _ in self.mix)]

    @property
    def all_files(self) -> tuple[TokenFile, ...]:
        """The files that training reads: both splits, and the training split of each `mix`."""
        mixed = (file for part, _ in self.mix for file in part.files["train"])
        return (*self.files["val"], *self.files["train"], *mixed)

    def train_tokens(self) -> TokenReader:
        """Return a reader of the training tokens of all `sources` in order."""
        files = tuple(file for source in self.sources for file in source.files["train"])
        return TokenReader(files, self.vocab_size)


def open_training_data(config: DataConfig) -> TokenData:
    """Open `data.path` and the folders in `data.mix`; copy data behind URLs to the cache first."""
    data = open_data(local_folder(config.path))
    if not config.mix:
        return data
    parts = [(open_data(local_folder(s.path)), Fraction(str(s.weight))) for s in config.mix]
    for part, _ in parts:
        if part.tokenizer != data.tokenizer:
            raise UserError(
                f"{part.folder} contains tokens of {part.tokenizer}, not of {data.tokenizer}",
                hint="prepare both with the same --tokenizer",
            )
    identity = json.dumps([data.sha256, *([part.sha256, str(share)] for part, share in parts)])
    return replace(data, sha256=hashlib.sha256(identity.encode()).hexdigest(), mix=tuple(parts))


def open_data(folder: Path) -> TokenData:
    """Open a folder written by `llmtrain prepare` or nanoGPT; check headers and sizes."""
    nanogpt_files = any((folder / f"{split}.bin").is_file() for split in SPLITS)
    if nanogpt_files and not (folder / MANIFEST_FILE).exists():
        return _open_nanogpt(folder)
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        if problem := shard_problem(folder, shard):
            raise UserError(problem, hint=f"restore it, or delete {folder} and prepare it again")
    if tokenizer_record(manifest.tokenizer.name) != manifest.tokenizer:
        raise UserError(
            f"{folder} was prepared with a different {manifest.tokenizer.name} tokenizer",
            hint="use the llmtrain that prepared it, or prepare the data again",
        )
    files = {
        split: tuple(
            TokenFile(folder / shard.name, shard.tokens, HEADER_BYTES, shard)
            for shard in manifest.split_record(split).shards
        )
        for split in SPLITS
    }
    return _token_data(folder, manifest.tokenizer, manifest.sha256, files)


def _token_data(
    folder: Path, tokenizer: TokenizerRecord, sha256: str, files: Files, *, assumed: bool = False
) -> TokenData:
    name, vocab_size, eot = tokenizer.name, tokenizer.vocab_size, tokenizer.eot
    return TokenData(folder, name, vocab_size, eot, sha256, assumed, files)


def tokenizer_record(name: str) -> TokenizerRecord:
    """Return the manifest's record of a tokenizer."""
    tokenizer = load_tokenizer(name)
    return TokenizerRecord(
        name=name, vocab_size=tokenizer.vocab_size, eot=tokenizer.eot, sha256=tokenizer.sha256
    )


def _open_nanogpt(folder: Path) -> TokenData:
    if (folder / "meta.pkl").exists():
        raise UserError(
            f"{folder} has its own vocabulary (meta.pkl), and llmtrain does not read pickles",
            hint="prepare the text itself: llmtrain prepare FILE --tokenizer byte",
        )
    files = {split: _nanogpt_files(folder / f"{split}.bin") for split in SPLITS}
    tokenizer = tokenizer_record("gpt2")
    return _token_data(folder, tokenizer, _sampled_hash(files), files, assumed=True)


def _nanogpt_files(path: Path) -> tuple[TokenFile, ...]:
    if not path.is_file():
        return ()
    size = path.stat().st_size
    if size % TOKEN_BYTES:
        raise UserError(
            f"{path} has {size:,} bytes, which is not a whole number of uint16 tokens",
            hint="write it again: it is truncated, or contains something else",
        )
    return (TokenFile(path, size // TOKEN_BYTES, 0),)


def _sampled_hash(files: Files) -> str:
    digest = hashlib.sha256()
    for split, split_files in files.items():
        for token_file in split_files:
            digest.update(f"{split} {token_file.tokens} ".encode())
            with token_file.path.open("rb") as file:
                digest.update(file.read(_SAMPLE_BYTES))
                file.seek(max(0, TOKEN_BYTES * token_file.tokens - _SAMPLE_BYTES))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
