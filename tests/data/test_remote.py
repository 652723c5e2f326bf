"""Inputs, outputs and training data behind URLs: `memory://`, and `local://` on disk."""

import gzip
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparations import prepare

from llmtrain.data.cache import build_folder, local_folder
from llmtrain.data.manifest import read_manifest
from llmtrain.data.token_data import open_data
from llmtrain.data.verify import data_problems
from llmtrain.errors import RunFailed, UserError
from llmtrain.storage import urls
from llmtrain.storage.urls import is_url

TEXTS = [f"Document {i} é. " * (i % 17) for i in range(400)]
OPTIONS = {"tokenizer": "byte", "val_fraction": 0.1, "shard_tokens": 5000}

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/bucket", recursive=True)


@pytest.fixture
def corpus(tmp_path: Path, memory: Any) -> Path:
    """A folder with three kinds of files, and a copy at `memory://bucket/web`."""
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(lines[:150]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[150:200]).encode()))
    pq.write_table(pa.table({"text": TEXTS[200:]}), folder / "c.parquet", row_group_size=50)
    (folder / "readme.md").write_text("of another kind")
    memory.put(str(folder), "/bucket/web", recursive=True)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def contents_of_memory(memory: Any, path: str) -> dict[str, bytes]:
    return {
        each.rpartition("/")[2]: memory.cat_file(each)
        for each in memory.find(path)
        if ".bin" in each
    }


# --- inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "path"), [("memory://bucket/web", "."), ("memory://bucket/web/*.jsonl", "a.jsonl")]
)
def test_a_url_is_read_like_a_path(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, path: str
) -> None:
    monkeypatch.setattr("llmtrain.data.readers.PARTITION_BYTES", 3000)
    messages: list[str] = []
    manifest = prepare(url, tmp_path / "url", **OPTIONS, log=messages.append)
    here = prepare(str(corpus / path), tmp_path / "here", **OPTIONS)
    assert contents(tmp_path / "url") == contents(tmp_path / "here")
    assert [(f.name, f.bytes) for f in manifest.source.files] == [
        (f.name, f.bytes) for f in here.source.files
    ]
    assert manifest.source.revision and all(file.sha256 is None for file in manifest.source.files)
    assert ("readme.md" in messages[0]) == (path == ".")
    prepare(url, tmp_path / "url", **OPTIONS, log=messages.append)
    assert "nothing to do" in messages[-1]


def test_a_changed_input_is_other_data(corpus: Path, tmp_path: Path, memory: Any) -> None:
    prepare("memory://bucket/web/a.jsonl", tmp_path / "out", **OPTIONS)
    content = memory.cat_file("/bucket/web/a.jsonl")
    memory.pipe("/bucket/web/a.jsonl", content.replace(b"Document", b"Dokument"))
    with pytest.raises(UserError, match=r"contains other data: source\.revision is"):
        prepare("memory://bucket/web/a.jsonl", tmp_path / "out", **OPTIONS)


def test_file_urls_are_paths(corpus: Path, tmp_path: Path) -> None:
    prepare(f"file://{corpus}", f"file://{tmp_path / 'url'}", **OPTIONS)
    prepare(str(corpus), tmp_path / "here", **OPTIONS)
    assert (tmp_path / "url" / "manifest.json").read_text() == (
        tmp_path / "here/manifest.json"
    ).read_text()
    assert open_data(local_folder(f"file://{tmp_path / 'url'}")).tokens("train") > 0
    assert not is_url("data/web") and not is_url(f"file://{corpus}") and is_url("s3://a/b")


@pytest.mark.parametrize(
    ("url", "message", "hint"),
    [
        ("s3://bucket/a.jsonl", "Install s3fs", "pip install s3fs"),
        ("gs://bucket/a.jsonl", "install gcsfs", "pip install gcsfs"),
        ("nowhere://a.jsonl", "Protocol not known: nowhere", "s3://"),
        ("memory://bucket/none", "no such file or folder", "name a file"),
        ("memory://bucket/web/readme.md", "found no file of a known kind", "name a file"),
    ],
)
def test_missing_inputs_are_reported(
    corpus: Path, tmp_path: Path, url: str, message: str, hint: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        prepare(url, tmp_path / "out", **OPTIONS)
    assert hint in caught.value.hint
    assert not list(tmp_path.glob("*out*"))


def test_a_damaged_input_is_reported(tmp_path: Path, memory: Any) -> None:
    memory.pipe("/bucket/a.jsonl", b'{"text": "one"}\n{broken\n')
    with pytest.raises(UserError, match=r"memory:///bucket/a\.jsonl, line 2 is not valid JSON"):
        prepare("memory://bucket/a.jsonl", tmp_path / "out", **OPTIONS)
    memory.pipe("/bucket/a.parquet", b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"cannot read memory:///bucket/a\.parquet"):
        prepare("memory://bucket/a.parquet", tmp_path / "out", **OPTIONS)


# --- outputs -----------------------------------------------------------------------------------


def test_shards_are_uploaded(corpus: Path, tmp_path: Path, memory: Any, cache: Path) -> None:
    messages: list[str] = []
    manifest = prepare(str(corpus), "memory://bucket/out", **OPTIONS, log=messages.append)
    assert manifest == prepare(str(corpus), tmp_path / "out", **OPTIONS)
    assert contents_of_memory(memory, "/bucket/out") == contents(tmp_path / "out")
    assert (
        memory.cat_file("/bucket/out/manifest.json")
        == (tmp_path / "out/manifest.json").read_bytes()
    )
    assert messages[-1] == "copying the shards to memory://bucket/out"
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert prepare(str(corpus), "memory://bucket/out", **OPTIONS, log=messages.append) == manifest
    assert messages[-1] == "memory://bucket/out already contains this data: nothing to do"
    with pytest.raises(UserError, match=r"memory://bucket/out contains other data: split\.seed"):
        prepare(str(corpus), "memory://bucket/out", **OPTIONS, seed=3)


def test_a_failed_upload_is_resumed(
    corpus: Path, tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, copied = type(memory).put_file, []

    def fail(self: Any, source: str, target: str) -> None:
        if len(copied) == 2:
            raise ConnectionError("the bucket is gone")
        copied.append(target)
        put(self, source, target)

    url = "memory://bucket/out"
    with monkeypatch.context() as broken:
        broken.setattr(type(memory), "put_file", fail)
        with pytest.raises(RunFailed, match=f"cannot write {url}: the bucket is gone") as caught:
            prepare(str(corpus), url, **OPTIONS)
    assert str(build_folder(url)) in caught.value.hint
    assert not memory.exists("/bucket/out/manifest.json")
    with pytest.raises(UserError, match="contains no prepared data"):
        local_folder(url)
    messages: list[str] = []
    manifest = prepare(str(corpus), url, **OPTIONS, log=messages.append)
    assert messages == [f"copying the shards to {url}"]
    assert manifest == prepare(str(corpus), tmp_path / "out", **OPTIONS)
    assert contents_of_memory(memory, "/bucket/out") == contents(tmp_path / "out")


def test_an_earlier_build_with_other_options_is_not_uploaded(corpus: Path, memory: Any) -> None:
    url = "memory://bucket/out"
    prepare(str(corpus), build_folder(url), **OPTIONS)
    manifest = prepare(str(corpus), url, **OPTIONS, seed=3)
    assert manifest.split.seed == 3
    assert json.loads(memory.cat_file("/bucket/out/manifest.json")) == manifest.document()


# --- training data -----------------------------------------------------------------------------


def test_data_behind_a_url_is_copied_once(corpus: Path, memory: Any, cache: Path) -> None:
    manifest = prepare(str(corpus), "memory://bucket/out", **OPTIONS)
    lines: list[str] = []
    folder = local_folder("memory://bucket/out", lines.append)
    assert folder == cache / "data" / manifest.sha256
    assert data_problems(folder) == []
    assert read_manifest(folder) == manifest
    [line] = lines
    shards = len(manifest.train.shards) + len(manifest.val.shards)
    assert line.startswith(f"copying memory://bucket/out to {folder}: {shards} file(s), 0.")
    assert local_folder("memory://bucket/out/", lines.append) == folder
    assert len(lines) == 1


def test_an_interrupted_copy_resumes_with_the_next_file(
    corpus: Path, memory: Any, cache: Path
) -> None:
    manifest = prepare(str(corpus), "memory://bucket/out", **OPTIONS)
    third = "/bucket/out/train-00002.bin"
    content = memory.cat_file(third)
    memory.pipe(third, content[:-2] + b"xx")
    with pytest.raises(UserError, match=r"train-00002\.bin does not have the recorded BLAKE3"):
        local_folder("memory://bucket/out")
    staging = cache / "data" / f".tmp-{manifest.sha256}" / "shards"
    before = {path.name: path.stat().st_ino for path in staging.iterdir()}
    assert sorted(before) == ["train-00000.bin", "train-00001.bin"]
    memory.pipe(third, content)
    folder = local_folder("memory://bucket/out")
    assert data_problems(folder) == []
    assert {name: (folder / name).stat().st_ino for name in before} == before


def test_only_one_of_several_threads_copies(corpus: Path, memory: Any) -> None:
    prepare(str(corpus), "memory://bucket/out", **OPTIONS)
    lines: list[str] = []
    folders: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: folders.append(local_folder("memory://bucket/out", lines.append))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1 and len(folders) == 4
    assert len(lines) == 1


def test_a_full_cache_disk_is_reported(
    corpus: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(str(corpus), "memory://bucket/out", **OPTIONS)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(urls, "fsync_path", full)
    with pytest.raises(RunFailed, match="No space left on device") as caught:
        local_folder("memory://bucket/out")
    assert "free space there" in caught.value.hint


@pytest.mark.slow
def test_training_and_evaluation_behind_a_url(
    text_file: Path, data_folder: Path, tmp_path: Path, tiny: Callable[..., Any], llmtrain: Command
) -> None:
    config = tmp_path / "tiny.yaml"
    url = f"local://{data_folder}"
    config.write_text(json.dumps(tiny(data__path=url).model_dump(mode="json")))
    trained = llmtrain("pretrain", "--config", config, "--run-dir", "runs/url", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr.count(f"copying {url} to ") == 1
    evaluated = llmtrain("eval", "runs/url", "--json", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)[0]["loss"] > 0
    assert "copying" not in evaluated.stderr


@pytest.mark.slow
def test_the_command_reads_and_writes_urls(corpus: Path, tmp_path: Path, llmtrain: Command) -> None:
    url = f"local://{tmp_path}/bucket/out"
    arguments = ("--out", url, "--tokenizer", "byte", "--val-fraction", "0.1")
    result = llmtrain("prepare", f"local://{corpus}", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"byte tokens in {url}" in result.stdout
    assert f"copying the shards to {url}" in result.stderr
    assert data_problems(tmp_path / "bucket" / "out") == []
    missing = llmtrain("prepare", "s3://bucket/web", "--out", "x", cwd=tmp_path)
    assert missing.returncode == 2 and "hint: pip install s3fs" in missing.stderr
