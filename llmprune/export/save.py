"""The end of a structured run: the masked checkpoint without the masked units, loaded again by plain transformers before it is published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llmprune.checkpoint.files import make_folder, remove
from llmprune.checkpoint.loader import listed
from llmprune.checkpoint.names import natural
from llmprune.checkpoint.source import DTYPES, Source
from llmprune.errors import PromiseError
from llmprune.evaluation.divergence import after_blocks
from llmprune.evaluation.replay import ALIKE, difference
from llmprune.export.config import export, padded
from llmprune.export.cutter import Cutter, parameters_of, write_smaller
from llmprune.export.reload import reloaded_logits
from llmprune.results import BlockReport, Smaller
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.hidden_states import memory_limit
from llmprune.stream.reshaped import Reshaped
from llmprune.structured.slicing import Keeps
from llmprune.structured.structure import Structure

ROUNDED_ALIKE = 0.1  # relative difference of logits in dtypes that round at every step, after a cut

MOST_TOKENS = 256  # of the window that is compared


def save_smaller(
    stream: CheckpointStream,
    shown: Reshaped,
    blocks: Sequence[BlockReport],
    ids_NL: Tensor,
    pad: bool,
    folder: Path,
    scratch: Path,
) -> Smaller:
    """Write the smaller checkpoint into ``folder`` and load it again. shown: the stream of the model as pruned.

    Raises PromiseError when it does not load, or predicts differently.
    """
    structure = shown.structure
    written, kept = cuts(structure, blocks, pad), kept_layers(shown)
    exported = export(stream.source.config, stream.skeleton, stream.walk.path, structure.spaces, written, kept)
    cutter = Cutter(stream.loader, stream.walk.path, structure.spaces, written, kept, structure.outer)
    if folder.exists():
        remove(folder)
    make_folder(folder)
    size = write_smaller(folder, cutter, exported, stream.block, stream.outer)
    parameters = parameters_of(cutter)
    rounded_to = stored_dtype(stream.source) if rescaled(structure, written) else stream.dtype
    apart, notes = compare(stream, shown, ids_NL, parameters, folder, scratch, rounded_to)
    notes = (*exported.notes, *left_out(stream), *notes)
    return Smaller(structure.name, structure.patterns, tuple(kept), parameters, size, apart, bool(exported.files), notes)


def left_out(stream: CheckpointStream) -> Sequence[str]:
    """A note that names the source's tensors which the model has no place for, as far as there are any: a smaller checkpoint has none of them."""
    names = sorted(stream.source.tensors.keys() - stream.loader.parameter_of.keys(), key=natural)
    return (f"left out, because the causal language model has no place for them: {listed(names)}",) if names else ()


def rescaled(structure: Structure, keeps: Sequence[Keeps]) -> bool:
    """Whether a norm runs over dropped units, so that the kept ones are saved on another scale."""
    return any(structure.rescales(index, cut) for index, cut in enumerate(keeps))


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


@torch.no_grad()
def compare(
    stream: CheckpointStream, shown: Reshaped, ids_NL: Tensor, parameters: int, folder: Path, scratch: Path, rounded_to: torch.dtype
) -> tuple[float | None, Sequence[str]]:
    """(relative difference of the logits on one calibration window, notes). rounded_to: the coarsest dtype that tensors are computed
    in or, if they are rescaled, stored in.
    """
    need = 2 * parameters * stream.dtype.itemsize
    if need > memory_limit():
        return None, (f"not loaded again: that takes about {need:,} bytes, and {memory_limit():,} are free",)
    ids_1L = ids_NL[:1, :MOST_TOKENS]
    ((_, wanted_1LV),) = after_blocks(shown, ids_1L).logits()
    apart = difference(wanted_1LV, reloaded_logits(folder, scratch, ids_1L, stream.dtype))
    most = ALIKE.get(rounded_to, ROUNDED_ALIKE)
    if not apart <= most:
        raise PromiseError(
            f"the saved model's logits differ from the pruned model's by {apart:.3g} of the largest, more than {most:g}",
            "report this architecture; nothing was published",
        )
    return apart, ()
