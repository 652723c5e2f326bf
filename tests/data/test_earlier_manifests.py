"""Data and unfinished builds of earlier versions, which recorded SHA-256 instead of BLAKE3."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from places import REPOSITORY
from preparations import OPTIONS, contents, identity, prepare

from llmtrain.data.manifest import Manifest, read_manifest
from llmtrain.data.staging import JOURNAL_FILE
from llmtrain.data.verify import data_problems
from llmtrain.errors import UserError

EARLIER = REPOSITORY / "tests" / "files" / "earlier_run" / "data" / "texts"


def with_sha256(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a record of a file in `folder` as earlier versions wrote it."""
    digest = hashlib.sha256((folder / record["name"]).read_bytes()).hexdigest()
    return {key: value for key, value in record.items() if key != "blake3"} | {"sha256": digest}


def convert_source(spec: dict[str, Any], source: Path) -> None:
    spec["source"]["files"] = [with_sha256(file, source) for file in spec["source"]["files"]]


def convert_manifest(folder: Path, source: Path) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    convert_source(document, source)
    for split in ("train", "val"):
        document[split]["shards"] = [with_sha256(s, folder) for s in document[split]["shards"]]
    del document["sha256"]
    content = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    document["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(document))


def convert_journal(staging: Path, source: Path) -> None:
    lines = []
    for line in (staging / JOURNAL_FILE).read_text().splitlines():
        entry = json.loads(line)["entry"]
        if "plan" in entry:
            convert_source(entry["plan"], source)
        if "shard" in entry:
            entry["shard"] = with_sha256(entry["shard"], staging / "shards")
        digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
        lines.append(json.dumps({"entry": entry, "sha256": digest}, sort_keys=True) + "\n")
    (staging / JOURNAL_FILE).write_text("".join(lines))


def test_the_manifest_of_an_earlier_version_keeps_its_identity() -> None:
    document = json.loads((EARLIER / "manifest.json").read_text())
    manifest = read_manifest(EARLIER)
    assert manifest.document() == document
    assert all(shard.sha256 and shard.blake3 is None for shard in manifest.shards)
    assert data_problems(EARLIER) == []


def test_new_manifests_record_blake3(undisturbed: tuple[Path, Path]) -> None:
    document = json.loads((undisturbed[1] / "manifest.json").read_text())
    records = [*document["source"]["files"], *document["train"]["shards"]]
    assert all("blake3" in record and "sha256" not in record for record in records)


def test_a_shard_without_hash_is_rejected() -> None:
    document = json.loads((EARLIER / "manifest.json").read_text())
    del document["sha256"], document["train"]["shards"][0]["sha256"]
    with pytest.raises(ValueError, match="no recorded hash"):
        Manifest.model_validate_json(json.dumps(document))


def test_data_of_an_earlier_version_is_recognized(
    undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    source, data = undisturbed
    out = Path(shutil.copytree(data, tmp_path / "out"))
    convert_manifest(out, source)
    before, lines = contents(out), list[str]()
    prepare(source, out, log=lines.append, **OPTIONS)
    assert lines == [f"{out} already contains this data: nothing to do"]
    assert contents(out) == before
    shard = out / "train-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\2")
    assert data_problems(out) == [f"{shard} does not have the recorded SHA-256"]


def test_a_build_of_an_earlier_version_resumes(
    undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    source, data = undisturbed

    def stop(progress: Any) -> None:
        if progress.tokens > 200_000:
            raise UserError("stopped", hint="")

    out, lines = tmp_path / "out", list[str]()
    with pytest.raises(UserError, match="stopped"):
        prepare(source, out, on_progress=stop, **OPTIONS)
    staging = tmp_path / ".tmp-out"
    convert_journal(staging, source)
    finished = identity(staging / "shards")
    prepare(source, out, log=lines.append, **OPTIONS)
    assert any(line.startswith("resumed at shard") for line in lines)
    assert finished and finished.items() <= identity(out).items()
    assert {n: c for n, c in contents(out).items() if n != "manifest.json"} == {
        n: c for n, c in contents(data).items() if n != "manifest.json"
    }
    assert data_problems(out) == []
