"""Masks from scores and from gradients, one matrix at a time.

Zhu and Gupta, https://arxiv.org/abs/1710.01878 (magnitude); Sanh, Wolf and Rush, Movement Pruning, https://arxiv.org/abs/2005.07683;
Evci et al., Rigging the Lottery, https://arxiv.org/abs/1911.11134

Shapes: R = output rows, C = input columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.maths.linalg import drop_smallest
from llmprune.types import Mask, Pattern


def masked_further(score_RC: Tensor, keep_RC: Mask, pattern: Pattern, drop: int) -> Mask:
    """Keep-mask with ``drop`` False: what is masked already, and then the smallest scores that the pattern allows to drop."""
    score_RC = score_RC.float().masked_fill(~keep_RC, -torch.inf)
    if not pattern.local:
        return pattern.project(score_RC, drop)
    rows, columns = score_RC.shape  # on the way to N:M the groups fill up one by one; none loses more than M - N
    most = pattern.dropped(rows, columns, 1.0)
    stays_RC = pattern.project(score_RC, most)
    return drop_smallest(score_RC.masked_fill(stays_RC, torch.inf).reshape(-1), min(drop, most)).view(score_RC.shape)


def exchanged(weight_RC: Tensor, gradient_RC: Tensor, keep_RC: Mask, pattern: Pattern, share: float) -> Mask:
    """Keep-mask in which ``share`` of the kept weights, those of the smallest |w|, give their places to masked ones (or to themselves) with the
    largest |dL/dw|. As many are masked as before; of N:M, in each group.
    """
    kept = int(keep_RC.sum())
    gone = keep_RC.numel() - kept + int(share * kept)
    survives_RC = drop_smallest(weight_RC.float().abs().masked_fill(~keep_RC, -1).reshape(-1), gone).view(keep_RC.shape)
    return pattern.project(gradient_RC.float().abs().masked_fill(survives_RC, torch.inf), keep_RC.numel() - kept)
