"""Perplexity, streamed: exp of the mean negative log-likelihood over the L-1 targets of non-overlapping windows, tail dropped."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from llmprune.data.windows import Windows
from llmprune.evaluation.divergence import after_blocks
from llmprune.stream import Stream
from llmprune.types import Perplexity

TARGETS_AT_ONCE = 512  # bounds the float32 copy of the logits


@torch.no_grad()
def perplexity(stream: Stream, windows: Windows, progress: Callable[[int, int], None] = lambda done, total: None) -> Perplexity:
    """Perplexity of the model as the stream holds it now, one block in memory at a time."""
    flow = after_blocks(stream, windows.ids_NL, progress)
    total = torch.zeros((), dtype=torch.float64)
    dtype = ""
    for ids, logits in flow.logits():
        dtype = str(logits.dtype).removeprefix("torch.")
        targets = ids[0, 1:]
        for a in range(0, len(targets), TARGETS_AT_ONCE):
            b = min(a + TARGETS_AT_ONCE, len(targets))
            total += F.cross_entropy(logits[0, a:b].float(), targets[a:b], reduction="sum").double().cpu()
    count, length = windows.ids_NL.shape
    tokens = count * (length - 1)
    mean = float(total) / tokens
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, windows.dataset, windows.split, length, count, tokens, dtype)
