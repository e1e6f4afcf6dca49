"""Least-squares values of the matrix that reads removed units, and the bias that compensates for their means.

    argmin over V that is zero outside the kept columns k of tr (V - W') H (V - W')^T  =  (W' H)_:k (H_kk)^-1

in one Cholesky factorisation for all rows. With W' the asymmetric target (llmprune.maths.asymmetric_target), this is at once the least-squares fit
to the dense path's outputs: (W H + share [W (K - H) + E])_:k (H_kk)^-1. No weighing of the rows changes it, since all rows keep the same columns.

Shapes: R = output rows, C = input columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.maths.linalg import definite
from llmprune.types import Stats


@dataclass(frozen=True)
class Refitted:
    """``weight_RC`` is +0.0 in dropped columns."""

    weight_RC: Tensor
    lost: float  # squared error against ``W' x``, damped, summed over rows and calibration tokens
    notes: tuple[str, ...] = ()


def refit_kept(weight_RC: Tensor, gram_CC: Tensor, keep_C: Tensor, damping: float = 0.01) -> Refitted:
    """The best weights on the kept columns, in the dtype of ``weight_RC``; computed in float64. keep_C: bool, at least one True.

    Raises StoppedError as linalg.definite does.
    """
    found = definite(gram_CC, damping)
    target_RC, matrix_CC = weight_RC.double(), found.matrix_CC
    wanted_RC = target_RC @ matrix_CC
    # every principal part of a positive definite matrix is positive definite
    lower_CC = torch.linalg.cholesky(matrix_CC[keep_C][:, keep_C])
    out_RC = torch.zeros_like(target_RC)
    out_RC[:, keep_C] = torch.cholesky_solve(wanted_RC[:, keep_C].T, lower_CC).T
    change_RC = out_RC - target_RC
    lost = float(((change_RC @ matrix_CC) * change_RC).sum())
    return Refitted(out_RC.to(weight_RC.dtype), max(lost, 0.0), found.notes)


def mean_bias(weight_RC: Tensor, pruned_RC: Tensor, stats: Stats) -> Tensor:
    """[R] = (W - V) mean(x), to be added to the outputs: their means are then what they were.

    Without a refit V is W but for its removed columns, and this is An et al.'s baseline bias compensation, FLAP,
    https://arxiv.org/abs/2312.11983. Needs "input_sum".
    """
    assert stats.input_sum_C is not None
    mean_C = stats.input_sum_C.double() / max(stats.tokens, 1)
    return ((weight_RC.double() - pruned_RC.double()) @ mean_C).to(weight_RC.dtype)
