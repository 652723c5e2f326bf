"""Token shards: layout, random access, damaged folders, and nanoGPT's files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.manifest import Manifest, SourceRecord, SplitRule, read_manifest, write_manifest
from llmtrain.data.shards import HEADER_BYTES, ShardWriter, TokenFile, TokenReader
from llmtrain.data.token_data import open_data, tokenizer_record
from llmtrain.data.verify import data_problems
from llmtrain.errors import UserError


def open_writer(folder: Path, split: str, shard_tokens: int) -> ShardWriter:
    return ShardWriter(folder, split, shard_tokens, [], lambda record: None)


def write_data(folder: Path, documents: list[list[int]], shard_tokens: int = 10) -> Manifest:
    """Write `documents` (without end-of-text) as the train split of a byte-tokenized folder."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = open_writer(folder, "train", shard_tokens)
    for document in documents:
        writer.add(np.array([*document, 256], dtype=np.uint16), len(document), ends_document=True)
    train, val = writer.close(), open_writer(folder, "val", shard_tokens).close()
    manifest = Manifest(
        tokenizer=tokenizer_record("byte"),
        source=SourceRecord(
            id="test", revision=None, text_field="text", limit_documents=None, files=()
        ),
        split=SplitRule(val_fraction=0.0, seed=1),
        shard_tokens=shard_tokens,
        train=train,
        val=val,
    )
    write_manifest(folder, manifest)
    return manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path / "data", [[1, 2, 3], [4] * 8, [], [5, 6], [7] * 30, [8]])
    return tmp_path / "data"


def test_shards_have_the_documented_layout(folder: Path) -> None:
    content = (folder / "train-00000.bin").read_bytes()
    ints = np.frombuffer(content[:1024], dtype="<i4")
    assert ints[:3].tolist() == [20240520, 1, 13]
    assert not ints[3:].any()
    assert np.frombuffer(content[1024:], dtype="<u2").tolist() == [1, 2, 3, 256, *[4] * 8, 256]
    # The next document starts a new shard.
    assert sorted(path.name for path in folder.glob("*.bin")) == [
        f"train-0000{i}.bin" for i in range(3)
    ]


def test_manifest_contains_the_counts(folder: Path) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    assert document["train"]["tokens"] == 4 + 9 + 1 + 3 + 31 + 2
    assert document["train"]["documents"] == 6
    assert document["train"]["text_bytes"] == 44
    assert document["val"] == {"tokens": 0, "documents": 0, "text_bytes": 0, "shards": []}
    assert read_manifest(folder).sha256 == document["sha256"] == open_data(folder).sha256


def test_an_opened_folder_has_its_tokens(folder: Path) -> None:
    data = open_data(folder)
    assert (data.tokenizer, data.vocab_size, data.eot) == ("byte", 257, 256)
    assert (data.tokens("train"), data.tokens("val")) == (50, 0)
    assert not data.tokenizer_assumed
    assert len(data.reader("val")) == 0


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    ends=st.tuples(st.integers(0, 99), st.integers(0, 99)),
)
def test_reading_across_files_equals_slicing(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], ends: tuple[int, int]
) -> None:
    folder = tmp_path_factory.mktemp("files")
    whole = np.arange(sum(lengths), dtype="<u2")
    files, start = [], 0
    for i, length in enumerate(lengths):
        path = folder / f"{i}.bin"
        path.write_bytes(bytes(6) + whole[start : start + length].tobytes())
        files.append(TokenFile(path, length, 6))
        start += length
    reader = TokenReader(tuple(files))
    assert len(reader) == len(whole)
    first, last = sorted(min(end, len(whole)) for end in ends)
    assert reader.read(first, last - first).tolist() == whole[first:last].tolist()
    reader.close()


def test_a_range_outside_the_split_is_an_error(folder: Path) -> None:
    reader = open_data(folder).reader("train")
    assert reader.read(50, 0).tolist() == []
    for start, length in ((-1, 2), (49, 2), (0, -1), (51, 0)):
        with pytest.raises(IndexError):
            reader.read(start, length)


def test_a_reader_closes_its_files(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  (iterdir opens a descriptor)
    reader = open_data(folder).reader("train")
    assert len(os.listdir("/proc/self/fd")) == before + 3  # noqa: PTH208
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    del reader
    open_data(folder).reader("train")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_document_can_be_added_in_parts(tmp_path: Path) -> None:
    writer = open_writer(tmp_path, "train", shard_tokens=2)
    for part, ends in (([1, 2, 3], False), ([4, 256], True), ([5, 256], True)):
        writer.add(np.array(part, dtype=np.uint16), 1, ends_document=ends)
    record = writer.close()
    assert [shard.tokens for shard in record.shards] == [5, 2]
    assert [shard.documents for shard in record.shards] == [1, 1]


def test_an_unfinished_shard_has_a_temporary_name_and_is_deleted(tmp_path: Path) -> None:
    writer = open_writer(tmp_path, "train", shard_tokens=100)
    writer.add(np.array([1, 256], dtype=np.uint16), 1, ends_document=True)
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-train-00000.bin"]
    writer.abort()
    assert list(tmp_path.iterdir()) == []


# --- damage ------------------------------------------------------------------------------------


def test_intact_data_has_no_problems(folder: Path) -> None:
    assert data_problems(folder) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "is missing"),
        (
            lambda p: p.write_bytes(p.read_bytes()[:-2]),
            r"has 1,056 bytes instead of 1,058 \(17 tokens\)|bytes instead of",
        ),
        (lambda p: p.write_bytes(b"\0" + p.read_bytes()[1:]), "has another header than"),
        (
            lambda p: p.write_bytes(p.read_bytes()[:8] + b"\x63\0\0\0" + p.read_bytes()[12:]),
            "has another header than",
        ),
        (
            lambda p: p.write_bytes(p.read_bytes()[:1000] + b"\x01" + p.read_bytes()[1001:]),
            "has another header than",
        ),
    ],
)
def test_a_damaged_shard_is_refused(folder: Path, damage, message: str) -> None:
    damage(folder / "train-00001.bin")
    with pytest.raises(UserError, match=message) as caught:
        open_data(folder)
    assert "train-00001.bin" in str(caught.value)
    assert len(data_problems(folder)) == 1


def test_changed_tokens_are_found_by_verify_only(folder: Path) -> None:
    path = folder / "train-00001.bin"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    (folder / "train-00009.bin").write_bytes(b"")
    open_data(folder)
    problems = data_problems(folder)
    assert [problem.split(" ", 1)[1] for problem in problems] == [
        "does not have the recorded BLAKE3",
        "is not in the manifest",
    ]


def test_a_shard_truncated_while_open_is_an_error(folder: Path) -> None:
    reader = open_data(folder).reader("train")
    os.truncate(folder / "train-00002.bin", HEADER_BYTES)
    with pytest.raises(UserError, match="ends at byte 1,024, before its last token"):
        reader.read(0, 50)


def test_a_missing_manifest_is_an_error(tmp_path: Path) -> None:
    for missing in (tmp_path, tmp_path / "absent"):
        with pytest.raises(
            UserError, match=r"contains no prepared data \(manifest.json is missing\)"
        ) as caught:
            open_data(missing)
        assert f"llmtrain prepare SOURCE --out {missing}" in caught.value.hint


def edit(folder: Path, change) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=2), "has format 2; this llmtrain reads format 1"),
        (lambda d: d.update(surprise=1), "surprise: Extra inputs are not permitted"),
        (lambda d: d.pop("tokenizer"), "tokenizer: Field required"),
        (lambda d: d["train"].update(tokens="50"), "train.tokens: Input should be a valid integer"),
        (lambda d: d["train"].update(tokens=49), "the sums of train do not match its shards"),
        (
            lambda d: d["train"]["shards"][0].update(name="../train-00000.bin"),
            "shard 0 of train is named",
        ),
        (lambda d: d["train"]["shards"].reverse(), "shard 0 of train is named"),
        (lambda d: d["split"].update(seed=2), "does not match its recorded hash"),
        (lambda d: d.pop("sha256"), "does not match its recorded hash"),
    ],
)
def test_an_inconsistent_manifest_is_rejected(folder: Path, change, message: str) -> None:
    edit(folder, change)
    with pytest.raises(UserError, match=message):
        open_data(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_manifest_that_is_not_a_json_object_is_rejected(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest.json is not"):
        open_data(folder)


def test_a_bit_flip_in_a_manifest_is_detected(folder: Path) -> None:
    path = folder / "manifest.json"
    intact = path.read_bytes()
    for i in range(0, len(intact), 7):
        path.write_bytes(intact[:i] + bytes([intact[i] ^ 1 << i % 8]) + intact[i + 1 :])
        try:
            changed = open_data(folder)
        except UserError:
            continue
        # Only whitespace between values may differ.
        assert changed.sha256 == json.loads(intact)["sha256"]


def test_a_different_tokenizer_is_rejected(folder: Path) -> None:
    manifest = read_manifest(folder)
    other = manifest.tokenizer.model_copy(update={"sha256": "0" * 64})
    write_manifest(folder, manifest.model_copy(update={"tokenizer": other}))
    with pytest.raises(UserError, match="prepared with a different byte tokenizer"):
        open_data(folder)


# --- nanoGPT's files ---------------------------------------------------------------------------


def test_a_nanogpt_folder_can_be_opened(tmp_path: Path) -> None:
    tokens = np.arange(1000, dtype="<u2")
    tokens.tofile(tmp_path / "train.bin")
    tokens[:10].tofile(tmp_path / "val.bin")
    data = open_data(tmp_path)
    assert data.tokenizer_assumed
    assert (data.tokenizer, data.vocab_size, data.eot) == ("gpt2", 50257, 50256)
    assert (data.tokens("train"), data.tokens("val")) == (1000, 10)
    assert data.reader("train").read(990, 10).tolist() == list(range(990, 1000))
    tokens[::-1].tofile(tmp_path / "train.bin")
    assert open_data(tmp_path).sha256 != data.sha256


def test_invalid_nanogpt_folders_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"123")
    with pytest.raises(UserError, match="3 bytes, which is not a whole number of uint16 tokens"):
        open_data(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(b"")
    with pytest.raises(UserError, match="own vocabulary"):
        open_data(tmp_path)
