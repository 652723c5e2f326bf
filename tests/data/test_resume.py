"""A preparation that was killed, interrupted or out of disk goes on, and ends with the same bytes."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.data.journal import JOURNAL_FILE
from llmtrain.data.prepare import prepare
from llmtrain.errors import RunFailed

OPTIONS = {"tokenizer": "byte", "val_fraction": 0.3, "shard_tokens": 20_000}
ARGUMENTS = ("--tokenizer", "byte", "--val-fraction", "0.3", "--shard-tokens", "20k")
COMMAND = Path(sys.executable).parent / "llmtrain"


def write_source(folder: Path, seed: int = 0) -> Path:
    """3,000 documents in three kinds of files, about a megabyte."""
    chance = random.Random(seed)
    texts = ["word é " * chance.randrange(100) for _ in range(3000)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "web").mkdir()
    (folder / "web" / "a.jsonl").write_text("".join(lines[:1500]))
    (folder / "web" / "b.txt").write_text(texts[1500])
    (folder / "web" / "c.jsonl").write_text("".join(lines[1501:]))
    return folder / "web"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identity(folder: Path) -> dict[str, tuple[int, int]]:
    """Of each shard its inode and when it was last written: they change when it is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("[!.]*.bin")}


def recorded(staging: Path) -> list[str]:
    """Names of the shards in the journal's whole lines."""
    lines = (staging / JOURNAL_FILE).read_text().splitlines(keepends=True)
    entries = [json.loads(line)["entry"] for line in lines if line.endswith("\n")]
    return [entry["shard"]["name"] for entry in entries if "shard" in entry]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source, and the folder that an undisturbed preparation of it writes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = write_source(folder)
    prepare(str(source), folder / "out", **OPTIONS)
    assert len(list((folder / "out").glob("train-*.bin"))) > 20
    return source, folder / "out"


@pytest.fixture
def interrupted(undisturbed: tuple[Path, Path], tmp_path: Path) -> Path:
    """The staging folder of a preparation that ended with ten finished shards."""
    kill_at(tmp_path, undisturbed[0], APPENDED.format(line=12))
    assert len(recorded(tmp_path / ".tmp-out")) == 10
    return tmp_path / ".tmp-out"


def kill_at(folder: Path, source: Path, moment: str) -> None:
    """Run the command with `moment`, Python that kills it, run before; until it dies of SIGKILL."""
    program = f"import os, signal\nfrom llmtrain.data import journal, staging\n{moment}\n"
    program += "from llmtrain.cli.main import main\nmain()"
    command = [sys.executable, "-c", program, "prepare", str(source), "--out", "out", *ARGUMENTS]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    assert process.returncode == -signal.SIGKILL, process.stderr


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
APPENDED = f"""
real, lines = journal.Journal._append, []
def append(self, entry):
    real(self, entry)
    lines.append(entry)
    if len(lines) == {{line}} - 1:
        {KILL}
journal.Journal._append = append"""
BEFORE_THE_LINE = f"""
real, lines = journal.Journal._append, []
def append(self, entry):
    lines.append(entry)
    if len(lines) == 12:
        {KILL}
    real(self, entry)
journal.Journal._append = append"""
IN_THE_LINE = f"""
real, lines = journal._line, []
def line(entry):
    lines.append(entry)
    if len(lines) == 12:
        with open('.tmp-out/journal.jsonl', 'a') as file:
            file.write(real(entry)[:70])
        {KILL}
    return real(entry)
journal._line = line"""
BEFORE_THE_MANIFEST = f"staging.write_manifest = lambda *_: {KILL}"
BEFORE_THE_RENAME = f"""
real = staging.files.fsync_path
def fsync_path(path):
    if path.name == 'shards' and (path / 'manifest.json').exists():
        {KILL}
    real(path)
staging.files.fsync_path = fsync_path"""
AFTER_THE_RENAME = f"staging.shutil.rmtree = lambda *_, **__: {KILL}"


@pytest.mark.parametrize(
    "moment",
    [
        APPENDED.format(line=2),
        APPENDED.format(line=20),
        BEFORE_THE_LINE,
        IN_THE_LINE,
        BEFORE_THE_MANIFEST,
        BEFORE_THE_RENAME,
    ],
    ids=["counted", "shard", "before-line", "torn-line", "before-manifest", "before-rename"],
)
def test_killed_at_a_moment(undisturbed: tuple[Path, Path], tmp_path: Path, moment: str) -> None:
    source, expected = undisturbed
    kill_at(tmp_path, source, moment)
    assert not (tmp_path / "out").exists()
    finished = recorded(tmp_path / ".tmp-out")
    before = identity(tmp_path / ".tmp-out" / "shards")
    notes: list[str] = []
    manifest = prepare(str(source), tmp_path / "out", **OPTIONS, on_note=notes.append)
    assert contents(tmp_path / "out") == contents(expected)
    after = identity(tmp_path / "out")
    assert {name: after[name] for name in finished} == {name: before[name] for name in finished}
    shards = [*manifest.train.shards, *manifest.val.shards]
    tokens = sum(shard.tokens for shard in shards if shard.name in finished)
    expected_note = f"resumed at shard {len(finished) + 1} ({tokens:,} tokens done)"
    assert (expected_note in notes) == bool(finished)
    assert [path.name for path in tmp_path.iterdir() if path.name != "hf-cache"] == ["out"]


def test_killed_after_the_rename(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    source, expected = undisturbed
    kill_at(tmp_path, source, AFTER_THE_RENAME)
    assert contents(tmp_path / "out") == contents(expected)
    before = identity(tmp_path / "out")
    notes: list[str] = []
    prepare(str(source), tmp_path / "out", **OPTIONS, on_note=notes.append)
    assert notes == [f"{tmp_path / 'out'} holds this data already: nothing to do"]
    assert identity(tmp_path / "out") == before
    assert not (tmp_path / ".tmp-out").exists()


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """As `undisturbed`, but of 9 MB in fewer and larger shards of GPT-2's tokens: half a second of work."""
    folder = tmp_path_factory.mktemp("larger")
    texts = [json.dumps({"text": f"{i} and the learning rate " * 50}) + "\n" for i in range(7000)]
    (folder / "web.jsonl").write_text("".join(texts))
    prepare(str(folder / "web.jsonl"), folder / "out", shard_tokens=50_000)
    return folder / "web.jsonl", folder / "out"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_command_ended_by_signals(
    larger: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    source, expected = larger
    command = [COMMAND, "prepare", source, "--out", "out", "--shard-tokens", "50k", "--workers", "1"]
    shards = tmp_path / ".tmp-out" / "shards"
    seen: dict[str, tuple[int, int]] = {}
    for _ in range(2):
        wanted = len(list(shards.glob("train-*.bin"))) + 3
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        while len(list(shards.glob("train-*.bin"))) < wanted:
            assert process.poll() is None, process.communicate()
            time.sleep(0.0005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 128 + number
            assert "out is not complete; the same command goes on after its last finished shard" in errors
        finished = set(recorded(tmp_path / ".tmp-out"))
        now = {name: what for name, what in identity(shards).items() if name in finished}
        assert seen.items() <= now.items()
        seen = now
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"resumed at shard {len(seen) + 1} (" in result.stderr
    assert contents(tmp_path / "out") == contents(expected)
    assert seen.items() <= identity(tmp_path / "out").items()


# --- what is not believed ----------------------------------------------------------------------


def goes_on(undisturbed: tuple[Path, Path], staging: Path, **options: object) -> tuple[list[str], set[str]]:
    """Go on from `staging`, which must end well; the notes, and the shards that were not written again."""
    source, expected = undisturbed
    before = identity(staging / "shards")
    notes: list[str] = []
    prepare(str(source), staging.parent / "out", **{**OPTIONS, **options}, on_note=notes.append)
    if not options:
        assert contents(staging.parent / "out") == contents(expected)
    after = identity(staging.parent / "out")
    return notes, {name for name in before if after.get(name) == before[name]}


@pytest.mark.parametrize("change", ["flip", "cut", "absent"])
def test_a_damaged_shard(undisturbed: tuple[Path, Path], interrupted: Path, change: str) -> None:
    shard = interrupted / "shards" / "train-00003.bin"
    content = shard.read_bytes()
    if change == "absent":
        shard.unlink()
    else:
        shard.write_bytes(content[:-2] if change == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    notes, kept = goes_on(undisturbed, interrupted)
    assert {name for name in kept if name.startswith("train")} == {f"train-{i:05}.bin" for i in range(3)}
    assert any("train-00003.bin" in note and "going on from before it" in note for note in notes)
    assert any(note.startswith("resumed at shard") for note in notes)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), flip=st.one_of(st.none(), st.integers(1, 255)))
def test_a_damaged_journal(
    undisturbed: tuple[Path, Path], interrupted: Path, where: float, flip: int | None
) -> None:
    with tempfile.TemporaryDirectory(dir=interrupted.parent) as scratch:
        staging = Path(scratch) / ".tmp-out"
        shutil.copytree(interrupted, staging)
        journal = staging / JOURNAL_FILE
        content = bytearray(journal.read_bytes())
        position = int(where * len(content))
        if flip is None:
            del content[position:]
        else:
            content[position] ^= flip
        journal.write_bytes(content)
        believed = bytes(content[:position]).count(b"\n")
        _, kept = goes_on(undisturbed, staging)
        # Lines: the request, the counts, a shard each. A line feed that was changed spoils two lines.
        assert len(kept) in {max(believed - 2, 0), max(believed - 1, 0)}


@pytest.mark.parametrize(
    "options", [{"seed": 5}, {"val_fraction": 0.1}, {"shard_tokens": 30_000}, {"limit_documents": 2000}]
)
def test_another_request_starts_anew(
    undisturbed: tuple[Path, Path], interrupted: Path, options: dict[str, object]
) -> None:
    notes, kept = goes_on(undisturbed, interrupted, **options)
    assert kept == set()
    assert "what an interrupted prepare left is of another request or source: starting anew" in notes
    assert not any("resumed" in note for note in notes)
    prepare(str(undisturbed[0]), interrupted.parent / "fresh", **{**OPTIONS, **options})
    assert contents(interrupted.parent / "out") == contents(interrupted.parent / "fresh")


def test_a_changed_source_starts_anew(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    source = tmp_path / "web"
    shutil.copytree(undisturbed[0], source)
    kill_at(tmp_path, source, APPENDED.format(line=12))
    (source / "b.txt").write_text("other text")
    notes: list[str] = []
    prepare(str(source), tmp_path / "out", **OPTIONS, on_note=notes.append)
    assert any("starting anew" in note for note in notes)
    prepare(str(source), tmp_path / "fresh", **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_only_one_goes_on(undisturbed: tuple[Path, Path], interrupted: Path) -> None:
    from llmtrain import files
    from llmtrain.errors import UserError

    before = identity(interrupted / "shards")
    with (
        files.exclusive(interrupted),
        pytest.raises(UserError, match="in use by another llmtrain process"),
    ):
        prepare(str(undisturbed[0]), interrupted.parent / "out", **OPTIONS)
    assert identity(interrupted / "shards") == before


# --- what cannot be written, or read -----------------------------------------------------------

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def test_a_limit_on_the_size_of_files(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    source, expected = undisturbed
    command = [COMMAND, "prepare", source, "--out", "out", *ARGUMENTS]
    shard_bytes = sorted(path.stat().st_size for path in expected.glob("train-*.bin"))
    limit = shard_bytes[-1] - 2  # every shard fits but the largest
    result = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 1
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    about = (
        r"error: cannot write out: File too large \(about [12]\.\d MB more are needed, [\d.,]+ .B are free\)"
    )
    assert re.fullmatch(about, error)
    assert "ulimit -f" in result.stderr and "the same command goes on after the" in result.stderr
    assert "Traceback" not in result.stderr
    before = identity(tmp_path / ".tmp-out" / "shards")
    assert before
    assert not list((tmp_path / ".tmp-out" / "shards").glob(".tmp-*"))
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert contents(tmp_path / "out") == contents(expected)
    assert before.items() <= identity(tmp_path / "out").items()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(undisturbed: tuple[Path, Path], small_disk: Path, llmtrain: Command) -> None:
    source, expected = undisturbed
    result = llmtrain("prepare", source, "--out", small_disk / "out", *ARGUMENTS, cwd=small_disk)
    assert result.returncode == 1
    assert "No space left on device (about" in result.stderr and "MB are free)" in result.stderr
    assert "hint: free space" in result.stderr
    before = identity(small_disk / ".tmp-out" / "shards")
    assert before
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    result = llmtrain("prepare", source, "--out", small_disk / "out", *ARGUMENTS, cwd=small_disk)
    assert result.returncode == 0, result.stderr
    assert contents(small_disk / "out") == contents(expected)
    assert before.items() <= identity(small_disk / "out").items()


def test_a_disk_that_may_only_be_read(
    undisturbed: tuple[Path, Path], small_disk: Path, llmtrain: Command
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    result = llmtrain("prepare", undisturbed[0], "--out", small_disk / "out", *ARGUMENTS, cwd=small_disk)
    assert result.returncode == 1
    assert f"error: cannot write {small_disk}/out: Read-only file system\n" in result.stderr
    assert "hint: choose another place with --out\n" in result.stderr


NOBODY = 65534


@pytest.fixture
def unprivileged() -> Iterator[tuple[Path, Command]]:
    """A folder, and the command run there by a user who may not do everything, as root may."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        user = {} if os.geteuid() else {"user": NOBODY, "group": NOBODY}

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            environment = os.environ | {"HOME": name, "HF_HOME": name}
            return subprocess.run(
                [COMMAND, *arguments], cwd=name, env=environment, **user,
                capture_output=True, text=True, check=False,
            )  # fmt: skip

        try:
            reachable = run("--version").returncode == 0
        except PermissionError:
            reachable = False
        if not reachable:
            pytest.skip("the installed command cannot be run by another user than root")
        yield Path(name), run


def test_no_permission(unprivileged: tuple[Path, Command]) -> None:
    folder, llmtrain = unprivileged
    (folder / "a.txt").write_text("text")
    (folder / "secret.txt").write_text("text")
    (folder / "secret.txt").chmod(0o000)
    (folder / "closed").mkdir(mode=0o555)
    unwritable = llmtrain("prepare", "a.txt", "--out", "closed/out", "--val-fraction", "0")
    assert unwritable.returncode == 1
    assert "cannot write" in unwritable.stderr and "Permission denied" in unwritable.stderr
    assert "are free" not in unwritable.stderr and "hint: choose another place" in unwritable.stderr
    unreadable = llmtrain("prepare", "secret.txt", "--val-fraction", "0")
    assert unreadable.returncode == 2
    assert "secret.txt cannot be read: Permission denied" in unreadable.stderr
    assert "cannot write" not in unreadable.stderr


def test_a_source_that_shrinks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtrain.data import build
    from llmtrain.errors import UserError

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    real = build.validation_documents

    def shrink(*arguments: object) -> object:
        path.write_text('{"text": "one"}\n')
        return real(*arguments)

    monkeypatch.setattr(build, "validation_documents", shrink)
    with pytest.raises(UserError, match=r"a\.jsonl holds fewer documents than when it was first read"):
        prepare(str(path), tmp_path / "out", tokenizer="byte", val_fraction=0)


def test_not_even_a_folder(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFailed, match="cannot write"):
        prepare(str(undisturbed[0]), tmp_path / "file" / "out", **OPTIONS)
