"""A pruned model beside the dense one on the same evaluation windows: both perplexities, and the divergence of the predictions.

The dense model runs first, and its final hidden states are kept (in memory, or a file where they are large), so that the pruned model needs only
one more pass and no second model.

Shapes: N = windows, L = tokens of a window, D = hidden width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmprune.data.windows import Windows
from llmprune.evaluation.divergence import Pass, after_blocks
from llmprune.evaluation.perplexity import TARGETS_AT_ONCE, defined, name_of, perplexity_of
from llmprune.model.pictures import IGNORED
from llmprune.results import Divergence, Perplexity
from llmprune.stream.flow import Flow
from llmprune.stream.stream import Stream
from llmprune.types import SILENT, Listener, Records


@dataclass(frozen=True)
class Dense:
    """The dense model's results on one evaluation set. ``head_VD`` is its head's weight where the head is pruned too, else None."""

    windows: Windows
    perplexity: Perplexity
    flow: Flow
    head_VD: Tensor | None


def dense_passes(stream: Stream, evaluation: Sequence[Windows], prunes_head: bool, records: Records, listen: Listener) -> list[Dense]:
    """The dense model on every evaluation set. Its hidden states are not stored across processes, so a resumed run computes them again."""
    record = records.read("dense") or {"perplexity": [None] * len(evaluation)}
    known = [value and Perplexity(**value) for value in record["perplexity"]]
    found = [dense_pass(stream, windows, prunes_head, value, listen) for windows, value in zip(evaluation, known, strict=True)]
    records.write("dense", {"perplexity": [asdict(dense.perplexity) for dense in found]})
    return found


@torch.no_grad()
def dense_pass(stream: Stream, windows: Windows, prunes_head: bool, known: Perplexity | None, listen: Listener) -> Dense:
    """Before anything is pruned. known: the perplexity, if an earlier process has measured it."""
    heard = Pass("dense evaluation", listen)
    flow = after_blocks(stream, windows.ids_NL, heard)
    flow.rest()
    head_VD = None
    if prunes_head:
        with stream.outer():
            head_VD = _head(stream).data.clone()
    return Dense(windows, known or perplexity_of(flow, windows, heard), flow, head_VD)


@torch.no_grad()
def pruned_pass(dense: Dense, stream: Stream, listen: Listener = SILENT) -> tuple[Perplexity, Divergence]:
    """Of the model as ``stream`` holds it now, on the same windows; whatever is outside the blocks is the dense model's, except in a rotated
    stream.
    """
    windows = dense.windows
    heard = Pass("pruned evaluation", listen, heads=2)
    flow = after_blocks(stream, windows.ids_NL, heard)
    lost, apart, same = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    tokens, dtype, walk = 0, "", dense.flow.stream.walk
    with stream.outer(), nullcontext() if walk is stream.walk else dense.flow.stream.outer():
        for number, ((ids_1L, ours_1LD), (_, theirs_1LD)) in enumerate(zip(flow.windows(), dense.flow.windows(), strict=True), 1):
            ours_LV = stream.walk.logits(ids_1L, ours_1LD)[0]
            with _head_of(dense):
                theirs_LV = walk.logits(ids_1L, theirs_1LD)[0]
            dtype = name_of(ours_LV)
            targets_L = walk.pictures.targets(ids_1L[0])
            tokens += int((targets_L != IGNORED).sum())
            parts = zip(*(t.split(TARGETS_AT_ONCE) for t in (theirs_LV[:-1], ours_LV[:-1], targets_L)), strict=True)
            sums = [sum(of_parts) for of_parts in zip(*(compared(*part) for part in parts), strict=True)]
            lost, apart, same = (total + of_window for total, of_window in zip((lost, apart, same), sums, strict=True))
            heard.after_window(stream, number, len(windows.ids_NL))
    value = defined(lost, tokens, windows, dtype)
    definition = (value.dataset, value.split, value.window, value.windows, value.tokens, value.dtype)
    return value, Divergence(float(apart) / value.tokens, float(same) / value.tokens, *definition)


def compared(dense_TV: Tensor, pruned_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the counted targets, float64 on the CPU: the pruned model's negative log-likelihood, its divergence from the dense one (as ``kl``),
    equal likeliest tokens. The pruned model's log-probabilities are computed once for both.
    """
    counted_T = targets_T != IGNORED
    same = (dense_TV.argmax(-1) == pruned_TV.argmax(-1)) & counted_T
    pruned_TV, dense_TV = (logits_TV.float().log_softmax(-1) for logits_TV in (pruned_TV, dense_TV))
    lost = F.nll_loss(pruned_TV, targets_T, reduction="sum", ignore_index=IGNORED)
    apart_T = torch.sub(dense_TV, pruned_TV, out=pruned_TV).mul_(dense_TV.exp_()).sum(-1)
    return lost.double().cpu(), (apart_T * counted_T).sum(dtype=torch.float64).cpu(), same.sum().double().cpu()


@contextmanager
def _head_of(dense: Dense) -> Iterator[None]:
    """Temporarily put the dense head in place, where the pruned one differs."""
    if dense.head_VD is None:
        yield
        return
    head = _head(dense.flow.stream)
    pruned, head.data = head.data, dense.head_VD
    try:
        yield
    finally:
        head.data = pruned


def _head(stream: Stream) -> nn.Parameter:
    return stream.walk.head.get_parameter("weight")
