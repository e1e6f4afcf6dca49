"""The cost of dropping a unit: channels and heads by their weights, inputs or gradients, blocks by what they change, experts by what they add.

The smallest scores are dropped.

Shapes: U = units, K = rows or columns of a unit in one matrix, R = output rows, C = input columns, T = tokens, D = width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.types import Stats


def variance(stats: Stats) -> Tensor:
    """[C], float64: of each input over the calibration tokens. Needs "input_sq" and "input_sum"."""
    assert stats.input_sq_C is not None
    assert stats.input_sum_C is not None
    around_C = stats.input_sq_C.double() - stats.input_sum_C.double().square() / max(stats.tokens, 1)
    return around_C.clamp_min_(0) / max(stats.tokens - 1, 1)


def flap(weight_RC: Tensor, stats: Stats, columns_UK: Tensor) -> Tensor:
    """[U] = sum over the reader's columns c of a unit of ||W_:c||^2 var(x_c): the error that remains when a bias compensates for the means.

    An et al., Fluctuation-based Adaptive Structured Pruning (WIFV), https://arxiv.org/abs/2312.11983; for heads it takes the mean over columns,
    which gives the same order.
    """
    return (weight_RC.double().square().sum(0) * variance(stats))[columns_UK].sum(1)


def standardised(score_U: Tensor) -> Tensor:
    """Scores of the units of one space, brought to mean 0 and deviation 1 so that they compare with other layers' and modules' (FLAP)."""
    if len(score_U) < 2:
        return torch.zeros_like(score_U, dtype=torch.float64)
    score_U = score_U.double()
    return (score_U - score_U.mean()) / score_U.std().clamp_min(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class Mean:
    """A mean over tokens, accumulated by micro-batches: add them."""

    total: float = 0.0
    tokens: int = 0

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.tokens + other.tokens)

    @property
    def value(self) -> float:
        """0 where there was no token."""
        return self.total / max(self.tokens, 1)


def block_influence(entered_NLD: Tensor, left_NLD: Tensor) -> Mean:
    """1 - cos(h_in, h_out) of every token of a micro-batch: how far a block turns the hidden states.

    Men et al., ShortGPT, https://arxiv.org/abs/2403.03853
    """
    before_TD, after_TD = (value.reshape(-1, value.shape[-1]).float() for value in (entered_NLD, left_NLD))
    turned_T = 1 - F.cosine_similarity(before_TD, after_TD, dim=1)
    return Mean(float(turned_T.sum(dtype=torch.float64)), len(turned_T))


def routed_norm(gate_T: Tensor, output_TD: Tensor) -> Mean:
    """Gate weight times ||expert(x)||_2 of the tokens that were routed to one expert: what it adds to them on average. Pass routed tokens alone.

    Lasby et al., REAP the Experts, https://arxiv.org/abs/2510.13999
    """
    added_T = gate_T.reshape(-1).double() * output_TD.reshape(-1, output_TD.shape[-1]).float().norm(dim=1)
    return Mean(float(added_T.sum()), len(added_T))
