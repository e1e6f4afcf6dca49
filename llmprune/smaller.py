"""The end of a structured run: the masked checkpoint without what was masked, loaded again by plain transformers before it is published."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from llmprune.checkpoint.files import make_folder, remove
from llmprune.checkpoint.source import DTYPES, Source
from llmprune.depth import Order, choose_layers, layer_reports, layers_to_drop, repair
from llmprune.errors import PromiseError
from llmprune.evaluation.divergence import after_blocks
from llmprune.experts import prune_experts
from llmprune.gradients import LossGradients
from llmprune.model.matrices import Matrix
from llmprune.reshaped import Reshaped
from llmprune.stream import CheckpointStream, memory_limit
from llmprune.structured.compact import Cutter, parameters_of, write_smaller
from llmprune.structured.export import export, padded
from llmprune.structured.reload import difference, reloaded_logits
from llmprune.structured.slicing import Keeps
from llmprune.structured.structure import Structure
from llmprune.types import BlockReport, Plan
from llmprune.width import choose_width, narrow

OnBlock = Callable[[int, BlockReport, dict[str, str]], None]
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
    stream: CheckpointStream,
    shown: Reshaped,
    structure: Structure,
    blocks: Sequence[BlockReport],
    ids_NL: Tensor,
    pad: bool,
    folder: Path,
    scratch: Path,
) -> Smaller:
    """Write the smaller checkpoint into ``folder`` and load it again. shown: the stream as the model is now.

    Raises PromiseError when it does not load, or predicts otherwise.
    """
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
    return Smaller(structure.name, structure.patterns, tuple(kept), parameters, size, apart, bool(exported.files), (*exported.notes, *notes))


def rescaled(structure: Structure, keeps: Sequence[Keeps]) -> bool:
    """Whether a norm runs over units that go, so that what stays is saved on another scale."""
    return any(structure.rescales(index, cut) for index, cut in enumerate(keeps))


def stored_dtype(source: Source) -> torch.dtype:
    """The coarsest float dtype of a checkpoint."""
    found = {DTYPES[entry.dtype] for entry in source.tensors.values() if entry.dtype in DTYPES}
    return min((dtype for dtype in found if dtype.is_floating_point), key=lambda dtype: dtype.itemsize)


def kept_layers(shown: Reshaped) -> list[int]:
    return [index for index in range(len(shown.names)) if index not in shown.gone]


def cuts(structure: Structure, blocks: Sequence[BlockReport], pad: bool) -> Sequence[Keeps]:
    """The units that each block is saved with."""
    keeps = structure.keeps(row for block in blocks for row in block.rows) if structure.cut else [{} for _ in structure.spaces]
    return padded(structure.spaces, keeps) if pad else keeps


def coarse_blocks(
    shown: Reshaped,
    structure: Structure,
    plan: Plan,
    matrices: dict[int, list[Matrix]],
    ids_NL: Tensor,
    criterion: str | None,
    asked: dict[str, float],
    gradients: LossGradients | None,
    finished: Mapping[int, BlockReport] = MappingProxyType({}),
    on_block: OnBlock = lambda index, report, hashes: None,
    choice: tuple[dict[str, Any] | None, Callable[[dict[str, Any]], None]] = (None, lambda record: None),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[BlockReport]:
    """Let whole layers, experts or residual channels go, and tell ``shown`` of them. choice: what an earlier process has chosen, and what is told
    of the choice.
    """
    if structure.name == "experts":
        return prune_experts(shown, ids_NL, plan, structure, asked, finished, on_block)
    record, write = choice
    if structure.name == "hidden":
        if record is None:
            record = choose_width(shown, ids_NL, plan, matrices, structure.width_at(asked), gradients, progress)
            write(record)
        return narrow(shown, ids_NL, plan, matrices, asked, record, finished, on_block)
    if record is None:
        count = layers_to_drop(structure, plan.sparsity, structure.exact)
        order: Order = "block_influence" if criterion == "block_influence" else "measured"
        record = {"gone": [[index, cost] for index, cost in choose_layers(shown, ids_NL, count, order, progress).items()]}
        write(record)
    gone = {int(index): cost for index, cost in record["gone"]}
    shown.gone = frozenset(gone)
    reports = layer_reports(shown, structure, gone, plan.sparsity)
    return repair(shown, ids_NL, plan, reports, finished, on_block) if gone and plan.asymmetric else reports


@torch.no_grad()
def compare(
    stream: CheckpointStream, shown: Reshaped, ids_NL: Tensor, parameters: int, folder: Path, scratch: Path, rounded_to: torch.dtype
) -> tuple[float | None, Sequence[str]]:
    """(relative difference of the logits on one calibration window, what has to be said). rounded_to: the coarsest dtype that tensors are computed
    in or, if they are rescaled, stored in.
    """
    need = 2 * parameters * stream.dtype.itemsize
    if need > memory_limit():
        return None, (f"not loaded again: that takes some {need:,} bytes, {memory_limit():,} are free",)
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
