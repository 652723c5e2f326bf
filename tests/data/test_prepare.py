"""Preparation: split, order, target folder and invalid options. Also `verify_below`."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from places import REPOSITORY, SHARED_DATA
from preparations import contents, prepare

from llmtrain.data import prepare as module
from llmtrain.data.manifest import Manifest, SplitRule, read_manifest
from llmtrain.data.prepare import PrepareProgress, openwebtext_mismatch, validation_documents
from llmtrain.data.token_data import open_data
from llmtrain.data.verify import data_problems, verify_below
from llmtrain.errors import RunFailed, UserError
from llmtrain.model.tokenizer import load_tokenizer


def make_documents(count: int, seed: int = 0) -> list[str]:
    choose = random.Random(seed)
    words = [
        "the",
        "learning",
        "rate",
        "é",
        "中文",
        "\n\n",
        "<|endoftext|>",
        "it's",
        "1234",
        " ",
        ".",
    ]
    return [" ".join(choose.choices(words, k=choose.randrange(60))) for _ in range(count)]


def write_lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "web.jsonl", make_documents(500))


def encode_each(documents: list[str], name: str) -> list[int]:
    tokenizer = load_tokenizer(name)
    return [i for text in documents for i in [*tokenizer.encode(text).tolist(), tokenizer.eot]]


def tokens(folder: Path, split: str) -> list[int]:
    """Read all tokens of a split with numpy alone."""
    shards = sorted(folder.glob(f"{split}-*.bin"))
    return [i for shard in shards for i in np.fromfile(shard, dtype="<u2", offset=1024).tolist()]


# --- output ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_split_and_tokens_match_datasets_and_the_tokenizer(
    source: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    manifest = prepare(
        str(source), out, tokenizer=name, val_fraction=0.03, seed=11, shard_tokens=1000
    )
    whole = datasets.Dataset.from_dict({"text": make_documents(500), "i": range(500)})
    parts = whole.train_test_split(test_size=0.03, seed=11, shuffle=True)
    for split, part in (("train", parts["train"]), ("val", parts["test"])):
        expected = [row["text"] for row in sorted(part, key=lambda row: row["i"])]
        assert tokens(out, split) == encode_each(expected, name)
        record = manifest.split_record(split)
        assert record.documents == len(expected)
        assert record.text_bytes == sum(len(text.encode()) for text in expected)
    assert all(shard.tokens >= 1000 for shard in manifest.train.shards[:-1])
    assert manifest.val.documents == 15
    assert data_problems(out) == []
    assert read_manifest(out) == manifest
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_the_number_of_workers_does_not_affect_the_output(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # Small chunks, so that documents are divided and many batches are queued.
    monkeypatch.setattr("llmtrain.data.encode.CHUNK_BYTES", 500)
    monkeypatch.setattr("llmtrain.model.tokenizer.split_text.__defaults__", (50,))
    for workers in (1, 3):
        prepare(
            str(source), tmp_path / str(workers), tokenizer=name, shard_tokens=3000, workers=workers
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    val = validation_documents(500, SplitRule(val_fraction=0.0005, seed=2357))
    documents = [
        text for text, held_out in zip(make_documents(500), val, strict=True) if not held_out
    ]
    assert tokens(tmp_path / "1", "train") == encode_each(documents, name)


def test_a_large_document_is_encoded_in_chunks(tmp_path: Path, real_texts: list[str]) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n".join(real_texts))
    manifest = prepare(str(path), tmp_path / "out", val_fraction=0, shard_tokens=1000, workers=2)
    assert manifest.train.documents == 1
    assert tokens(tmp_path / "out", "train") == encode_each(["\n".join(real_texts)], "gpt2")


def test_the_val_split_can_be_empty(source: Path, tmp_path: Path) -> None:
    manifest = prepare(str(source), tmp_path / "out", tokenizer="byte", val_fraction=0)
    assert (manifest.train.documents, manifest.val.documents, manifest.val.shards) == (500, 0, ())
    assert open_data(tmp_path / "out").tokens("val") == 0


def test_a_limit_selects_the_first_documents(source: Path, tmp_path: Path) -> None:
    manifest = prepare(
        str(source), tmp_path / "out", tokenizer="byte", val_fraction=0, limit_documents=7
    )
    assert tokens(tmp_path / "out", "train") == encode_each(make_documents(500)[:7], "byte")
    assert manifest.source.limit_documents == 7


def test_progress_is_reported(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtrain.data.encode.CHUNK_BYTES", 2000)
    seen: list[PrepareProgress] = []
    manifest = prepare(str(source), tmp_path / "out", tokenizer="byte", on_progress=seen.append)
    assert seen.pop(0) == PrepareProgress(500, None, 0)
    assert len(seen) > 5
    assert all(a.tokens < b.tokens for a, b in itertools.pairwise(seen))
    total = manifest.train.tokens + manifest.val.tokens
    assert seen[-1] == PrepareProgress(500, 500, total)


@pytest.mark.parametrize("documents", [1000, 1001, 4321])
@pytest.mark.parametrize("fraction", [0.0005, 0.1, 1 / 3])
def test_the_split_equals_that_of_datasets(documents: int, fraction: float) -> None:
    whole = datasets.Dataset.from_dict({"i": range(documents)})
    parts = whole.train_test_split(test_size=fraction, seed=2357, shuffle=True)
    is_val = validation_documents(documents, SplitRule(val_fraction=fraction, seed=2357))
    assert np.flatnonzero(is_val).tolist() == sorted(parts["test"]["i"])


def test_openwebtext_has_the_published_split_size() -> None:
    rule = SplitRule(val_fraction=0.0005, seed=2357)
    assert validation_documents(8_013_769, rule).sum() == 4007


def test_unexpected_openwebtext_totals_are_reported(source: Path, tmp_path: Path) -> None:
    manifest = prepare(str(source), tmp_path / "out")
    assert openwebtext_mismatch(manifest) is None

    def openwebtext(train: int, val: int, **changes: object) -> Manifest:
        source = manifest.source.model_copy(update={"id": "hub:Skylion007/openwebtext", **changes})
        train_record = manifest.train.model_copy(update={"tokens": train})
        val_record = manifest.val.model_copy(update={"tokens": val})
        return manifest.model_copy(
            update={"source": source, "train": train_record, "val": val_record}
        )

    assert openwebtext_mismatch(openwebtext(9_035_582_198, 4_434_897)) is None
    assert "9,035,582,198" in str(openwebtext_mismatch(openwebtext(9_035_582_197, 4_434_897)))
    assert openwebtext_mismatch(openwebtext(1, 1, limit_documents=10)) is None


# --- target folder -----------------------------------------------------------------------------


def test_existing_data_is_not_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(str(source), tmp_path / "out", tokenizer="byte")
    before = contents(tmp_path / "out")
    monkeypatch.setattr(module, "_Build", None)
    messages: list[str] = []
    assert (
        prepare(str(source), tmp_path / "out", tokenizer="byte", workers=2, log=messages.append)
        == first
    )
    assert "already contains this data" in messages[-1]
    assert contents(tmp_path / "out") == before
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "gpt2"}, "tokenizer.name is 'byte', not 'gpt2'"),
        ({"seed": 3}, "split.seed is 2357, not 3"),
        ({"val_fraction": 0.1}, "split.val_fraction is 0.0005, not 0.1"),
        ({"limit_documents": 3}, "source.limit_documents is None, not 3"),
        ({"shard_tokens": 7}, "shard_tokens is 100000000, not 7"),
    ],
)
def test_other_data_is_not_replaced(
    source: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    prepare(str(source), tmp_path / "out", tokenizer="byte")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="contains other data") as caught:
        prepare(str(source), tmp_path / "out", **{"tokenizer": "byte", **options})
    assert message in str(caught.value)
    assert contents(tmp_path / "out") == before


def test_a_changed_source_is_other_data(source: Path, tmp_path: Path) -> None:
    prepare(str(source), tmp_path / "out", tokenizer="byte")
    write_lines(source, make_documents(500, seed=1))
    with pytest.raises(UserError, match=r"contains other data: source\.files differ"):
        prepare(str(source), tmp_path / "out", tokenizer="byte")


def test_a_folder_without_a_manifest_is_not_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare(str(source), tmp_path / "out", tokenizer="byte")  # an empty folder is replaced
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="exists and is not a data folder") as caught:
        prepare(str(source), tmp_path / "mine", tokenizer="byte")
    assert caught.value.hint is not None and "delete" not in caught.value.hint
    assert (tmp_path / "mine" / "thesis.tex").exists()
    with pytest.raises(UserError, match="exists and is not a data folder"):
        prepare(str(source), tmp_path / "mine" / "thesis.tex", tokenizer="byte")


def test_damaged_data_is_reported(source: Path, tmp_path: Path) -> None:
    prepare(str(source), tmp_path / "out", tokenizer="byte")
    (tmp_path / "out" / "train-00000.bin").unlink()
    with pytest.raises(UserError, match=r"train-00000.bin is missing"):
        prepare(str(source), tmp_path / "out", tokenizer="byte")


def test_a_failure_before_the_first_shard_leaves_nothing(source: Path, tmp_path: Path) -> None:
    source.write_text(source.read_text() + "{broken\n")
    with pytest.raises(UserError, match="line 501 is not valid JSON"):
        prepare(str(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["web.jsonl"]


def test_leftovers_are_deleted(source: Path, tmp_path: Path) -> None:
    leftover = tmp_path / ".tmp-out"
    (leftover / "documents").mkdir(parents=True)
    (leftover / "shards").mkdir()
    (leftover / ".resumable").touch()
    for name in ("train-00007.bin", "shards/train-00000.bin", "shards/.tmp-train-00001.bin"):
        (leftover / name).write_bytes(b"half")
    prepare(str(source), tmp_path / "out", tokenizer="byte")
    assert data_problems(tmp_path / "out") == []
    assert not leftover.exists()


def test_a_disk_error_is_reported(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmtrain.data.shards.fsync_path", full)
    with pytest.raises(RunFailed, match="No space left on device"):
        prepare(str(source), tmp_path / "out", tokenizer="byte")
    assert not (tmp_path / "out").exists()


# --- invalid options ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": -0.1}, "--val-fraction -0.1"),
        ({"val_fraction": 1.0}, "--val-fraction 1.0"),
        ({"val_fraction": float("nan")}, "--val-fraction nan"),
        ({"val_fraction": 0.999}, r"leaves none of 500 document\(s\) for train"),
        ({"seed": -1}, "seed -1"),
        ({"shard_tokens": 0}, "--shard-tokens 0"),
        ({"shard_tokens": 2**31}, "is not between 1 and"),
        ({"workers": 0}, "--workers 0"),
        ({"limit_documents": 0}, "--limit-documents 0"),
        ({"tokenizer": "gpt3"}, "unknown tokenizer 'gpt3'"),
    ],
)
def test_options_out_of_range_are_reported(
    source: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        prepare(str(source), tmp_path / "new" / "folders" / "out", **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_that_is_too_long_is_reported(source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunFailed, match="File name too long"):
        prepare(str(source), tmp_path / "new" / ("long" * 63))  # too long with the prefix .tmp-
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "contains no documents"), ('{"text": ""}\n', "every document is empty")],
)
def test_empty_sources_are_reported(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "web.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        prepare(str(tmp_path / "web.jsonl"), tmp_path / "out", val_fraction=0)
    assert not (tmp_path / "out").exists()


# --- verify ------------------------------------------------------------------------------------


def test_verify_finds_and_checks_all_folders(source: Path, tmp_path: Path) -> None:
    from llmtrain.storage.commit import staged_folder
    from llmtrain.storage.run_folder import RunFolder

    prepare(str(source), tmp_path / "all" / "data", tokenizer="byte")
    run = RunFolder(tmp_path / "all" / "run")
    for step in (1, 2):
        with staged_folder(run.snapshot(step)) as folder:
            (folder / "weights").write_text(str(step))
    (tmp_path / "all" / ".tmp-data").mkdir()
    (tmp_path / "all" / ".tmp-data" / "manifest.json").write_text("half")
    checks = verify_below(tmp_path / "all")
    assert [check.folder for check in checks] == [
        tmp_path / "all" / "data",
        run.snapshot(1),
        run.snapshot(2),
    ]
    assert not any(check.problems for check in checks)
    assert [check.files for check in checks] == [3, 2, 2]

    (run.snapshot(1) / "weights").write_text("x")
    (run.snapshot(2) / "integrity.json").unlink()
    (tmp_path / "all" / "data" / "manifest.json").write_text("{}")
    problems = [problem for check in verify_below(tmp_path / "all") for problem in check.problems]
    assert len(problems) == 3
    for problem, words in zip(
        problems, ["has format None", "does not have the recorded", "is missing"], strict=True
    ):
        assert words in problem


def test_verify_reports_folders_without_hashes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no hashes are recorded at or below"):
        verify_below(tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        verify_below(tmp_path / "absent")


# --- real text ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHARED_DATA / "webmix-train.jsonl.zst").exists(), reason="needs the real text"
)
def test_webmix_has_the_published_number_of_tokens(tmp_path: Path) -> None:
    manifest = prepare(
        str(SHARED_DATA / "webmix-train.jsonl.zst"), tmp_path / "out", val_fraction=0
    )
    assert (manifest.train.tokens, manifest.train.documents) == (28_699_060, 43_497)
    assert manifest.val.tokens == 0
    assert data_problems(tmp_path / "out") == []
    assert (tmp_path / "out" / "train-00000.bin").stat().st_size == 1024 + 2 * 28_699_060


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks = []
    code = "import resource, sys; from llmtrain.data import prepare as p; "
    code += "p.prepare(sys.argv[1], sys.argv[2], p.PrepareOptions('byte')); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    for megabytes in (20, 200):
        path = tmp_path / f"{megabytes}.jsonl"
        with path.open("w") as file:
            for i in range(megabytes * 100):
                file.write(json.dumps({"text": f"{i} " + "text " * 2000}) + "\n")
        result = subprocess.run(
            [sys.executable, "-c", code, str(path), str(tmp_path / f"out-{megabytes}")],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(result.stdout) / 1024)
    assert peaks[1] < peaks[0] + 40  # MiB; the corpus is 180 MB larger
