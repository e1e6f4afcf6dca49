"""The one reader of checkpoints: safetensors headers checked strictly, tensors by ``pread``, never pickles, never outside the folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llmprune.checkpoint.companions import TOKENIZER, companions, matches
from llmprune.checkpoint.files import CHUNK, read_range
from llmprune.errors import RequestError, StoppedError
from llmprune.maths.linalg import all_finite

MAX_JSON = 64 << 20
MAX_HEADER = 100 << 20
MAX_TENSORS = 400_000  # of a checkpoint; the largest mixtures, with separate scales for every expert, hold half of that
# Files beside the weights that are read whole, by llmprune or by the tokenizer's library.
READ_WHOLE = ("*config.json", "*.index.json", *TOKENIZER)
SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors")
FIRST_NUMBER = re.compile(r"(|.*?\.)(\d{1,9})(?:\.|$)")  # in model.layers.7.mlp.experts.3.weight: the block's
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}  # numbers only with their scales
SIZES = {name: dtype.itemsize for name, dtype in (DTYPES | CODES).items()} | {"U16": 2, "U32": 4, "U64": 8}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its file, dtype and shape as stored, absolute byte range."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class StoredForm(Protocol):
    """Reads tensors whose stored form differs from the one shown (quantised.py)."""

    method: str

    def read_many(self, names: list[str]) -> dict[str, Tensor]: ...

    def scan(self) -> dict[str, str]: ...


@dataclass
class Source:
    """An opened checkpoint folder.

    ``config`` is config.json as stored; ``tensors`` all entries of all weight files; ``headers`` the raw leading bytes of each file. With a
    ``decoder`` they describe the plain checkpoint that it is shown as, and written as.
    """

    folder: Path
    name: str  # as it is shown: alias, Hub id, or last name of the folder
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, Entry]
    headers: dict[str, bytes]
    states: dict[str, tuple[int, int]]  # size and mtime of each file when it was opened
    hashes: dict[str, str] = field(default_factory=dict)  # sha256 of each file, after scan()
    decoder: StoredForm | None = None
    indexed: bool = False  # an index says which file holds each tensor

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.states.values())

    @property
    def index(self) -> dict[str, Any]:
        """The index of a checkpoint in several files."""
        size = sum(entry.end - entry.start for entry in self.tensors.values())
        return {"metadata": {"total_size": size}, "weight_map": {key: entry.file for key, entry in self.tensors.items()}}

    @property
    def blocks(self) -> int:
        """The number of blocks by the names of the tensors: the most different first numbers after one prefix."""
        numbers: dict[str, set[str]] = {}
        for name in self.tensors:
            if found := FIRST_NUMBER.match(name):
                numbers.setdefault(found[1], set()).add(found[2])
        return max(map(len, numbers.values()), default=0)

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype, in memory that it owns."""
        return self.read_many([name])[name]

    def read_many(self, names: list[str]) -> dict[str, Tensor]:
        """Several tensors, each file opened once. Raises StoppedError when a file changed since it was opened."""
        if self.decoder is not None:
            return self.decoder.read_many(names)
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        out = {}
        for file, wanted in by_file.items():
            handle = os.open(self.folder / file, os.O_RDONLY)
            try:
                if _state(os.fstat(handle)) != self.states[file]:
                    raise StoppedError(f"{file}: changed during the run", "restore it, or start over with --restart")
                for name in wanted:
                    out[name] = read_tensor(handle, self.tensors[name])
            finally:
                os.close(handle)
        return out

    def pieces(self, file: str) -> Iterator[tuple[str, Entry, bytearray]]:
        """All data of a file in order, in pieces of one tensor each."""
        entries = sorted((e for e in self.tensors.items() if e[1].file == file), key=lambda item: item[1].start)
        handle = os.open(self.folder / file, os.O_RDONLY)
        try:
            for name, entry in entries:
                for start in range(entry.start, entry.end, CHUNK):
                    yield name, entry, read_range(handle, start, min(CHUNK, entry.end - start), file)
        finally:
            os.close(handle)

    def scan(self, unbounded: Container[str] = (), heard: Callable[[int], None] | None = None) -> None:
        """One pass over all weights before anything is computed: file hashes, and every float finite; those in ``unbounded`` may be infinite.
        heard: is called with the number of bytes read.

        Raises RequestError naming the tensors that hold NaN or infinity.
        """
        if self.decoder is not None:
            self.hashes = self.decoder.scan()
            return
        bad: dict[str, int] = {}
        read = 0
        for file in self.headers:
            digest = hashlib.sha256(self.headers[file])
            for name, entry, data in self.pieces(file):
                digest.update(data)
                read += len(data)
                if heard is not None:
                    heard(read)
                dtype = DTYPES.get(entry.dtype)
                if dtype is not None and dtype.is_floating_point:
                    values = torch.frombuffer(data, dtype=dtype)
                    if not all_finite(values) and (count := int((values.isnan() if name in unbounded else ~values.isfinite()).sum())):
                        bad[name] = bad.get(name, 0) + count
            self.hashes[file] = digest.hexdigest()
        if bad:
            more = f" and {len(bad) - 3} more tensors" if len(bad) > 3 else ""
            first = ", ".join(f"{name} ({count})" for name, count in list(bad.items())[:3])
            raise RequestError(f"{self.name}: NaN or infinite weights in {first}{more}", "repair or re-download the checkpoint")


def read_tensor(handle: int, entry: Entry) -> Tensor:
    """The tensor at an entry's byte range of an open file."""
    dtype = (DTYPES | CODES)[entry.dtype]
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(read_range(handle, entry.start, entry.end - entry.start, entry.file), dtype=dtype).view(entry.shape)


def open_folder(folder: Path, name: str, revision: str | None = None) -> Source:
    """Open a local checkpoint from its metadata alone; no tensor is read.

    Raises RequestError for a missing or malformed config, index, file or header, or a file whose size does not match its header.
    """
    if not folder.is_dir():
        raise RequestError(f"{name}: no such folder", "give a folder, a Hub id such as org/name, or an alias (llmprune methods aliases)")
    check_places(folder)
    check_adapter(folder)
    if not (folder / "config.json").exists():
        _weight_files(folder, {})  # which says so of a folder with weights of another kind
    config = read_json(folder / "config.json")
    files, index = _weight_files(folder, config)
    tensors: dict[str, Entry] = {}
    headers, states = {}, {}
    for file in files:
        headers[file], entries, states[file] = _read_header(folder, file)
        twice = tensors.keys() & entries.keys()
        if twice:
            raise RequestError(f"{file}: {sorted(twice)[0]!r} is in another file too", "the checkpoint is inconsistent; fetch it again")
        tensors |= entries
        if len(tensors) > MAX_TENSORS:
            raise RequestError(f"{name}: more than {MAX_TENSORS} tensors", "no valid checkpoint has that many")
    if index is not None:
        wrong = sorted(k for k, f in index.items() if k not in tensors or tensors[k].file != f)
        wrong += sorted(tensors.keys() - index.keys())
        if wrong:
            raise RequestError(f"{INDEX}: out of step with the files for {len(wrong)} tensors, first {wrong[0]!r}", "fetch the checkpoint again")
    return Source(folder, name, revision, config, tensors, headers, states, indexed=index is not None)


def check_places(folder: Path) -> None:
    """Check that every file is in the folder itself; in a snapshot of the Hub's cache, in the blobs beside it. Those read whole are of sane size.

    Raises RequestError: a link to elsewhere would copy a file of the model author's choice into the output.
    """
    own = folder.resolve()
    blobs = (own.parent.parent / "blobs").resolve() if own.parent.name == "snapshots" else own
    for path in sorted({*folder.iterdir(), *companions(folder)}):
        name, place = path.relative_to(folder).as_posix(), Path(os.path.realpath(path))  # a loop of links does not stop it
        if path.is_symlink() and not path.is_dir() and place.parent not in (own, blobs, path.parent.resolve()):
            raise RequestError(
                f"{folder.name}/{name}: a link that leads out of the folder", "put the file itself there, or give the folder that it is in"
            )
        if place.exists() and not place.is_file() and not place.is_dir():
            raise RequestError(f"{folder.name}/{name}: is not a file, but a pipe or a device", "remove it")
        if path.is_file() and matches(name, READ_WHOLE):
            check_size(path)


def check_adapter(folder: Path) -> None:
    """Raises RequestError for an adapter, alone or beside the weights that it would change: transformers loads it with them."""
    if not (folder / ADAPTER).exists():
        return
    adapter = read_json(folder / ADAPTER)
    kind, base = str(adapter.get("peft_type", "PEFT"))[:40], str(adapter.get("base_model_name_or_path", "its model"))[:200]
    merge = f"merge it first: load it on {base} with peft, then merge_and_unload() and save_pretrained()"
    if (folder / "config.json").exists():
        raise RequestError(f"{folder.name}: an adapter ({kind}) lies beside the weights and is not merged", f"{merge}; or remove {ADAPTER}")
    raise RequestError(f"{folder.name}: an adapter ({kind}), not a model", merge)


def check_size(path: Path) -> None:
    """A file that is parsed whole is of sane size; RequestError otherwise."""
    size = path.stat().st_size
    if size > MAX_JSON:
        raise RequestError(f"{path.name}: {size} bytes, more than {MAX_JSON}", "no valid file of this kind is so large")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of sane size; RequestError otherwise."""
    try:
        check_size(path)
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise RequestError(f"{path.parent.name}/{path.name}: {error.strerror}", "give a folder with a Hugging Face checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path.name}: not valid JSON ({str(error)[:80]})", "fetch the checkpoint again") from None
    if not isinstance(value, dict):
        raise RequestError(f"{path.name}: is not a JSON object", "fetch the checkpoint again")
    return value


def _weight_files(folder: Path, config: dict[str, Any]) -> tuple[list[str], dict[str, str] | None]:
    """(weight files, weight map of the index that is in force). As transformers chooses: a whole file goes before an index and its shards."""
    named = config.get("transformers_weights")
    if (folder / SINGLE).is_file() and named in (None, SINGLE):
        return [SINGLE], None
    if named not in (None, INDEX):
        raise RequestError(f"config.json: transformers_weights names {str(named)!r}", f"rename that file to {SINGLE}, and remove the key")
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise RequestError(f"{INDEX}: has no weight_map", "fetch the checkpoint again")
        unsafe = [f for f in weight_map.values() if not isinstance(f, str) or not SAFE_NAME.fullmatch(f)]
        if unsafe:
            raise RequestError(f"{INDEX}: {unsafe[0]!r} is not a safetensors file of this folder", "convert the checkpoint to safetensors")
        files = sorted(set(weight_map.values()))
        missing = [f for f in files if not (folder / f).is_file()]
        if missing:
            raise RequestError(f"{folder.name}: {len(missing)} of {len(files)} weight files missing: {', '.join(missing[:5])}", "fetch them again")
        return files, weight_map
    others = {"pickles": (".bin", ".pt", ".pth"), "GGUF": (".gguf",)}
    found = [f"{kind} ({p.name})" for kind, ends in others.items() for p in sorted(folder.iterdir()) if p.suffix in ends]
    hint = "convert it first: load it with transformers and save_pretrained()" if found else "give a folder with model.safetensors"
    raise RequestError(f"{folder.name}: no safetensors weights" + (f", only {found[0]}" if found else ""), hint)


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _read_header(folder: Path, file: str) -> tuple[bytes, dict[str, Entry], tuple[int, int]]:
    broken = "the file is truncated or damaged; fetch it again"
    handle = os.open(folder / file, os.O_RDONLY)
    try:
        state = _state(os.fstat(handle))
        if state[0] < 8:
            raise RequestError(f"{file}: {state[0]} bytes, too short for safetensors", broken)
        lead = bytes(read_range(handle, 0, 8, file))
        length = struct.unpack("<Q", lead)[0]
        if length > MAX_HEADER or length > state[0] - 8:
            raise RequestError(f"{file}: header of {length} bytes in a file of {state[0]}", broken)
        raw = bytes(read_range(handle, 8, length, file))
    finally:
        os.close(handle)
    if raw.count(b'"data_offsets"') > MAX_TENSORS:
        raise RequestError(f"{file}: more than {MAX_TENSORS} tensors", "no valid checkpoint has that many")
    try:
        header = json.loads(raw.decode(), parse_constant=_no_number)
        if b"\\u" in raw:
            json.dumps(header, ensure_ascii=False).encode()  # half of a surrogate pair is not text
    except (ValueError, RecursionError):
        raise RequestError(f"{file}: header is not JSON", broken) from None
    if not isinstance(header, dict):
        raise RequestError(f"{file}: header is not a JSON object", broken)
    said = header.pop("__metadata__", {})
    if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
        raise RequestError(f"{file}: __metadata__ does not map names to texts", broken)
    entries = {name: _entry(file, name, value, 8 + length) for name, value in header.items()}
    at = 8 + length
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.end)):
        if entry.start != at:
            raise RequestError(f"{file}: hole or overlap in the data at byte {at}", broken)
        at = entry.end
    if at != state[0]:
        raise RequestError(f"{file}: header describes {at} bytes, the file has {state[0]}", broken)
    return lead + raw, entries, state


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _entry(file: str, name: str, value: Any, base: int) -> Entry:
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        sound = (
            type(value["shape"]) is list
            and all(type(n) is int and n >= 0 for n in (*shape, start, end))
            and end - start == math.prod(shape) * SIZES[dtype]
        )
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound or not name.isprintable():
        raise RequestError(f"{file}: malformed entry {name!r}", "the file is damaged; fetch it again")
    return Entry(file, dtype, shape, base + start, base + end)
