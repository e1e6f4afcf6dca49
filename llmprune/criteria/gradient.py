"""score = |w * g|, g = dL/dW of the summed next-token loss: the change of the loss to first order when the weight is dropped.

Molchanov et al., Importance Estimation for Neural Network Pruning, https://arxiv.org/abs/1906.10771 (its square root: the same order), and
Pruning Convolutional Neural Networks for Resource Efficient Inference, https://arxiv.org/abs/1611.06440
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.types import Stat, Stats


@dataclass(frozen=True)
class Gradient:
    needs: ClassVar[frozenset[Stat]] = frozenset({"grad"})

    def score(self, weight_RC: Tensor, stats: Stats) -> Tensor:
        assert stats.grad_RC is not None
        return (weight_RC * stats.grad_RC).abs()
