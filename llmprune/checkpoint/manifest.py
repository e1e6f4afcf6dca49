"""The hashes of an output in llmprune.json: sha256 of every file and of every tensor. Made at the end of a run, and checked later.

A source can have such a manifest too, or lie in the Hub's cache, where files are named by their hashes; then what is read is verified.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from llmprune.checkpoint.files import REPORT, UNHASHED, check_format, hash_file
from llmprune.checkpoint.source import Source, open_folder, read_json
from llmprune.errors import RequestError


@dataclass(frozen=True)
class Manifest:
    """sha256 by file name, except for the files about the weights (files.UNHASHED), and by tensor."""

    files: dict[str, str]
    tensors: dict[str, str]


@dataclass(frozen=True)
class Checked:
    """How a folder differs from its manifest: names that have changed, are missing, or are extra."""

    changed_files: tuple[str, ...] = ()
    missing_files: tuple[str, ...] = ()
    extra_files: tuple[str, ...] = ()
    changed_tensors: tuple[str, ...] = ()
    missing_tensors: tuple[str, ...] = ()
    extra_tensors: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()  # why the weights cannot be opened

    def __str__(self) -> str:
        said = {name.replace("_", " "): names for name, names in vars(self).items() if names}
        return "; ".join(f"{len(names)} {what}: {', '.join(names)}" for what, names in said.items())


def manifest_of(folder: Path) -> Manifest:
    """Of a finished checkpoint, each byte read once. Whatever a crash may have left beside its files is ignored."""
    files, tensors = weight_hashes(open_folder(folder, folder.name))
    files |= {name: hash_file(folder / name) for name in names_in(folder) if name not in files and not name.endswith(".tmp")}
    return Manifest(dict(sorted(files.items())), tensors)


def weight_hashes(source: Source) -> tuple[dict[str, str], dict[str, str]]:
    """sha256 of each weight file, and of each tensor."""
    tensors = {key: hashlib.sha256() for key in sorted(source.tensors)}
    files = {}
    for file, header in source.headers.items():
        whole = hashlib.sha256(header)
        for key, _, data in source.pieces(file):
            whole.update(data)
            tensors[key].update(data)
        files[file] = whole.hexdigest()
    return files, {key: digest.hexdigest() for key, digest in tensors.items()}


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file, whatever it holds."""
    return {name: hash_file(folder / name) for name in names_in(folder)}


def names_in(folder: Path) -> list[str]:
    """The files that a manifest lists; hidden ones are ignored."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return [name for name in names if name not in UNHASHED and not any(part.startswith(".") for part in name.split("/"))]


def read_manifest(folder: Path) -> Manifest:
    """The hashes that llmprune.json lists. Raises RequestError when it does not list files of this folder."""
    hint = "give the output folder of a finished run"
    if not (folder / REPORT).is_file():
        raise RequestError(f"{folder.name}: holds no {REPORT}, so it is not a finished output", hint)
    stored = read_json(folder / REPORT)
    check_format(stored, f"{folder.name}/{REPORT}")
    files, tensors = stored.get("files"), stored.get("tensors", {})
    if not is_hashes(files) or not is_hashes(tensors) or "config.json" not in files:
        raise RequestError(f"{folder.name}/{REPORT}: lists no files, so nothing can be verified", "prune again with this version")
    strange = [name for name in files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if strange:
        raise RequestError(f"{folder.name}/{REPORT}: {strange[0]!r} lies outside the folder", hint)
    return Manifest(files, tensors)


def is_hashes(value: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(isinstance(digest, str) for digest in value.values())


def check_manifest(folder: Path) -> tuple[Manifest, Checked]:
    """A finished output's manifest, and how the folder differs from it. Raises RequestError when there is none."""
    listed = read_manifest(folder)
    there = names_in(folder)
    try:
        files, tensors = weight_hashes(open_folder(folder, folder.name))
        unreadable: tuple[str, ...] = ()
    except RequestError as error:  # a broken header, or a missing shard
        files, tensors, unreadable = {}, listed.tensors, (error.message,)
    files |= {name: hash_file(folder / name) for name in there if name not in files}
    files_found, tensors_found = compared(listed.files, files), compared(listed.tensors, tensors)
    return listed, Checked(*files_found, *tensors_found, unreadable)


def compared(listed: dict[str, str], found: dict[str, str]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names that differ, are missing, and are extra."""
    changed = tuple(name for name in listed if name in found and found[name] != listed[name])
    return changed, tuple(listed.keys() - found.keys()), tuple(sorted(found.keys() - listed.keys()))


def check_source(source: Source) -> None:
    """Compare a scanned source with its own manifest, or the Hub's hashes. Raises RequestError naming the files that differ."""
    stored = read_json(source.folder / REPORT) if (source.folder / REPORT).is_file() else {}
    check_format(stored, f"{source.name}/{REPORT}")
    said = stored.get("files")
    here = {name: source.folder / name for name in names_in(source.folder)}
    if is_hashes(said):
        wrong = [name for name, path in here.items() if name in said and (source.hashes.get(name) or hash_file(path)) != said[name]]
        refuse_changed(source, wrong, REPORT, f"restore them; if the change was intended, remove {REPORT} from the folder")
    wrong = [name for name, path in here.items() if path.is_symlink() and not is_blob(path.resolve(), source.hashes.get(name))]
    refuse_changed(source, wrong, "the Hub's hashes", "remove them from the cache and fetch them again")


def refuse_changed(source: Source, names: list[str], witness: str, hint: str) -> None:
    if names:
        raise RequestError(f"{source.name}: {len(names)} files differ from {witness}: {', '.join(names)}", hint)


def is_blob(path: Path, sha256: str | None) -> bool:
    """Whether a file of the Hub's cache has the content that its name promises: by sha256 where large, else by git's hash."""
    if re.fullmatch("[0-9a-f]{64}", path.name):
        return (sha256 or hash_file(path)) == path.name
    if re.fullmatch("[0-9a-f]{40}", path.name):
        data = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == path.name
    return True
