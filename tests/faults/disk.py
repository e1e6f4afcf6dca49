"""A recorder that stands in for ``os`` in the file layer and knows, before every file operation, what a crash there would leave on the disk.

Files: what was written since the last fsync of a file is pending. Folders: a name that was made, moved or removed is pending until its folder is
synced; a rename is one change of both its folders. A process that is killed leaves everything (and half of the write it was in); a loss of power
leaves what was synced, and of what is pending anything from nothing to all: names in the order in which they were changed, writes in no order.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmprune.checkpoint import files

GROWS = ("open", "pwrite", "posix_fallocate", "mkdir")
LOSSES = ("killed", "lost", "renamed", "mixed")  # renamed: names are on the disk, contents are not


@dataclass(frozen=True)
class Write:
    """Bytes at a place, or (``data`` None) the size that a file was given."""

    start: int
    data: bytes | None = None


@dataclass(eq=False)
class File:
    durable: bytes = b""
    pending: tuple[Write, ...] = ()


class Folder:
    """A folder's identity; its names stand in the tables of the recorder."""


Node = File | Folder
Tables = dict[Folder, dict[str, Node]]
Content = tuple[bytes, tuple[Write, ...]]
Tree = dict[str, "Tree | Content"]
Change = tuple[Folder, str, Node | None]


@dataclass(frozen=True)
class Crash:
    """Before operation ``number``: what is left, by the kind of loss."""

    number: int
    operation: str
    left: dict[str, Tree]


def content(durable: bytes, writes: tuple[Write, ...]) -> bytes:
    """What a file holds after some of its writes."""
    if not writes:
        return durable
    data = bytearray(durable)
    for write in writes:
        size = write.start if write.data is None else max(len(data), write.start + len(write.data))
        data = data[:size] + bytes(size - len(data[:size]))
        if write.data is not None:
            data[write.start : write.start + len(write.data)] = write.data
    return bytes(data)


def write_out(tree: Tree, folder: Path) -> None:
    """Make a folder hold just what a crash has left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, value in tree.items():
        if isinstance(value, dict):
            write_out(value, folder / name)
        else:
            (folder / name).write_bytes(content(*value))


def key_of(tree: Tree) -> Any:
    """Equal for trees with the same content; contents are compared by identity, which outlives the recording."""
    return tuple(
        (name, key_of(v) if isinstance(v, dict) else (id(v[0]), tuple(map(id, v[1])))) for name, v in sorted(tree.items(), key=lambda item: item[0])
    )


@dataclass
class Recorder:
    """``os`` for the file layer, below ``root``. synced: whether fsync is heard at all."""

    root: Path
    synced: bool = True
    crashes: list[Crash] = field(default_factory=list)
    full_at: int | None = None  # number of the operation from which the disk is full

    def __post_init__(self) -> None:
        self.root = self.root.absolute()
        self._top = Folder()
        self._now: Tables = {}
        self._scan(self._top, self.root)
        self._durable: Tables = {folder: dict(names) for folder, names in self._now.items()}
        self._log: list[tuple[Change, ...]] = []
        self._open: dict[int, Node] = {}
        self._random = random.Random(0)

    def __getattr__(self, name: str) -> Any:
        """All that changes nothing."""
        return getattr(os, name)

    # operations

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        if not path.absolute().is_relative_to(self.root):
            return os.open(path, flags, mode)
        node = self._find(path)
        if node is None or flags & os.O_TRUNC:
            self._crash("open", self._place(path))
        handle = os.open(path, flags, mode)
        if node is None:
            node = File()
            self._change((*self._place(path), node))
        elif flags & os.O_TRUNC and isinstance(node, File):
            node.pending += (Write(0),)
        self._open[handle] = node
        return handle

    def close(self, handle: int) -> None:
        os.close(handle)
        self._open.pop(handle, None)

    def pwrite(self, handle: int, data: Any, start: int) -> int:
        written = bytes(data)
        self._crash("pwrite", None, (self._open.get(handle), Write(start, written[: len(written) // 2])))
        self._pend(handle, Write(start, written))
        return os.pwrite(handle, data, start)

    def ftruncate(self, handle: int, size: int) -> None:
        self._crash("ftruncate")
        os.ftruncate(handle, size)
        self._pend(handle, Write(size))

    def posix_fallocate(self, handle: int, start: int, size: int) -> None:
        self._crash("posix_fallocate")
        os.posix_fallocate(handle, start, size)
        self._pend(handle, Write(max(size, os.fstat(handle).st_size)))

    def fsync(self, handle: int) -> None:
        self._crash("fsync")
        os.fsync(handle)
        node = self._open.get(handle)
        if not self.synced or node is None:
            return
        if isinstance(node, File):
            node.durable, node.pending = content(node.durable, node.pending), ()
            return
        ours = [changes for changes in self._log if any(folder is node for folder, _, _ in changes)]
        self._log = [changes for changes in self._log if changes not in ours]
        _apply(self._durable, ours)

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        self._crash("mkdir", self._place(path))
        os.mkdir(path, mode)
        folder = Folder()
        self._now[folder], self._durable[folder] = {}, {}
        self._change((*self._place(path), folder))

    def unlink(self, path: Path) -> None:
        self._crash("unlink", self._place(path))
        os.unlink(path)
        self._change((*self._place(path), None))

    def rmdir(self, path: Path) -> None:
        self._crash("rmdir", self._place(path))
        os.rmdir(path)
        self._change((*self._place(path), None))

    def rename(self, source: Path, target: Path) -> None:
        self._crash("rename", self._place(target))
        node = self._find(source)
        os.rename(source, target)
        self._change((*self._place(source), None), (*self._place(target), node))

    replace = rename

    # what is known

    def _scan(self, folder: Folder, path: Path) -> None:
        self._now[folder] = {}
        for entry in path.iterdir():
            node: Node = Folder() if entry.is_dir() else File(entry.read_bytes())
            self._now[folder][entry.name] = node
            if isinstance(node, Folder):
                self._scan(node, entry)

    def _place(self, path: Path) -> tuple[Folder, str]:
        """(folder, name) of a path below the root."""
        folder = self._find(path.absolute().parent)
        assert isinstance(folder, Folder), path
        return folder, path.name

    def _find(self, path: Path) -> Node | None:
        node: Node | None = self._top
        for name in path.absolute().relative_to(self.root).parts:
            node = self._now[node].get(name) if isinstance(node, Folder) else None
        return node

    def _change(self, *changes: Change) -> None:
        _apply(self._now, [changes])
        self._log.append(changes)

    def _pend(self, handle: int, write: Write) -> None:
        node = self._open.get(handle)
        if isinstance(node, File):
            node.pending += (write,)

    # what a crash leaves

    def _crash(self, operation: str, place: tuple[Folder, str] | None = None, torn: tuple[Node | None, Write] | None = None) -> None:
        half, write = torn or (None, None)

        def killed(file: File) -> tuple[Write, ...]:
            return (*file.pending, write) if write is not None and file is half else file.pending

        part = {folder: dict(names) for folder, names in self._durable.items()}
        _apply(part, self._log[: self._random.randint(0, len(self._log))])
        left = {
            "killed": self._frozen(self._now, self._top, killed),
            "lost": self._frozen(self._durable, self._top, lambda file: ()),
            "renamed": self._frozen(self._now, self._top, lambda file: ()),
            "mixed": self._frozen(part, self._top, lambda file: tuple(w for w in killed(file) if self._random.random() < 0.5)),
        }
        self.crashes.append(Crash(len(self.crashes), f"{operation} {place[1]}" if place else operation, left))
        if self.full_at is not None and len(self.crashes) > self.full_at and operation in GROWS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _frozen(self, tables: Tables, folder: Folder, kept: Callable[[File], tuple[Write, ...]]) -> Tree:
        return {
            name: self._frozen(tables, node, kept) if isinstance(node, Folder) else (node.durable, kept(node))
            for name, node in tables[folder].items()
        }


def _apply(tables: Tables, log: list[tuple[Change, ...]]) -> None:
    for changes in log:
        for folder, name, node in changes:
            if node is None:
                tables[folder].pop(name, None)
            else:
                tables[folder][name] = node


@contextmanager
def recorded(root: Path, synced: bool = True) -> Iterator[Recorder]:
    """The file layer writes below ``root`` under a recorder's eyes."""
    recorder = Recorder(root, synced)
    real, files.os = files.os, recorder  # type: ignore[assignment, misc]
    try:
        yield recorder
    finally:
        files.os = real  # type: ignore[misc]
    recorder._crash("end")
