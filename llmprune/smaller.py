"""The end of a structured run: the masked checkpoint without what was masked, loaded again by plain transformers before it is published."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmprune.errors import PromiseError
from llmprune.evaluation.divergence import after_blocks
from llmprune.reshaped import Reshaped
from llmprune.stream import CheckpointStream, memory_limit
from llmprune.structured.compact import Cutter, parameters_of, write_smaller
from llmprune.structured.export import export, padded
from llmprune.structured.reload import difference, reloaded_logits
from llmprune.structured.structure import Structure
from llmprune.types import Row

ALIKE = {torch.float32: 1e-4}  # relative difference of logits; other dtypes round at every step
ROUNDED_ALIKE = 0.1
MOST_TOKENS = 256  # of the window that is compared


@dataclass(frozen=True)
class Smaller:
    """A smaller checkpoint as it was saved. ``difference``: of its logits from the masked model's, relative; None where it was not loaded."""

    pattern: str
    patterns: tuple[str, ...]
    layers: tuple[int, ...]  # numbers in the source of the blocks that stay
    parameters: int
    bytes: int
    difference: float | None
    remote_code: bool
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def save_smaller(
    stream: CheckpointStream, shown: Reshaped, structure: Structure, rows: Iterable[Row], ids_NL: Tensor, pad: bool, folder: Path, scratch: Path
) -> Smaller:
    """Write the smaller checkpoint into ``folder`` and load it again. shown: the stream as the model is now.

    Raises PromiseError when it does not load, or predicts otherwise.
    """
    keeps = structure.keeps(rows) if structure.cut else [{} for _ in stream.names]
    kept = [index for index in range(len(stream.names)) if index not in shown.gone]
    written = padded(structure.spaces, keeps) if pad else keeps
    exported = export(stream.source.config, stream.skeleton, stream.walk.path, structure.spaces, written, kept)
    cutter = Cutter(stream.loader, stream.walk.path, structure.spaces, written, kept)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    size = write_smaller(folder, cutter, exported, stream.block)
    parameters = parameters_of(cutter)
    apart, notes = compare(stream, shown, ids_NL, parameters, folder, scratch)
    return Smaller(
        structure.name, structure.patterns, tuple(kept), parameters, size, apart, bool(exported.files), (*exported.notes, *notes)
    )


@torch.no_grad()
def compare(
    stream: CheckpointStream, shown: Reshaped, ids_NL: Tensor, parameters: int, folder: Path, scratch: Path
) -> tuple[float | None, Sequence[str]]:
    """(relative difference of the logits on one calibration window, what has to be said)."""
    need = 2 * parameters * stream.dtype.itemsize
    if need > memory_limit():
        return None, (f"not loaded again: that takes some {need:,} bytes, {memory_limit():,} are free",)
    ids_1L = ids_NL[:1, :MOST_TOKENS]
    ((_, wanted_1LV),) = after_blocks(shown, ids_1L).logits()
    apart = difference(wanted_1LV, reloaded_logits(folder, scratch, ids_1L, stream.dtype))
    most = ALIKE.get(stream.dtype, ROUNDED_ALIKE)
    if not apart <= most:
        raise PromiseError(
            f"the saved model's logits differ from the pruned model's by {apart:.3g} of the largest, more than {most:g}",
            "report this architecture; nothing was published",
        )
    return apart, ()
