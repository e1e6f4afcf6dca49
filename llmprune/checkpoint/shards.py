"""Writes a checkpoint whose tensors differ in shape from the source's: laid out from their shapes alone, then filled one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, uint8

from llmprune.checkpoint.files import lay_out, opened, sync_file, sync_folder, to_json, write_range, write_whole
from llmprune.checkpoint.source import INDEX, SIZES

MOST_BYTES = 2 << 30  # of a shard; a single tensor may be larger


@dataclass(frozen=True)
class Shape:
    """One tensor to be written: dtype by its safetensors name, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


class Shards:
    """The weight files of a new folder. Every tensor of ``shapes`` must be put once."""

    def __init__(self, folder: Path, shapes: Mapping[str, Shape]) -> None:
        """Create every file with its header and reserve its space. Raises StoppedError when the disk is too small."""
        self.folder = folder
        self.shapes = shapes
        self._places: dict[str, tuple[str, int]] = {}
        runs = list(_runs(shapes))
        for number, keys in enumerate(runs):
            self._lay_out("model.safetensors" if len(runs) == 1 else f"model-{number + 1:05d}-of-{len(runs):05d}.safetensors", keys)
        if len(runs) > 1:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": {key: file for key, (file, _) in self._places.items()}}
            write_whole(folder / INDEX, to_json(index))
        sync_folder(folder)

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes.values())

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, in their final dtype, to their places. They are on the disk after ``sync``."""
        for key, tensor in tensors.items():
            file, start = self._places[key]
            assert tuple(tensor.shape) == self.shapes[key].shape, f"{key}: {tuple(tensor.shape)}"
            with opened(self.folder / file, os.O_RDWR) as handle:
                write_range(handle, start, memoryview(tensor.contiguous().view(-1).view(uint8).numpy()))  # type: ignore[arg-type]

    def sync(self) -> None:
        for file in sorted({file for file, _ in self._places.values()}):
            with opened(self.folder / file, os.O_RDWR) as handle:
                sync_file(handle)

    def _lay_out(self, file: str, keys: list[str]) -> None:
        header, starts = header_of({key: self.shapes[key] for key in keys})
        lay_out(self.folder / file, header, len(header) + sum(self.shapes[key].bytes for key in keys))
        for key in keys:
            self._places[key] = (file, starts[key])


def header_of(shapes: Mapping[str, Shape]) -> tuple[bytes, dict[str, int]]:
    """The leading bytes of a file that holds these tensors in this order, and the byte at which each of them starts."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, at = {}, 0
    for key, shape in shapes.items():
        header[key] = {"dtype": shape.dtype, "shape": list(shape.shape), "data_offsets": [at, at + shape.bytes]}
        starts[key] = at
        at += shape.bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw, {key: 8 + len(raw) + start for key, start in starts.items()}


def _runs(shapes: Mapping[str, Shape]) -> Iterable[list[str]]:
    """Keys in order, in runs of at most ``MOST_BYTES``."""
    run: list[str] = []
    size = 0
    for key, shape in shapes.items():
        if run and size + shape.bytes > MOST_BYTES:
            yield run
            run, size = [], 0
        run.append(key)
        size += shape.bytes
    yield run
