"""Interrupted preparations resume and produce the same bytes."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from preparations import ARGUMENTS, COMMAND, OPTIONS, contents, identity, prepare, recorded

from llmtrain.data.staging import JOURNAL_FILE


@pytest.fixture(scope="module")
def killed(undisturbed: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of a preparation killed after ten finished shards."""
    folder = tmp_path_factory.mktemp("killed")
    kill_at(folder, undisturbed[0], APPENDED.format(line=12))
    assert len(recorded(folder / ".tmp-out")) == 10
    return folder / ".tmp-out"


@pytest.fixture
def interrupted(killed: Path, tmp_path: Path) -> Path:
    """A copy of `killed`."""
    return Path(shutil.copytree(killed, tmp_path / ".tmp-out"))


def kill_at(folder: Path, source: Path, moment: str) -> None:
    """Run the command after the Python code `moment`, which makes it kill itself."""
    program = "import os, signal\nfrom llmtrain.data import staging\n"
    program += f"from llmtrain.storage import commit\n{moment}\n"
    program += "from llmtrain.cli.main import main\nmain()"
    command = [sys.executable, "-c", program, "prepare", str(source), "--out", "out", *ARGUMENTS]
    process = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert process.returncode == -signal.SIGKILL, process.stderr


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
APPENDED = f"""
real, lines = staging.Journal._append, []
def append(self, entry):
    real(self, entry)
    lines.append(entry)
    if len(lines) == {{line}} - 1:
        {KILL}
staging.Journal._append = append"""
BEFORE_LINE = f"""
real, lines = staging.Journal._append, []
def append(self, entry):
    lines.append(entry)
    if len(lines) == 12:
        {KILL}
    real(self, entry)
staging.Journal._append = append"""
WITHIN_LINE = f"""
real, lines = staging._line, []
def line(entry):
    lines.append(entry)
    if len(lines) == 12:
        with open('.tmp-out/journal.jsonl', 'a') as file:
            file.write(real(entry)[:70])
        {KILL}
    return real(entry)
staging._line = line"""
BEFORE_MANIFEST = f"staging.write_manifest = lambda *_: {KILL}"
BEFORE_RENAME = f"""
real = commit.fsync_path
def fsync_path(path):
    if path.name == 'shards' and (path / 'manifest.json').exists():
        {KILL}
    real(path)
commit.fsync_path = fsync_path"""
AFTER_RENAME = f"staging.shutil.rmtree = lambda *_, **__: {KILL}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        APPENDED.format(line=2),
        APPENDED.format(line=20),
        BEFORE_LINE,
        WITHIN_LINE,
        BEFORE_MANIFEST,
        BEFORE_RENAME,
    ],
    ids=["counted", "shard", "before-line", "torn-line", "before-manifest", "before-rename"],
)
def test_a_killed_preparation_resumes(
    undisturbed: tuple[Path, Path], tmp_path: Path, moment: str
) -> None:
    source, expected = undisturbed
    kill_at(tmp_path, source, moment)
    assert not (tmp_path / "out").exists()
    finished = recorded(tmp_path / ".tmp-out")
    before = identity(tmp_path / ".tmp-out" / "shards")
    messages: list[str] = []
    manifest = prepare(str(source), tmp_path / "out", **OPTIONS, log=messages.append)
    assert contents(tmp_path / "out") == contents(expected)
    after = identity(tmp_path / "out")
    assert {name: after[name] for name in finished} == {name: before[name] for name in finished}
    shards = [*manifest.train.shards, *manifest.val.shards]
    tokens = sum(shard.tokens for shard in shards if shard.name in finished)
    expected_message = f"resumed at shard {len(finished) + 1} ({tokens:,} tokens done)"
    assert (expected_message in messages) == bool(finished)
    assert [path.name for path in tmp_path.iterdir() if path.name != "hf-cache"] == ["out"]


@pytest.mark.slow
def test_a_kill_after_the_rename_loses_nothing(
    undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    source, expected = undisturbed
    kill_at(tmp_path, source, AFTER_RENAME)
    assert contents(tmp_path / "out") == contents(expected)
    before = identity(tmp_path / "out")
    messages: list[str] = []
    prepare(str(source), tmp_path / "out", **OPTIONS, log=messages.append)
    assert messages == [f"{tmp_path / 'out'} already contains this data: nothing to do"]
    assert identity(tmp_path / "out") == before
    assert not (tmp_path / ".tmp-out").exists()


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source of 9 MB and its data, in larger shards of GPT-2's tokens: half a second of work."""
    folder = tmp_path_factory.mktemp("larger")
    texts = [json.dumps({"text": f"{i} and the learning rate " * 50}) + "\n" for i in range(7000)]
    (folder / "web.jsonl").write_text("".join(texts))
    prepare(str(folder / "web.jsonl"), folder / "out", shard_tokens=50_000)
    return folder / "web.jsonl", folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_command_resumes_after_signals(
    larger: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    source, expected = larger
    options = ("--shard-tokens", "50k", "--workers", "1")
    command = [COMMAND, "prepare", source, "--out", "out", *options]
    shards = tmp_path / ".tmp-out" / "shards"
    seen: dict[str, tuple[int, int]] = {}
    for _ in range(2):
        wanted = len(list(shards.glob("train-*.bin"))) + 3
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        while len(list(shards.glob("train-*.bin"))) < wanted:
            assert process.poll() is None, process.communicate()
            time.sleep(0.0005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 128 + number
            assert (
                "out is incomplete; the same command resumes after its last finished shard"
                in errors
            )
        finished = set(recorded(tmp_path / ".tmp-out"))
        now = {name: what for name, what in identity(shards).items() if name in finished}
        assert seen.items() <= now.items()
        seen = now
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"resumed at shard {len(seen) + 1} (" in result.stderr
    assert contents(tmp_path / "out") == contents(expected)
    assert seen.items() <= identity(tmp_path / "out").items()


# --- damaged and outdated files ----------------------------------------------------------------


def resume(
    undisturbed: tuple[Path, Path], staging: Path, **options: object
) -> tuple[list[str], set[str]]:
    """Resume from `staging`; return the messages and the shards that were kept."""
    source, expected = undisturbed
    before = identity(staging / "shards")
    messages: list[str] = []
    prepare(str(source), staging.parent / "out", **{**OPTIONS, **options}, log=messages.append)
    if not options:
        assert contents(staging.parent / "out") == contents(expected)
    after = identity(staging.parent / "out")
    return messages, {name for name in before if after.get(name) == before[name]}


@pytest.mark.parametrize("change", ["flip", "cut", "absent"])
def test_a_damaged_shard_is_written_again(
    undisturbed: tuple[Path, Path], interrupted: Path, change: str
) -> None:
    shard = interrupted / "shards" / "train-00003.bin"
    content = shard.read_bytes()
    if change == "absent":
        shard.unlink()
    else:
        shard.write_bytes(
            content[:-2] if change == "cut" else content[:-1] + bytes([content[-1] ^ 1])
        )
    messages, kept = resume(undisturbed, interrupted)
    assert {name for name in kept if name.startswith("train")} == {
        f"train-{i:05}.bin" for i in range(3)
    }
    assert any(
        "train-00003.bin" in message and "resuming before it" in message for message in messages
    )
    assert any(message.startswith("resumed at shard") for message in messages)


@pytest.mark.slow
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), flip=st.one_of(st.none(), st.integers(1, 255)))
def test_a_damaged_journal_is_used_up_to_the_damage(
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
        valid_lines = bytes(content[:position]).count(b"\n")
        _, kept = resume(undisturbed, staging)
        # The first two lines are the spec and the counts. A changed line feed damages two lines.
        assert len(kept) in {max(valid_lines - 2, 0), max(valid_lines - 1, 0)}


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 5},
        pytest.param({"val_fraction": 0.1}, marks=pytest.mark.slow),
        pytest.param({"shard_tokens": 30_000}, marks=pytest.mark.slow),
        pytest.param({"limit_documents": 2000}, marks=pytest.mark.slow),
    ],
)
def test_other_options_start_over(
    undisturbed: tuple[Path, Path], interrupted: Path, options: dict[str, object]
) -> None:
    messages, kept = resume(undisturbed, interrupted, **options)
    assert kept == set()
    assert "an interrupted prepare had other options or another source: starting over" in messages
    assert not any("resumed" in message for message in messages)
    prepare(str(undisturbed[0]), interrupted.parent / "fresh", **{**OPTIONS, **options})
    assert contents(interrupted.parent / "out") == contents(interrupted.parent / "fresh")


@pytest.mark.slow
def test_a_changed_source_starts_over(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    source = tmp_path / "web"
    shutil.copytree(undisturbed[0], source)
    kill_at(tmp_path, source, APPENDED.format(line=12))
    (source / "b.txt").write_text("other text")
    messages: list[str] = []
    prepare(str(source), tmp_path / "out", **OPTIONS, log=messages.append)
    assert any("starting over" in message for message in messages)
    prepare(str(source), tmp_path / "fresh", **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_only_one_process_resumes(undisturbed: tuple[Path, Path], interrupted: Path) -> None:
    from llmtrain.errors import UserError
    from llmtrain.storage.commit import temporary_folder

    before = identity(interrupted / "shards")
    with (
        temporary_folder(interrupted.parent / "out"),
        pytest.raises(UserError, match="in use by another llmtrain process"),
    ):
        prepare(str(undisturbed[0]), interrupted.parent / "out", **OPTIONS)
    assert identity(interrupted / "shards") == before
