"""The file system calls of a command, recorded by strace and replayed into a `Disk`."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from faults.disk import Disk, Inode, Name, Sync, Write
from faults.workload import environment

_CALLS = (
    "open openat creat write pwrite64 writev ftruncate fallocate rename renameat renameat2 "
    "unlink unlinkat rmdir mkdir mkdirat link linkat symlink symlinkat fsync fdatasync lseek "
    "copy_file_range sendfile truncate pwritev pwritev2 mmap"
)
PROGRAM = [sys.executable, "-m", "llmtrain"]
_UNSUPPORTED = {"truncate", "pwritev", "pwritev2", "symlink", "symlinkat"}
_TOKEN = re.compile(
    r"(?P<fd>AT_FDCWD|\d+)<(?P<at>(?:\\x..)*)>(?:\(deleted\))?"
    r'|"(?P<text>(?:\\x..)*)"|(?P<word>[^\s,(){}\[\]"<>]+)'
)


def record(command: list[str], folder: Path) -> Disk:
    """Run an llmtrain command in `folder` under strace; return what it did to the folder."""
    disk, log = Disk(folder), folder.parent / "strace.txt"
    options = ["-f", "-y", "-xx", "-s", "1000000000", "-o", str(log)]
    calls = ",".join(_CALLS.split())
    subprocess.run(
        ["strace", *options, "-e", f"trace={calls}", *PROGRAM, *command],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    replay = _Replay(disk, folder)
    for call in _calls(log):
        replay.apply(call)
    log.unlink()
    return disk


@dataclass(frozen=True)
class _Call:
    name: str
    tokens: list[re.Match[str]]
    result: int
    process: str
    has_started: bool = True
    """False for the first line of a call that another thread's call interrupts in the log."""

    @property
    def texts(self) -> list[bytes]:
        return [_decode(token["text"]) for token in self.tokens if token["text"] is not None]

    @property
    def files(self) -> list[tuple[int, str]]:
        """Descriptors with their paths; -1 for the working directory."""
        found = [token for token in self.tokens if token["fd"]]
        return [
            (-1 if token["fd"] == "AT_FDCWD" else int(token["fd"]), _decode(token["at"]).decode())
            for token in found
        ]

    @property
    def words(self) -> list[str]:
        return [token["word"] for token in self.tokens if token["word"]]


def _decode(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _calls(log: Path) -> Iterator[_Call]:
    """Yield the successful calls in the order in which they returned, and starts of fsync."""
    pending: dict[str, str] = {}
    with log.open(encoding="ascii") as lines:
        for line in lines:
            process, rest = line.rstrip("\n").split(maxsplit=1)
            if rest.endswith("<unfinished ...>"):
                pending[process] = rest.removesuffix("<unfinished ...>")
                if rest.startswith(("fsync", "fdatasync")):
                    yield _Call("start", list(_TOKEN.finditer(rest)), 0, process)
                continue
            if rest.startswith("<..."):
                rest = pending.pop(process) + rest.partition(" resumed>")[2]
            if match := re.match(r"(\w+)\((.*)\)\s+= (\d+)", rest, re.DOTALL):
                tokens = list(_TOKEN.finditer(match[2] + " " + rest[match.start(3) :]))
                yield _Call(match[1], tokens, int(match[3]), process)


@dataclass
class _Replay:
    """Turns calls into operations on a disk."""

    disk: Disk
    folder: Path
    _positions: dict[int, int] = field(default_factory=dict)
    _appending: set[int] = field(default_factory=set)
    _started: dict[str, int] = field(default_factory=dict)

    def apply(self, call: _Call) -> None:
        """Apply one call if it concerns the folder."""
        if call.name in _UNSUPPORTED and any(self._inside(text) for text in call.texts):
            raise SystemExit(f"the trace contains {call.name}, which this script does not model")
        getattr(self, f"_{call.name}", lambda call: None)(call)

    def _inside(self, path: bytes | str, base: str = "") -> str | None:
        """Return a path relative to the folder, or None if it is elsewhere."""
        text = path.decode() if isinstance(path, bytes) else path
        full = Path(base or self.folder, text)
        return str(full.relative_to(self.folder)) if full.is_relative_to(self.folder) else None

    def _file(self, call: _Call, index: int = 0) -> Inode | None:
        path = self._inside(call.files[index][1])
        return None if path is None else self.disk.find(path)

    def _paths(self, call: _Call) -> list[str | None]:
        bases = [at for _, at in call.files] or [""] * len(call.texts)
        return [self._inside(t, b) for t, b in zip(call.texts, bases, strict=False)]

    def _openat(self, call: _Call) -> None:
        opened, path = call.files[-1]
        self._positions[opened] = 0
        self._appending.discard(opened)
        flags = next(word for word in call.words if word.startswith("O_"))
        if (inside := self._inside(path)) is None or "O_TMPFILE" in flags:
            return
        if "O_APPEND" in flags:
            self._appending.add(opened)
        if "O_CREAT" in flags and self.disk.find(inside) is None:
            self.disk.create(inside)
        elif "O_TRUNC" in flags and (file := self.disk.find(inside)) is not None:
            self.disk.add(Write(file, 0, None))

    _open = _creat = _openat

    def _lseek(self, call: _Call) -> None:
        self._positions[call.files[0][0]] = call.result

    def _write(self, call: _Call) -> None:
        if (file := self._file(call)) is not None:
            data = b"".join(call.texts)[: call.result]
            self._put(call.files[0][0], file, data)

    _writev = _write

    def _put(self, descriptor: int, file: Inode, data: bytes) -> None:
        appending = descriptor in self._appending
        offset = self.disk.size(file) if appending else self._positions.get(descriptor, 0)
        self.disk.add(Write(file, offset, data))
        self._positions[descriptor] = offset + len(data)

    def _pwrite64(self, call: _Call) -> None:
        if (file := self._file(call)) is not None:
            offset = int(call.words[-2])
            self.disk.add(Write(file, offset, call.texts[0][: call.result]))

    def _ftruncate(self, call: _Call) -> None:
        if (file := self._file(call)) is not None:
            self.disk.add(Write(file, int(call.words[0]), None))

    def _fallocate(self, call: _Call) -> None:
        if (file := self._file(call)) is not None:
            end = int(call.words[-3]) + int(call.words[-2])
            if end > self.disk.size(file):
                self.disk.add(Write(file, end, None))

    def _sendfile(self, call: _Call) -> None:
        """Copy from the second descriptor to the first; copy_file_range has them reversed."""
        into, source = (0, 1) if call.name == "sendfile" else (1, 0)
        file = self._file(call, into)
        number, path = call.files[source]
        first = self._positions.get(number, 0)
        self._positions[number] = first + call.result
        if file is not None:
            data = Path(path).read_bytes()[first : first + call.result]
            self._put(call.files[into][0], file, data)

    _copy_file_range = _sendfile

    def _mmap(self, call: _Call) -> None:
        flags = set("|".join(call.words).split("|"))
        if {"MAP_SHARED", "PROT_WRITE"} <= flags and call.files:
            assert self._inside(call.files[0][1]) is None, "writes through a memory map"

    def _mkdir(self, call: _Call) -> None:
        (path,) = self._paths(call)
        if path is not None:
            self.disk.create(path, is_folder=True)

    _mkdirat = _mkdir

    def _rename(self, call: _Call) -> None:
        old, new = self._paths(call)
        if old is None and new is None:
            return
        assert old is not None and new is not None, "a rename across the edge of the folder"
        inode = self.disk.find(old)
        assert inode is not None, f"the trace misses the creation of {old}"
        removed, added = self.disk.place(old), self.disk.place(new)
        self.disk.add(Name(((*removed, None), (*added, inode))))

    _renameat = _renameat2 = _rename

    def _unlink(self, call: _Call) -> None:
        (path,) = self._paths(call)
        if path is not None:
            self.disk.add(Name(((*self.disk.place(path), None),)))

    _unlinkat = _rmdir = _unlink

    def _link(self, call: _Call) -> None:
        old, new = self._paths(call)
        if old is not None and new is not None and (inode := self.disk.find(old)) is not None:
            self.disk.add(Name(((*self.disk.place(new), inode),)))

    _linkat = _link

    def _start(self, call: _Call) -> None:
        self._started[call.process] = len(self.disk.operations)

    def _fsync(self, call: _Call) -> None:
        since = self._started.pop(call.process, len(self.disk.operations))
        if (inode := self._file(call)) is not None:
            self.disk.add(Sync(inode, since))

    _fdatasync = _fsync
