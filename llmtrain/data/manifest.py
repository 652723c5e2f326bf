"""`manifest.json`: the tokenizer, source, split and shards of a data folder, with their hashes."""

import hashlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from llmtrain.errors import UserError
from llmtrain.storage import commit
from llmtrain.storage.integrity import Algorithm, Digest, digest_of, mismatch
from llmtrain.storage.json_files import require_regular_file

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION: Final = 1
SPLITS = ("train", "val")

Count = Annotated[int, Field(ge=0)]
HexHash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TokenizerRecord(_Record):
    """A tokenizer; `sha256` identifies its vocabulary."""

    name: str
    vocab_size: Annotated[int, Field(ge=2, le=65536)]
    eot: Count
    sha256: HexHash


class _FileRecord(_Record):
    """A file with its BLAKE3, or with the SHA-256 that earlier versions recorded."""

    name: str
    blake3: HexHash | None = None
    sha256: HexHash | None = None

    @property
    def digest(self) -> Digest:
        """The recorded hash."""
        if self.blake3 is not None:
            return Digest("blake3", self.blake3)
        return Digest("sha256", str(self.sha256))

    def hash_problem(
        self, path: Path, compute: Callable[[Path, Algorithm], Digest] = digest_of
    ) -> str | None:
        """Return an error message if the file at `path` has another hash, else None."""
        found = compute(path, self.digest.algorithm)
        return None if found == self.digest else mismatch(path, found)

    @model_serializer(mode="wrap")
    def _with_one_hash(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The hash of a manifest depends on its keys: keep those of earlier versions.
        fields: dict[str, Any] = serialize(self)
        del fields["blake3" if self.blake3 is None else "sha256"]
        return fields


class SourceFile(_FileRecord):
    """One input file: name relative to the source, bytes on disk, and hash if the file is local."""

    bytes: Count


class SourceRecord(_Record):
    """The origin of the documents, in the order of `files`.

    `revision` is a commit on the hub, a package version, or a hash of a store's version metadata.
    """

    id: str
    revision: str | None
    text_field: str
    limit_documents: Count | None
    files: tuple[SourceFile, ...]

    @property
    def records_sha256(self) -> bool:
        """True if an earlier version hashed the files."""
        return any(file.sha256 for file in self.files)


class SplitRule(_Record):
    """Arguments of `datasets`' train_test_split(test_size, seed, shuffle=True)."""

    val_fraction: Annotated[float, Field(ge=0, lt=1)]
    seed: int


class ShardRecord(_FileRecord):
    """One token shard. `text_bytes` is the UTF-8 length of its documents without end-of-text."""

    tokens: Count
    documents: Count
    text_bytes: Count

    @property
    def split(self) -> str:
        """The name of the split: "train" or "val"."""
        return self.name.partition("-")[0]

    @model_validator(mode="after")
    def _has_hash(self) -> Self:
        if self.blake3 is None and self.sha256 is None:
            raise ValueError("the shard has no recorded hash")
        return self


class SplitRecord(_Record):
    """The shards of one split in order, and their sums."""

    tokens: Count
    documents: Count
    text_bytes: Count
    shards: tuple[ShardRecord, ...]

    @classmethod
    def from_shards(cls, shards: list[ShardRecord]) -> Self:
        """Return the record of `shards`."""
        return cls(
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            shards=tuple(shards),
        )


class PrepareSpec(_Record):
    """Everything that determines the shards; equal specs give byte-identical ones."""

    format: Literal[1] = FORMAT_VERSION
    tokenizer: TokenizerRecord
    source: SourceRecord
    split: SplitRule
    shard_tokens: Annotated[int, Field(ge=1)]


class Manifest(PrepareSpec):
    """A spec and the shards written for it."""

    train: SplitRecord
    val: SplitRecord

    @property
    def sha256(self) -> str:
        """Hex hash of the content: the identity of the data."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def shards(self) -> list[ShardRecord]:
        """The shards of both splits."""
        return [*self.train.shards, *self.val.shards]

    def split_record(self, split: str) -> SplitRecord:
        """Return the record of "train" or "val"."""
        assert split in SPLITS
        return self.train if split == "train" else self.val

    def document(self) -> dict[str, object]:
        """Return the JSON document with its hash."""
        return {**self.model_dump(mode="json"), "sha256": self.sha256}

    def require_spec(self, spec: PrepareSpec, location: str) -> None:
        """Raise a UserError if this manifest, read from `location`, has another spec."""
        if differences := _differences(spec.model_dump(), self.model_dump()):
            raise UserError(
                f"{location} contains other data: {'; '.join(differences[:3])}",
                hint="choose another folder with --out, or delete this one",
            )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for split in SPLITS:
            record = self.split_record(split)
            if record != SplitRecord.from_shards(list(record.shards)):
                raise ValueError(f"the sums of {split} do not match its shards")
            # Reject other names: they decide which files are opened.
            for index, shard in enumerate(record.shards):
                if shard.name != shard_name(split, index):
                    raise ValueError(f"shard {index} of {split} is named {shard.name!r}")
        return self


def shard_name(split: str, index: int) -> str:
    """Return `train-00000.bin`, `val-00012.bin`, …."""
    return f"{split}-{index:05d}.bin"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically."""
    content = json.dumps(manifest.document(), indent=1) + "\n"
    commit.write_atomically(folder / MANIFEST_FILE, content)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a data folder; raise a UserError if it is missing or damaged."""
    path = folder / MANIFEST_FILE
    if not path.exists():
        raise no_data(str(folder))
    require_regular_file(path)
    return parse_manifest(path.read_bytes(), str(path))


def no_data(location: str) -> UserError:
    """Return the error for a missing manifest."""
    return UserError(
        f"{location} contains no prepared data ({MANIFEST_FILE} is missing)",
        hint=f"prepare it: llmtrain prepare SOURCE --out {shlex.quote(location)}",
    )


def parse_manifest(content: bytes, location: str) -> Manifest:
    """Parse the manifest at `location`; raise a UserError if it is damaged or of a newer format."""
    damaged = "restore it, or delete the folder and prepare it again"
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location} is not valid JSON: {error}", hint=damaged) from None
    if not isinstance(document, dict):
        raise UserError(f"{location} is not a JSON object", hint=damaged)
    if (found := document.get("format")) != FORMAT_VERSION:
        raise UserError(
            f"{location} has format {found!r}; this llmtrain reads format {FORMAT_VERSION}",
            hint="use the llmtrain that wrote it, or prepare the data again",
        )
    recorded = document.pop("sha256", None)
    try:
        manifest = Manifest.model_validate_json(json.dumps(document))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "manifest"
        raise UserError(f"{location}: {key}: {first['msg']}", hint=damaged) from None
    if recorded != manifest.sha256:
        raise UserError(f"{location} does not match its recorded hash", hint=damaged)
    return manifest


def _differences(wanted: dict[str, Any], found: dict[str, Any], prefix: str = "") -> list[str]:
    """Return `key is X, not Y` for each leaf that differs between two nested records."""
    differences = []
    for key, value in wanted.items():
        if isinstance(value, dict):
            differences += _differences(value, found[key], f"{prefix}{key}.")
        elif value != found[key]:
            is_list = isinstance(value, tuple)
            difference = "differ" if is_list else f"is {found[key]!r}, not {value!r}"
            differences.append(f"{prefix}{key} {difference}")
    return differences
