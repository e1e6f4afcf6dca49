"""The end of a structured run: the masked checkpoint without the masked units."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from llmprune.checkpoint.files import make_folder, remove
from llmprune.checkpoint.loader import listed
from llmprune.checkpoint.names import natural
from llmprune.checkpoint.source import DTYPES, Source
from llmprune.export.config import export, padded
from llmprune.export.cutter import Cutter, parameters_of, write_smaller
from llmprune.results import BlockReport, Smaller
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.reshaped import Reshaped
from llmprune.structured.slicing import Keeps
from llmprune.structured.structure import Structure


def save_smaller(stream: CheckpointStream, shown: Reshaped, blocks: Sequence[BlockReport], pad: bool, folder: Path) -> Smaller:
    """Write the smaller checkpoint into ``folder``. shown: the stream of the model as pruned."""
    structure = shown.structure
    written, kept = cuts(structure, blocks, pad), kept_layers(shown)
    exported = export(stream.source.config, stream.skeleton, stream.walk.path, structure.spaces, written, kept)
    cutter = Cutter(stream.loader, stream.walk.path, structure.spaces, written, kept, structure.outer)
    if folder.exists():
        remove(folder)
    make_folder(folder)
    size = write_smaller(folder, cutter, exported, stream.block, stream.outer)
    notes = (*exported.notes, *left_out(stream))
    return Smaller(structure.name, structure.patterns, tuple(kept), parameters_of(cutter), size, bool(exported.files), notes)


def left_out(stream: CheckpointStream) -> Sequence[str]:
    """A note that names the source's tensors which the model has no place for, as far as there are any: a smaller checkpoint has none of them."""
    names = sorted(stream.source.tensors.keys() - stream.loader.parameter_of.keys(), key=natural)
    return (f"left out, because the causal language model has no place for them: {listed(names)}",) if names else ()


def rounded_to(stream: CheckpointStream, shown: Reshaped, blocks: Sequence[BlockReport], pad: bool) -> torch.dtype:
    """The coarsest dtype that tensors of the smaller model are computed in or, where a norm runs over dropped units so that the kept ones are
    saved on another scale, stored in.
    """
    rescaled = any(shown.structure.rescales(index, cut) for index, cut in enumerate(cuts(shown.structure, blocks, pad)))
    return stored_dtype(stream.source) if rescaled else stream.dtype


def stored_dtype(source: Source) -> torch.dtype:
    """The coarsest float dtype of a checkpoint."""
    found = {DTYPES[entry.dtype] for entry in source.tensors.values() if entry.dtype in DTYPES}
    return min((dtype for dtype in found if dtype.is_floating_point), key=lambda dtype: dtype.itemsize)


def kept_layers(shown: Reshaped) -> list[int]:
    return [index for index in range(len(shown.names)) if index not in shown.dropped]


def cuts(structure: Structure, blocks: Sequence[BlockReport], pad: bool) -> Sequence[Keeps]:
    """The units that each block is saved with."""
    keeps = structure.keeps(row for block in blocks for row in block.rows) if structure.cut else [{} for _ in structure.spaces]
    return padded(structure.spaces, keeps) if pad else keeps
