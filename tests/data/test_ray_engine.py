"""Preparation on a Ray cluster with two workers on this machine."""

import builtins
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparations import contents, prepare

from llmtrain.data.prepare import PrepareProgress
from llmtrain.errors import RunFailed, UserError

MARK = "LLMTRAIN_TEST_CLUSTER"
OPTIONS = {"val_fraction": 0.1, "shard_tokens": 100_000}

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster with two workers, stopped after these tests."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex + uuid.uuid4().hex)
        environment.setenv(MARK, uuid.uuid4().hex)
        ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'llmtrain[ray]'")
        ray.init(
            num_cpus=2,
            num_gpus=0,
            object_store_memory=100 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=str(tmp_path_factory.mktemp("ray", numbered=False)),
        )
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


def lines_without_progress(stderr: str) -> list[str]:
    """Return the lines except progress lines, which appear if a step is slow."""
    return [line for line in stderr.splitlines() if not line.startswith("documents: ")]


@pytest.fixture(autouse=True)
def small_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtrain.data.readers.PARTITION_BYTES", 500_000)


def make_texts(seed: int) -> list[str]:
    chance = random.Random(seed)
    words = ["the", "learning", "rate", "é", "中文", "\n\n", "it's", "1234", "average"]
    return [" ".join(chance.choices(words, k=chance.randrange(400))) for _ in range(4000)]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """4 MB of text as JSON lines, as parquet, and as a folder of several files."""
    folder = tmp_path_factory.mktemp("corpora")
    texts = make_texts(0)
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "web.jsonl").write_text("".join(lines))
    pq.write_table(pa.table({"text": texts}), folder / "web.parquet", row_group_size=300)
    (folder / "several").mkdir()
    (folder / "several" / "a.txt").write_text(texts[0])
    with pa.CompressedOutputStream(str(folder / "several" / "b.jsonl.zst"), "zstd") as stream:
        stream.write("".join(lines[:2000]).encode())
    (folder / "several" / "c.jsonl").write_text("".join(lines[2001:]))
    return {path.name: path for path in folder.iterdir()}


def busy_workers() -> list[int]:
    """Return the processes of this test's cluster that run a task."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (
                (process / "cmdline").read_bytes(),
                (process / "environ").read_bytes(),
            )
        except OSError:
            continue  # it ended, or belongs to another user
        if b"ray::run_task" in command and f"{MARK}={os.environ[MARK]}".encode() in environment:
            found.append(int(process.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["web.jsonl", "web.parquet", "several"])
def test_ray_writes_the_same_bytes(
    cluster: str, corpora: dict[str, Path], tmp_path: Path, name: str
) -> None:
    seen: list[PrepareProgress] = []
    locally = prepare(str(corpora[name]), tmp_path / "local", **OPTIONS)
    on_ray = prepare(
        str(corpora[name]), tmp_path / "ray", engine="ray", **OPTIONS, on_progress=seen.append
    )
    assert on_ray == locally
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert len(locally.train.shards) > 5
    assert seen[-1].documents == seen[-1].total_documents == 4000


@pytest.mark.slow
def test_the_task_of_a_killed_worker_is_repeated(
    cluster: str, corpora: dict[str, Path], tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one(progress: PrepareProgress) -> None:
        if progress.tokens and not killed:
            for pid in busy_workers()[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    prepare(
        str(corpora["web.jsonl"]), tmp_path / "ray", engine="ray", **OPTIONS, on_progress=kill_one
    )
    assert killed
    prepare(str(corpora["web.jsonl"]), tmp_path / "local", **OPTIONS)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


@pytest.mark.slow
def test_a_preparation_on_ray_resumes_locally(
    cluster: str, corpora: dict[str, Path], tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(progress: PrepareProgress) -> None:
        if progress.tokens > 350_000:
            raise Stop

    source, messages = str(corpora["web.parquet"]), list[str]()
    with pytest.raises(Stop):
        prepare(source, tmp_path / "ray", engine="ray", **OPTIONS, on_progress=stop)
    prepare(source, tmp_path / "ray", **OPTIONS, log=messages.append)
    assert any(message.startswith("resumed at shard ") for message in messages)
    prepare(source, tmp_path / "local", **OPTIONS)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


@pytest.mark.slow
def test_errors_equal_those_of_the_local_engine(
    cluster: str, corpora: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(corpora["web.jsonl"].read_text() + "{broken\n")
    messages = []
    for engine in ("local", "ray"):
        with pytest.raises(UserError, match=r"bad\.jsonl, line 4001 is not valid JSON") as caught:
            prepare(str(path), tmp_path / "out", engine=engine)
        messages.append((str(caught.value), caught.value.hint))
    assert messages[0] == messages[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_worker_that_always_dies_is_reported(cluster: str) -> None:
    from llmtrain.data.ray_engine import connect_ray

    def die() -> Iterator[int]:
        yield 1
        os._exit(1)

    with connect_ray(None) as engine, pytest.raises(RunFailed, match="the Ray cluster failed"):
        list(engine([die]))


@pytest.mark.slow
def test_workers_do_not_import_torch(cluster: str) -> None:
    from llmtrain.data.ray_engine import connect_ray

    def loaded() -> Iterator[bool]:
        import sys

        import llmtrain.data.encode  # noqa: F401

        yield "torch" in sys.modules

    with connect_ray(None) as engine:
        assert list(engine([loaded])) == [False]


@pytest.mark.slow
def test_the_command_connects_to_a_cluster(
    cluster: str, corpora: dict[str, Path], tmp_path: Path, llmtrain: Command
) -> None:
    source = corpora["web.jsonl"]
    on_ray = ("--engine", "ray", "--ray-address", cluster)
    result = llmtrain(
        "prepare", source, "--out", "ray", "--shard-tokens", "100k", *on_ray, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "gpt2 tokens in ray" in result.stdout
    lines = [line.split()[0] for line in lines_without_progress(result.stderr)]
    assert lines == ["reading", "warning:"]  # of the small val split
    prepare(str(source), tmp_path / "local", shard_tokens=100_000)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


@pytest.mark.slow
def test_a_signal_stops_the_command(cluster: str, corpora: dict[str, Path], tmp_path: Path) -> None:
    command = [
        Path(sys.executable).parent / "llmtrain",
        "prepare",
        corpora["web.jsonl"],
        "--out",
        "ray",
    ]
    command += ["--shard-tokens", "50k", "--engine", "ray", "--ray-address", cluster]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".tmp-ray/shards/train-*.bin")):
        assert process.poll() is None
        time.sleep(0.001)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "ray is incomplete; the same command resumes" in errors
    assert [line.split()[0] for line in lines_without_progress(errors)] == [
        "reading",
        "stopping",
        "SIGTERM:",
    ]
    assert list(tmp_path.glob(".tmp-ray/shards/train-*.bin"))


@pytest.mark.slow
def test_an_unreachable_cluster_is_reported(
    corpora: dict[str, Path], tmp_path: Path, llmtrain: Command
) -> None:
    pytest.importorskip("ray")
    there = ("--engine", "ray", "--ray-address", "127.0.0.1:9")
    result = llmtrain("prepare", corpora["web.jsonl"], "--out", "ray", *there, cwd=tmp_path)
    assert result.returncode == 2
    assert "a Ray cluster cannot be reached at 127.0.0.1:9" in result.stderr
    assert "Traceback" not in result.stderr


# --- without a cluster -------------------------------------------------------------------------


def test_a_missing_ray_package_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_ray(name: str, *args: object, **kwargs: object) -> object:
        if name == "ray":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(UserError, match="Ray is not installed") as caught:
        prepare(str(tmp_path / "a.txt"), tmp_path / "out", val_fraction=0, engine="ray")
    assert caught.value.hint == "pip install 'llmtrain[ray]'"
    assert [path.name for path in tmp_path.glob("*out*")] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "spark"}, "--engine 'spark' is unknown"),
        ({"engine": "ray", "workers": 2}, "--workers counts local threads"),
        ({"ray_address": "auto"}, "--ray-address needs --engine ray"),
    ],
)
def test_invalid_options_are_reported(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare("absent", tmp_path / "out", **options)


@pytest.mark.slow
def test_ray_is_not_imported_at_start() -> None:
    code = "import sys, llmtrain.data.prepare; print('ray' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"
