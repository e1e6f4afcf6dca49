"""Divergence of a pruned model from the dense one, streamed: mean KL(dense || pruned) of the next-token distributions, in nats per token.

Shapes: N = windows, L = tokens of a window, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune.stream.flow import Flow
from llmprune.stream.stream import Stream
from llmprune.types import SILENT, Listener


def after_blocks(stream: Stream, ids_NL: Tensor, listen: Listener = SILENT, step: str = "perplexity") -> Flow:
    """Windows that have passed through every block of the model as the stream holds it now."""
    flow = Flow(stream, ids_NL)
    for index in range(len(stream.names)):
        with stream.block(index) as block:
            flow.through(index, block)
        listen.progress(step, index + 1, len(stream.names))
    return flow


def divergences(dense: Flow, pruned: Sequence[Flow]) -> list[float]:
    """Of each pruned flow, the mean over all tokens, accumulated by windows. Its windows are the first of ``dense``; all are after the blocks."""
    stream, totals, tokens = dense.stream, [0.0] * len(pruned), 0
    with stream.outer():
        for (ids_1L, theirs_1LD), *others in zip(dense.windows(), *(flow.windows() for flow in pruned), strict=False):
            theirs_LV = stream.walk.logits(ids_1L, theirs_1LD)[0]
            tokens += ids_1L.shape[1]
            for k, (_, ours_1LD) in enumerate(others):
                totals[k] += float(kl(theirs_LV, stream.walk.logits(ids_1L, ours_1LD)[0]).sum(dtype=torch.float64))
    return [total / tokens for total in totals]


def kl(dense_LV: Tensor, pruned_LV: Tensor) -> Tensor:
    """[L]: KL(dense || pruned) of each token's prediction, from logits."""
    dense_LV, pruned_LV = (logits_LV.float().log_softmax(-1) for logits_LV in (dense_LV, pruned_LV))
    return (dense_LV.exp() * (dense_LV - pruned_LV)).sum(-1)
