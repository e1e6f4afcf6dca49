"""The one file layer: the only way that a run's state reaches the disk, all of it by functions of ``os``.

After a crash, and after a power failure that loses whatever was not synced, a file written whole is the old one or the new one, and a folder
that has been swapped in is complete.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import sleep
from typing import Any

from llmprune.errors import RequestError, StoppedError

CHUNK = 16 << 20
REPORT = "llmprune.json"
FORMAT = 1  # of llmprune.json, sweep.json, and what bench prints; the next one when an older reader would misread them
UNHASHED = ("README.md", "report.html", REPORT)  # about the weights; written after the hashes, or meant to be edited


def output_folder(name: str) -> Path:
    """The folder of a run's output that a command was given. Raises RequestError where there is none."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise RequestError(f"{name}: no such folder", "give the output folder of a finished run")
    return folder


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(handle: int) -> None:
    """The content and the size of an open file, durably."""
    os.fsync(handle)


def make_folder(folder: Path) -> None:
    """The folder and its parents, durably: a new name is not on the disk before the folder that contains it is synced."""
    if not folder.is_dir():
        make_folder(folder.absolute().parent)
        try:
            os.mkdir(folder)
        except FileExistsError:  # another process was first; if it is a file, writing into it fails
            return
        sync_folder(folder.absolute().parent)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A file's handle; a new file gets the mode that the umask allows."""
    handle = os.open(path, flags, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename, fsync the folder: after a crash the old file or the new one, never a part."""
    beside = path.with_name(path.name + ".tmp")
    with opened(beside, os.O_CREAT | os.O_TRUNC | os.O_WRONLY) as handle:
        write_range(handle, 0, data)
        os.fsync(handle)
    os.replace(beside, path)
    sync_folder(path.parent)


def lay_out(path: Path, header: bytes, size: int) -> None:
    """A file of exactly ``size`` bytes with its space reserved and ``header`` in front. Whatever it holds after that is kept.

    Raises StoppedError when the disk is too small.
    """
    with opened(path, os.O_CREAT | os.O_RDWR) as handle:
        try:
            os.ftruncate(handle, size)
            if sys.platform != "darwin":  # which has no such call: there a disk that is full shows when the tensors are written
                os.posix_fallocate(handle, 0, size)
            write_range(handle, 0, header)
        except OSError as error:
            raise StoppedError(f"{path.name}: {error.strerror} for {size:,} bytes", "free some space, then the same command resumes") from None


def remove(path: Path) -> None:
    """A file, or a folder and all in it; of a symbolic link only the link itself."""
    if path.is_symlink() or not path.is_dir():
        return os.unlink(path)
    for inside in sorted(path.iterdir()):
        remove(inside)
    os.rmdir(path)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def to_versioned_json(value: dict[str, Any]) -> bytes:
    """As ``to_json``, with the format first, for readers of another version."""
    return b'{\n "format": %d,' % FORMAT + to_json({k: v for k, v in value.items() if k != "format"}).removeprefix(b"{")


def check_format(value: Mapping[str, Any], name: str) -> None:
    """Raises RequestError for a file that a newer version has made. One without a format is older than formats, and may do."""
    made = value.get("format", FORMAT)
    if type(made) is not int or made < 1:
        raise RequestError(f"{name}: format {str(made)[:40]!r} is not a number of a format", "make it again")
    if made > FORMAT:
        raise RequestError(f"{name}: made by a newer llmprune (format {made})", "update llmprune")


def hash_file(path: Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_range(handle: int, start: int, size: int, name: str) -> bytearray:
    """Exactly ``size`` bytes at ``start``; StoppedError when the file ends early (it changed under the run)."""
    data = bytearray(size)
    view = memoryview(data)
    done = 0
    while done < size:
        got = os.preadv(handle, [view[done : done + CHUNK]], start + done)
        if got == 0:
            raise StoppedError(f"{name}: ends at byte {start + done}, {size - done} bytes early", "the file changed during the run; restore it")
        done += got
    return data


def write_range(handle: int, start: int, data: Any) -> None:
    """All of ``data``, any contiguous buffer of bytes, at ``start``."""
    data = memoryview(data)
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done : done + CHUNK], start + done)


def lock_folder(folder: Path) -> int:
    """Make the folder and lock it for this process; the lock ends with the process. RequestError when another one holds it."""
    while True:
        make_folder(folder)
        try:
            handle = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:  # its holder finished and removed it meanwhile
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.stat(folder / "lock").st_ino == os.fstat(handle).st_ino
        except BlockingIOError:
            holder = _holder(handle)
            os.close(handle)
            raise RequestError(f"{folder.name}: in use by process {holder}", "wait for that run, or choose another --output") from None
        except FileNotFoundError:
            same = False
        if same:
            os.ftruncate(handle, 0)
            write_range(handle, 0, str(os.getpid()).encode())
            return handle
        os.close(handle)


def _holder(handle: int) -> str:
    """The process id that the holder of a lock has written into it, or is about to write."""
    for _ in range(20):
        number = os.pread(handle, 32, 0).decode(errors="replace").strip()
        if number:
            return number
        sleep(0.01)
    return "unknown"


def remove_locked(folder: Path) -> None:
    """Remove a folder whose lock this process holds: the lock last, so that no other process takes the folder while it is emptied, and just before it
    the record that all of it may be removed.
    """
    last = ("published.json", "lock")
    for path in sorted(folder.iterdir()):
        if path.name not in last:
            remove(path)
    for name in last:
        with suppress(FileNotFoundError):
            os.unlink(folder / name)
    try:
        os.rmdir(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):  # the next run has started in it
            raise


def swap_in(folder: Path, output: Path) -> None:
    """Give a finished folder its name; an older output is first moved into the folder's parent, which the caller deletes last."""
    if output.exists():
        os.rename(output, folder.parent / "replaced")
    os.rename(folder, output)
    sync_folder(output.parent)


def settle_swap(folder: Path, output: Path) -> None:
    """After a crash: undo a swap that stopped between its two renames; of a completed one, drop the older output."""
    replaced = folder / "replaced"
    if replaced.exists() and output.exists():
        remove(replaced)
    elif replaced.exists():
        os.rename(replaced, output)
        sync_folder(output.parent)
