"""The one file layer: the only way that a run's state reaches the disk. Every write is whole or absent after a crash."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from llmprune.errors import RequestError, StoppedError

CHUNK = 16 << 20
REPORT = "llmprune.json"
UNHASHED = ("README.md", "report.html", REPORT)  # about the weights; written after the hashes, or its owner's to edit


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename, fsync the folder: after a crash the old file or the new one, never a part."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_folder(path.parent)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


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
    """Make the folder and take it for this process; the lock goes with the process. RequestError when another one holds it."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            handle = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        except FileNotFoundError:  # its holder finished and removed it in between
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.stat(folder / "lock").st_ino == os.fstat(handle).st_ino
        except BlockingIOError:
            holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise RequestError(f"{folder.name}: in use by process {holder}", "wait for that run, or choose another --output") from None
        except FileNotFoundError:
            same = False
        if same:
            os.ftruncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
            return handle
        os.close(handle)


def swap_in(folder: Path, output: Path) -> None:
    """Give a finished folder its name; an older output is moved into the folder's parent first, which the caller deletes last."""
    if output.exists():
        os.rename(output, folder.parent / "replaced")
    os.rename(folder, output)
    sync_folder(output.parent)
