"""Perplexity, streamed: exp of the mean negative log-likelihood over the L-1 targets of non-overlapping windows, an incomplete last window dropped.

Shapes: N = windows, L = tokens of a window, V = vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.data.windows import Windows
from llmprune.evaluation.divergence import UNHEARD, Pass, after_blocks
from llmprune.model.pictures import IGNORED
from llmprune.results import Perplexity
from llmprune.stream.flow import Flow
from llmprune.stream.stream import Stream
from llmprune.types import SILENT, Listener

TARGETS_AT_ONCE = 512  # bounds the float32 copy of the logits


@torch.no_grad()
def perplexity(stream: Stream, windows: Windows, listen: Listener = SILENT) -> Perplexity:
    """Perplexity of the model as the stream holds it now, one block in memory at a time."""
    heard = Pass(listen=listen)
    return perplexity_of(after_blocks(stream, windows.ids_NL, heard), windows, heard)


def perplexity_of(flow: Flow, windows: Windows, heard: Pass = UNHEARD) -> Perplexity:
    """Perplexity of windows that have passed through every block; their losses are accumulated in float64."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    dtype, pictures = "", flow.stream.walk.pictures
    for number, (ids_1L, logits_1LV) in enumerate(flow.logits(), 1):
        targets_L = pictures.targets(ids_1L[0])
        dtype = name_of(logits_1LV)
        total += surprise(logits_1LV[0], targets_L)
        tokens += int((targets_L != IGNORED).sum())
        heard.after_window(flow.stream, number, len(windows.ids_NL))
    return defined(total, tokens, windows, dtype)


def surprise(logits_LV: Tensor, targets: Tensor) -> Tensor:
    """Summed negative log-likelihood of a window's L-1 targets, float64 on the CPU; placeholders of pictures are left out."""
    total = torch.zeros((), dtype=torch.float64)
    for a in range(0, len(targets), TARGETS_AT_ONCE):
        b = min(a + TARGETS_AT_ONCE, len(targets))
        total += F.cross_entropy(logits_LV[a:b].float(), targets[a:b], reduction="sum").double().cpu()
    return total


def defined(total: Tensor, tokens: int, windows: Windows, dtype: str) -> Perplexity:
    """The perplexity of a negative log-likelihood summed over so many tokens, with its definition."""
    count, length = windows.ids_NL.shape
    mean = float(total) / tokens
    value = math.exp(mean) if mean < 700 else math.inf
    split = ", ".join(part for part in (windows.split, windows.made) if part)  # how windows are made is of their definition
    return Perplexity(value, windows.dataset, split, length, count, tokens, dtype)


def name_of(logits: Tensor) -> str:
    return str(logits.dtype).removeprefix("torch.")
