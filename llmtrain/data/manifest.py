"""The manifest of a folder of token shards: what the tokens are, where they came from, their hashes.

Why apart from the shards: the manifest is the contract. It is written last, carries the hash of
its own content, and everything it says is checked before a token is believed.

    manifest = read_manifest(Path("data/openwebtext")); manifest.train.tokens
"""

import hashlib
import json
import shlex
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmtrain.errors import UserError
from llmtrain.storage import commit

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION: Final = 1
SPLITS = ("train", "val")

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TokenizerRecord(_Record):
    """Which tokenizer; `sha256` identifies its vocabulary."""

    name: str
    vocab_size: Annotated[int, Field(ge=2, le=65536)]
    eot: Count
    sha256: Sha256


class SourceFile(_Record):
    """One input file: name relative to the source, bytes on disk, and its hash where it was read here."""

    name: str
    bytes: Count
    sha256: Sha256 | None


class SourceRecord(_Record):
    """Where the documents came from, in the order of `files`.

    `revision` is the commit on the hub, the version of a package, or of files behind a URL what their
    store says of their versions (a hash of it).
    """

    id: str
    revision: str | None
    text_field: str
    limit_documents: Count | None
    files: tuple[SourceFile, ...]


class SplitRule(_Record):
    """How documents were divided: `datasets`' train_test_split(test_size, seed, shuffle=True)."""

    val_fraction: Annotated[float, Field(ge=0, lt=1)]
    seed: int


class ShardRecord(_Record):
    """One token file. `text_bytes` is the UTF-8 length of its documents, end-of-text not counted."""

    name: str
    tokens: Count
    documents: Count
    text_bytes: Count
    sha256: Sha256


class SplitRecord(_Record):
    """The shards of one split in order, and their sums."""

    tokens: Count
    documents: Count
    text_bytes: Count
    shards: tuple[ShardRecord, ...]

    @classmethod
    def of(cls, shards: list[ShardRecord]) -> Self:
        """The record of `shards`, with its sums."""
        return cls(
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            shards=tuple(shards),
        )


class PrepareSpec(_Record):
    """Everything that decides the tokens; equal plans give byte-identical shards."""

    format: Literal[1] = FORMAT_VERSION
    tokenizer: TokenizerRecord
    source: SourceRecord
    split: SplitRule
    shard_tokens: Annotated[int, Field(ge=1)]


class Manifest(PrepareSpec):
    """A plan and what came of it."""

    train: SplitRecord
    val: SplitRecord

    @property
    def plan(self) -> PrepareSpec:
        """What was asked for, without the outcome."""
        return PrepareSpec(**{name: getattr(self, name) for name in PrepareSpec.model_fields})

    @property
    def sha256(self) -> str:
        """Hex hash of the content: the identity of the data."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def split_record(self, split: str) -> SplitRecord:
        """The record of "train" or "val"."""
        assert split in SPLITS
        return self.train if split == "train" else self.val

    def document(self) -> dict[str, object]:
        """What is written and printed: the fields, then the hash of them all."""
        return {**self.model_dump(mode="json"), "sha256": self.sha256}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for split in SPLITS:
            record = self.split_record(split)
            if record != SplitRecord.of(list(record.shards)):
                raise ValueError(f"the sums of {split} are not those of its shards")
            # Names decide which files are opened: only those that the writer gives.
            for index, shard in enumerate(record.shards):
                if shard.name != shard_name(split, index):
                    raise ValueError(f"shard {index} of {split} is called {shard.name!r}")
        return self


def shard_name(split: str, index: int) -> str:
    """`train-00000.bin`, `val-00012.bin`."""
    return f"{split}-{index:05d}.bin"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, whole or not at all."""
    content = json.dumps(manifest.document(), indent=1) + "\n"
    commit.write_atomically(folder / MANIFEST_FILE, content)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data folder. Shards are not looked at: see `shards.open_data`.

    Raises:
        UserError: there is none, it is damaged, or a newer llmtrain wrote it.
    """
    path = folder / MANIFEST_FILE
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} holds no prepared data ({MANIFEST_FILE} is missing)",
            hint=f"prepare it: llmtrain prepare SOURCE --out {shlex.quote(str(folder))}",
        ) from None


def parse_manifest(content: bytes, place: str) -> Manifest:
    """The manifest that was read from `place`.

    Raises:
        UserError: it is damaged, or a newer llmtrain wrote it.
    """
    damaged = "it is damaged or was edited: restore it, or delete the folder and prepare it again"
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error})", hint=damaged) from None
    if not isinstance(document, dict):
        raise UserError(f"{place} is not a JSON object", hint=damaged)
    if document.get("format") != FORMAT_VERSION:
        raise UserError(
            f"{place} has format {document.get('format')!r}; this llmtrain reads format {FORMAT_VERSION}",
            hint="use the llmtrain that wrote it, or prepare the data again",
        )
    recorded = document.pop("sha256", None)
    try:
        manifest = Manifest.model_validate_json(json.dumps(document))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise UserError(f"{place}: {where}: {first['msg']}", hint=damaged) from None
    if recorded != manifest.sha256:
        raise UserError(f"{place} does not have the hash that it records", hint=damaged)
    return manifest
