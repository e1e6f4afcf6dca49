"""The last promise of a run: the folder that it is about to publish is, for plain transformers, the model as pruned.

Shapes: L = tokens of a window, V = vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmprune.checkpoint.loader import listed
from llmprune.checkpoint.source import open_folder
from llmprune.errors import PromiseError
from llmprune.evaluation.divergence import after_blocks
from llmprune.evaluation.replay import ALIKE, difference
from llmprune.export.reload import Loaded, Reloader
from llmprune.maths.linalg import all_finite
from llmprune.results import Reloaded
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.hidden_states import memory_limit
from llmprune.stream.stream import Stream

ROUNDED_ALIKE = 0.1  # relative difference of logits in dtypes that round at every step
MOST_TOKENS = 128  # of the window that is compared
REPORT_THIS = "report this architecture; nothing was published"


def fits(parameters: int, dtype: torch.dtype) -> bool:
    """Whether a model may be loaded whole in a process of its own: its weights, and as much again while they are read."""
    return need(parameters, dtype) <= memory_limit()


def need(parameters: int, dtype: torch.dtype) -> int:
    """Bytes that loading a whole model may take."""
    return 2 * parameters * dtype.itemsize


@torch.no_grad()
def predictions(stream: Stream, ids_1L: Tensor) -> Tensor:
    """[1, L, V]: logits of the model as the stream holds it now, in memory."""
    ((_, logits_1LV),) = after_blocks(stream, ids_1L).logits()
    return logits_1LV.float().cpu()


def check_result(
    stream: Stream, folder: Path, wanted_1LV: Tensor, ids_1L: Tensor, parameters: int, dtype: torch.dtype, cut: bool, reloader: Reloader
) -> Reloaded:
    """Load the result in ``folder`` and compare it with the model as pruned. wanted: its logits; parameters: of the result; cut: whether units
    were cut out; dtype: the coarsest that it is computed in or, where a cut rescales tensors, stored in.

    Raises PromiseError when it does not load whole, predicts otherwise, or has lost a part that the source has beside its weights.
    """
    if not fits(parameters, stream.walk.model.dtype):
        short = f"loading the result takes about {need(parameters, stream.walk.model.dtype):,} bytes at once, more than were free"
        return from_disk(stream, folder, wanted_1LV, ids_1L, dtype, short)
    try:
        loaded = reloader.load(folder, ids_1L)
    except MemoryError:
        return from_disk(stream, folder, wanted_1LV, ids_1L, dtype, "the process that loaded the result was killed, as where memory runs out")
    check_keys(loaded, cut)
    lost = [part for part, equal in loaded.equal.items() if equal is False]
    if lost:
        raise PromiseError(f"the result's {lost[0]} does not load as the source's does", "report this, with the names of the source's files")
    equal, unread = (tuple(part for part, found in loaded.equal.items() if found is kind) for kind in (True, None))
    return Reloaded(compared(wanted_1LV, loaded.logits_1LV, dtype, stream.device_of(0)), ids_1L.shape[1], equal, unread)


def check_keys(loaded: Loaded, cut: bool) -> None:
    """Check that every tensor has its place. A result that is not cut has the source's tensors, also those that its class has no place for."""
    unfit = {what: keys for what, keys in loaded.unfit.items() if cut or what != "unexpected_keys"}
    if unfit:
        what, keys = next(iter(unfit.items()))
        raise PromiseError(f"the result does not fit its class, {what.replace('_', ' ')}: {listed(keys)}", REPORT_THIS)


def from_disk(stream: Stream, folder: Path, wanted_1LV: Tensor, ids_1L: Tensor, dtype: torch.dtype, why: str) -> Reloaded:
    """What can be checked where memory has no room for the whole result: its blocks, read one by one from its own files and config."""
    if not isinstance(stream, CheckpointStream):
        return Reloaded(None, 0, instead=f"not loaded again: {why}")
    again = CheckpointStream(open_folder(folder, stream.source.name), stream.dtype, stream.device)
    apart = compared(wanted_1LV, predictions(again, ids_1L), dtype, torch.device("cpu"))
    return Reloaded(apart, ids_1L.shape[1], instead=f"loaded again block by block, not by transformers: {why}")


def compared(wanted_1LV: Tensor, got_1LV: Tensor, dtype: torch.dtype, device: torch.device) -> float | None:
    """The relative difference of the logits; None where those of the pruned model are not finite. Raises PromiseError where it is too large.

    In a dtype that rounds at every step, and on another device than the CPU, where the result is loaded, it is that of the median token: a router of
    experts may decide otherwise for some. device: where the pruned model's logits were computed.
    """
    if not all_finite(wanted_1LV):
        return None
    measure = difference if dtype in ALIKE or device.type == "cpu" else median_difference
    apart = measure(wanted_1LV, got_1LV)
    most = ALIKE.get(dtype, ROUNDED_ALIKE)
    if not apart <= most:
        raise PromiseError(f"the saved model's logits differ from the pruned model's by {apart:.3g} of the largest, more than {most:g}", REPORT_THIS)
    return apart


def median_difference(wanted_1LV: Tensor, got_1LV: Tensor) -> float:
    """The median over tokens of the largest difference of their logits, over the largest logit."""
    return float((wanted_1LV - got_1LV).abs().amax(-1).median() / wanted_1LV.abs().max().clamp_min(1e-30))
