"""Divergence of a pruned model from the dense one, streamed: mean KL(dense || pruned) of the next-token distributions, in nats per token.

Shapes: N = windows, L = tokens of a window, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.stream.flow import Flow
from llmprune.stream.stream import Stream
from llmprune.types import SILENT, Listener


@dataclass(frozen=True)
class Pass:
    """Who hears how far a pass over the blocks and the logits has come, as ``name``. heads: how many logits are made of each window."""

    name: str = "evaluation"
    listen: Listener = SILENT
    heads: int = 1

    def after_block(self, stream: Stream, done: int) -> None:
        self.listen.progress(self.name, done, len(stream.names) + self._logits(stream))

    def after_window(self, stream: Stream, done: int, windows: int) -> None:
        logits = self._logits(stream)
        self.listen.progress(self.name, len(stream.names) + logits * done // windows, len(stream.names) + logits)

    def _logits(self, stream: Stream) -> int:
        """The work of the logits, in blocks."""
        head, blocks = (sum(p.numel() for p in part.parameters()) for part in (stream.walk.head, stream.walk.blocks))
        return max(1, round(self.heads * len(stream.names) * head / max(1, blocks)))


UNHEARD = Pass()


def after_blocks(stream: Stream, ids_NL: Tensor, heard: Pass = UNHEARD) -> Flow:
    """Windows that have passed through every block of the model as the stream holds it now."""
    flow = Flow(stream, ids_NL)
    heard.after_block(stream, 0)
    for index in range(len(stream.names)):
        with stream.block(index) as block:
            flow.through(index, block)
        heard.after_block(stream, index + 1)
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
