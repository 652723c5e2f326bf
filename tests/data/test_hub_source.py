"""Datasets from the hub, read by the real client from a server on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer
from places import REPOSITORY

pytestmark = pytest.mark.slow  # each test starts processes

OPENWEBTEXT = "Skylion007/openwebtext"
DOCUMENTS = [f"Document {i}. " * (1 + i % 7) for i in range(300)]

# The client reads HF_ENDPOINT at import, so each command runs in its own process.
PROGRAM = """
import json, sys
from pathlib import Path
import datasets
from llmtrain.data.prepare import prepare
from llmtrain.data.options import PrepareOptions
from llmtrain.errors import UserError

datasets.disable_progress_bars()
source, out, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
try:
    print(json.dumps(prepare(source, out, PrepareOptions("byte", **options)).document()))
except UserError as error:
    print(json.dumps({"error": str(error), "hint": error.hint}))
"""

Run = Callable[..., dict]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    root = tmp_path_factory.mktemp("hub")
    web = root / "web"
    (web / "plain_text").mkdir(parents=True)
    # As on the hub: parquet files, and a loading script that must not run.
    for i in range(3):
        table = pa.table({"text": DOCUMENTS[i * 100 : (i + 1) * 100]})
        pq.write_table(table, web / f"plain_text/train-{i:05d}-of-00003.parquet")
    (web / "openwebtext.py").write_text("raise SystemExit('ran')")
    (web / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    script = root / "script"
    script.mkdir()
    (script / "script.py").write_text("raise SystemExit('ran')")
    lines = root / "lines"
    lines.mkdir()
    (lines / "train.jsonl").write_text(
        "".join(json.dumps({"body": text}) + "\n" for text in DOCUMENTS)
    )
    test_only = root / "test-only"
    test_only.mkdir()
    (test_only / "test.jsonl").write_text('{"text": "x"}\n')
    with HubServer() as server:
        server.add("dataset", OPENWEBTEXT, {"main": web})
        server.add("dataset", "who/script", {"main": script})
        server.add("dataset", "who/lines", {"main": lines})
        server.add("dataset", "who/test-only", {"main": test_only})
        yield server


@pytest.fixture
def run(hub: HubServer, tmp_path: Path) -> Run:
    def prepare(
        source: str, out: str = "out", environment: dict[str, str] | None = None, **options: object
    ) -> dict:
        hub.requests.clear()
        variables = {
            **hub.environment(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            **(environment or {}),
        }
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, source, str(tmp_path / out), json.dumps(options)],
            cwd=REPOSITORY,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return prepare


def read_texts(folder: Path) -> list[str]:
    tokens = np.fromfile(folder / "train-00000.bin", dtype="<u2", offset=1024)
    ends = np.flatnonzero(tokens == 256)
    return [
        bytes(part[part != 256].astype(np.uint8)).decode()
        for part in np.split(tokens, ends + 1)[:-1]
    ]


def test_openwebtext_is_read_at_its_commit(run: Run, hub: HubServer, tmp_path: Path) -> None:
    manifest = run("openwebtext", val_fraction=0)
    assert read_texts(tmp_path / "out") == DOCUMENTS
    source = manifest["source"]
    assert (source["id"], source["revision"]) == (
        f"hub:{OPENWEBTEXT}",
        hub.commit("dataset", OPENWEBTEXT, "main"),
    )
    assert [file["name"] for file in source["files"]] == [
        f"plain_text/train-{i:05d}-of-00003.parquet" for i in range(3)
    ]
    assert all(file["bytes"] > 1000 for file in source["files"])
    again = run("hub:Skylion007/openwebtext", val_fraction=0)
    assert again == manifest
    # Only the first file is requested to find that the data exists.
    assert not any("train-00002" in request for request in hub.requests)
    assert not (tmp_path / "home" / "datasets").exists() or not list(
        (tmp_path / "home").rglob("*.arrow")
    )


STOPPED = """
import sys
from pathlib import Path
from llmtrain.data.options import PrepareOptions
from llmtrain.data.prepare import prepare

def stop(progress):
    if progress.tokens:
        raise SystemExit(7)

options = PrepareOptions("byte", shard_tokens=2000)
prepare("openwebtext", Path(sys.argv[1]), options, on_progress=stop)
"""


def test_an_interrupted_preparation_resumes(run: Run, hub: HubServer, tmp_path: Path) -> None:
    variables = {**hub.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", STOPPED, str(tmp_path / "out")]
    stopped = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | variables, capture_output=True, check=False
    )
    assert stopped.returncode == 7, stopped.stderr
    shards = {
        path.name: path.stat().st_ino for path in (tmp_path / ".tmp-out" / "shards").glob("*.bin")
    }
    assert len(shards) > 3
    resumed = run("openwebtext", shard_tokens=2000)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in shards} == shards
    assert run("openwebtext", out="undisturbed", shard_tokens=2000) == resumed
    for name in shards:
        assert (tmp_path / "out" / name).read_bytes() == (
            tmp_path / "undisturbed" / name
        ).read_bytes()


def test_a_limit_limits_the_download(run: Run, hub: HubServer, tmp_path: Path) -> None:
    run("openwebtext", val_fraction=0, limit_documents=20)
    assert read_texts(tmp_path / "out") == DOCUMENTS[:20]
    assert any("train-00000" in request for request in hub.requests)
    assert not any("train-00001" in request for request in hub.requests)


def test_a_dataset_without_parquet_is_read(run: Run, tmp_path: Path) -> None:
    manifest = run("hub:who/lines", val_fraction=0, text_field="body")
    assert read_texts(tmp_path / "out") == DOCUMENTS
    assert manifest["source"]["id"] == "hub:who/lines"
    assert [file["name"] for file in manifest["source"]["files"]] == ["train.jsonl"]


@pytest.mark.parametrize(
    ("source", "error", "hint"),
    [
        ("hub:who/lines", "has no field 'text'; it has: body", "--text-field"),
        ("hub:who/lines:fr", "'fr' not found. Available: ['default']", "hub:NAME:CONFIG"),
        (
            "hub:who/absent",
            "the dataset who/absent cannot be read from the hub (RepositoryNotFoundError",
            "check the name",
        ),
        ("hub:who/script", "Dataset scripts are no longer supported", "download its data files"),
        ("hub:who/test-only", "has no split 'train'; it has: test", "download its data files"),
    ],
)
def test_errors_are_reported(run: Run, tmp_path: Path, source: str, error: str, hint: str) -> None:
    answer = run(source)
    assert error in answer["error"]
    assert hint in answer["hint"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "variables", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}]
)
def test_a_missing_network_is_reported(run: Run, tmp_path: Path, variables: dict[str, str]) -> None:
    answer = run("openwebtext", environment=variables)
    assert f"the dataset {OPENWEBTEXT} cannot be read from the hub" in answer["error"]
    assert "llmtrain prepare FILE_OR_FOLDER" in answer["hint"]
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []
