"""score = |sum_r w_rc dL/dw_rc| / R, the same for all weights of an input column: the change of the loss to first order when the column is dropped.

Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, https://arxiv.org/abs/1611.06440
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.types import Stat, Stats


@dataclass(frozen=True)
class Taylor:
    needs: ClassVar[frozenset[Stat]] = frozenset({"grad"})
    units_only: ClassVar[bool] = True  # all weights of a column have the same score

    def score(self, weight_RC: Tensor, stats: Stats) -> Tensor:
        assert stats.grad_RC is not None, "a criterion that needs gradients declares them"
        return (weight_RC * stats.grad_RC).mean(0).abs().expand(weight_RC.shape).contiguous()
