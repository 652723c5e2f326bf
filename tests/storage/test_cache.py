"""Digests of files: algorithms, records, and the cache of digests."""

import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.errors import UserError
from llmtrain.storage import cache
from llmtrain.storage.cache import cached_digest, computed_digest
from llmtrain.storage.integrity import (
    Digest,
    RunningDigest,
    combined_digest,
    digest_of,
    read_integrity,
)


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Move the clock, so that files written just now count as old."""
    later = time.time_ns() + 10 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: later)


@given(st.lists(st.binary(max_size=50)), st.integers(0, 400))
def test_a_running_digest_equals_that_of_the_whole(parts: list[bytes], size: int) -> None:
    running, position = RunningDigest(), 0
    for part in parts:
        running.update(position, part)
        running.update(position + len(part) + 1, b"out of order")
        position += len(part)
    expected = Digest("blake3", blake3(b"".join(parts)).hexdigest())
    assert running.digest(size) == (expected if size == position else None)


def test_algorithms_do_not_mix() -> None:
    one, other = Digest("blake3", "0" * 64), Digest("sha256", "0" * 64)
    assert one != other
    assert combined_digest({"a": one, "b": one}) != combined_digest({"a": other, "b": other})
    for digest in (one, other):
        assert Digest.parse(str(digest)) == Digest.from_json(digest.as_json()) == digest
    assert str(other) == other.hex  # as in results of earlier versions


def test_a_record_without_a_digest_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "integrity.json").write_text('{"files": {"a": {"bytes": 1, "md5": "0"}}}')
    with pytest.raises(UserError, match="neither blake3 nor sha256"):
        read_integrity(tmp_path)


def test_an_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    settle(monkeypatch)
    expected = {name: digest_of(path, name) for name in ("blake3", "sha256")}
    for name, digest in expected.items():
        assert computed_digest(path, name) == digest
    monkeypatch.setattr(cache, "digest_of", None)
    assert {name: cached_digest(path, name) for name in expected} == expected


def test_a_file_copied_with_its_times_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    for each, content in ((path, b"one"), (other, b"two")):
        each.write_bytes(content)
        os.utime(each, ns=(0, 10**9))
    settle(monkeypatch)
    before = cached_digest(path)
    time.sleep(0.05)  # the ctime has the resolution of the kernel's clock
    shutil.copy2(other, path)
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (10**9, 3)
    assert cached_digest(path) == digest_of(other) != before


def test_a_file_changed_just_now_is_not_cached(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert cached_digest(path) == digest_of(path)
    assert not cache._entry(cache.file_identity(path), "blake3").exists()


def damaged(entry: Path) -> None:
    entry.write_bytes(b"\xff half")


def replaced_by_a_folder(entry: Path) -> None:
    entry.unlink()
    entry.mkdir()


def writable_by_others(entry: Path) -> None:
    entry.write_text("0" * 64)
    entry.parent.chmod(0o777)


def without_a_folder(entry: Path) -> None:
    shutil.rmtree(entry.parent)
    entry.parent.write_text("not a folder")


@pytest.mark.parametrize(
    "spoil", [damaged, replaced_by_a_folder, writable_by_others, without_a_folder]
)
def test_an_unusable_cache_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))
    settle(monkeypatch)
    expected = computed_digest(path)
    (entry,) = (tmp_path / "cache" / "digests").iterdir()
    assert stat.S_IMODE(entry.parent.stat().st_mode) == 0o700
    spoil(entry)
    assert cached_digest(path) == expected


def test_the_cache_respects_xdg_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMTRAIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settle(monkeypatch)
    (tmp_path / "file").write_bytes(b"one")
    computed_digest(tmp_path / "file")
    assert len(list((tmp_path / "llmtrain" / "digests").iterdir())) == 1
