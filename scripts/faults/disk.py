"""Model of a disk after a power loss: the writes, names and sizes that it may contain.

It follows POSIX. A write is durable after an fsync of its file, and a name (created,
renamed or removed) after an fsync of its folder. Anything later may be on the disk or not. Real
file systems lose less: they keep the order of names within a folder, for example.
"""

import random
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Mode = Literal["durable", "names", "random"]
"""Part of the operations without an fsync that survives: none, the names, or a random part."""


@dataclass(eq=False)
class Inode:
    """A file with its first content, or a folder with its first names."""

    content: bytes = b""
    names: "dict[str, Inode]" = field(default_factory=dict)
    is_folder: bool = False


@dataclass(frozen=True)
class Write:
    """Bytes written into a file at an offset; or, without data, a new size."""

    file: Inode
    offset: int
    data: bytes | None


@dataclass(frozen=True)
class Name:
    """Changes of names, made at once: (folder, name, file or None for a removal)."""

    entries: tuple[tuple[Inode, str, Inode | None], ...]


@dataclass(frozen=True)
class Sync:
    """An fsync; it covers the operations before `since`."""

    inode: Inode
    since: int


Operation = Write | Name | Sync


class Disk:
    """A folder, and the operations that a traced command performed in it."""

    def __init__(self, folder: Path) -> None:
        """Read the folder as it is now; all of it counts as durable."""
        self.root = _read(folder)
        self.operations: list[Operation] = []
        self._now = {self.root: dict(self.root.names)}
        """Names in each folder after the last operation."""
        self._sizes: dict[Inode, int] = {}

    # --- recording --------------------------------------------------------------------------------

    def find(self, path: str) -> Inode | None:
        """Return the file or folder that has this relative path now."""
        inode = self.root
        for part in Path(path).parts:
            if not inode.is_folder or (found := self._names(inode).get(part)) is None:
                return None
            inode = found
        return inode

    def size(self, file: Inode) -> int:
        """Return the size of a file now."""
        return self._sizes.get(file, len(file.content))

    def add(self, operation: Operation) -> None:
        """Record an operation that took effect."""
        self.operations.append(operation)
        if isinstance(operation, Name):
            for folder, name, inode in operation.entries:
                _set(self._names(folder), name, inode)
        elif isinstance(operation, Write):
            end = operation.offset + len(operation.data or b"")
            grown = max(end, self.size(operation.file))
            self._sizes[operation.file] = end if operation.data is None else grown

    def create(self, path: str, *, is_folder: bool = False) -> Inode:
        """Record a new file or folder."""
        inode = Inode(is_folder=is_folder)
        self.add(Name(((*self.place(path), inode),)))
        return inode

    def place(self, path: str) -> tuple[Inode, str]:
        """Return the folder of a path and its name there."""
        parent = self.find(str(Path(path).parent))
        assert parent is not None, f"the trace misses the creation of {Path(path).parent}"
        return parent, Path(path).name

    def _names(self, folder: Inode) -> dict[str, Inode]:
        return self._now.setdefault(folder, dict(folder.names))

    # --- power loss -------------------------------------------------------------------------------

    def after_loss(self, count: int, mode: Mode, chance: random.Random) -> Mapping[str, bytes]:
        """Return the `files` on the disk if the power fails after `count` operations."""
        done = self.operations[:count]
        kept = self._durable(done)
        for number, operation in enumerate(done):
            if mode == "names" and isinstance(operation, Name):
                kept.add(number)
        if mode == "random":
            kept |= _random_part(done, chance)
        return self.files([operation for number, operation in enumerate(done) if number in kept])

    def promised(self, count: int) -> set[str]:
        """Return the paths of folders that were renamed and flushed, and not removed later.

        A command relies on the folders that it committed this way.
        """
        done = self.operations[:count]
        durable = self._durable(done)
        promises: dict[tuple[Inode, str], bool] = {}
        names: dict[Inode, dict[str, Inode]] = {}
        for number, operation in enumerate(done):
            entries = operation.entries if isinstance(operation, Name) else ()
            for folder, name, inode in entries:
                _set(names.setdefault(folder, dict(folder.names)), name, inode)
                renamed = len(entries) == 2 and inode is not None and inode.is_folder
                promises[folder, name] = renamed and number in durable
        paths = {inode: path for path, inode in _walk(self.root, names)} | {self.root: ""}
        return {
            f"{paths[folder]}{name}/"
            for (folder, name), promise in promises.items()
            if promise and not name.startswith(".") and folder in paths
        }

    def _durable(self, done: Collection[Operation]) -> set[int]:
        """Return the numbers of the operations that a later fsync covers."""
        last: dict[Inode, int] = {}
        for operation in done:
            if isinstance(operation, Sync):
                last[operation.inode] = max(operation.since, last.get(operation.inode, 0))
        durable = set()
        for number, operation in enumerate(done):
            if isinstance(operation, Write):
                covered = number < last.get(operation.file, 0)
            elif isinstance(operation, Name):
                covered = any(number < last.get(folder, 0) for folder, _, _ in operation.entries)
            else:
                continue
            if covered:
                durable.add(number)
        return durable

    def files(self, kept: Collection[Operation]) -> dict[str, bytes]:
        """Return the files after these operations, by path; folders end in a slash."""
        names: dict[Inode, dict[str, Inode]] = {}
        contents: dict[Inode, bytearray] = {}
        for operation in kept:
            if isinstance(operation, Name):
                for folder, name, inode in operation.entries:
                    _set(names.setdefault(folder, dict(folder.names)), name, inode)
            elif isinstance(operation, Write):
                content = contents.setdefault(operation.file, bytearray(operation.file.content))
                _apply(operation, content)
        return {
            path: b"" if inode.is_folder else bytes(contents.get(inode, inode.content))
            for path, inode in _walk(self.root, names)
        }


def lay_down(files: Mapping[str, bytes], folder: Path) -> None:
    """Replace `folder` by these files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path, content in files.items():
        if path.endswith("/"):
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)


def _random_part(done: Collection[Operation], chance: random.Random) -> set[int]:
    """Return a random half of the writes, and the first names of each folder."""
    cut: dict[Inode, int] = {}
    part = set()
    for number, operation in enumerate(done):
        if isinstance(operation, Write) and chance.random() < 0.5:
            part.add(number)
        elif isinstance(operation, Name):
            folder = operation.entries[0][0]
            if number < cut.setdefault(folder, chance.randint(0, len(done))):
                part.add(number)
    return part


def _apply(write: Write, content: bytearray) -> None:
    if write.data is None:
        del content[write.offset :]
    content.extend(bytes(max(0, write.offset - len(content))))
    if write.data is not None:
        content[write.offset : write.offset + len(write.data)] = write.data


def _set(names: dict[str, Inode], name: str, inode: Inode | None) -> None:
    if inode is None:
        names.pop(name, None)
    else:
        names[name] = inode


def _walk(root: Inode, names: Mapping[Inode, Mapping[str, Inode]]) -> Iterator[tuple[str, Inode]]:
    """Yield the path of every file and folder below `root`; those of folders end in a slash.

    `names` are the names in the folders that changed. A file with several names has several paths.
    """
    todo = [("", root)]
    while todo:
        parent, folder = todo.pop()
        for name, inode in names.get(folder, folder.names).items():
            path = f"{parent}{name}" + ("/" if inode.is_folder else "")
            yield path, inode
            if inode.is_folder:
                todo.append((path, inode))


def _read(path: Path) -> Inode:
    if not path.is_dir():
        return Inode(content=path.read_bytes())
    return Inode(names={each.name: _read(each) for each in path.iterdir()}, is_folder=True)
