"""score = w_rc ** 2 / [H^-1]_cc, H = X^T X + damping: the squared error of the layer's outputs when the weight is dropped and the others of its row
compensate for it optimally.

Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon,
https://papers.nips.cc/paper/647-second-order-derivatives-for-network-pruning-optimal-brain-surgeon
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.maths.linalg import Damping, factor_of
from llmprune.types import Stat, Stats


@dataclass(frozen=True)
class OBS:
    damping: Damping = 0.01
    needs: ClassVar[frozenset[Stat]] = frozenset({"gram"})

    def score(self, weight_RC: Tensor, stats: Stats) -> Tensor:
        upper_CC = factor_of(stats, self.damping).upper_CC
        return weight_RC.square() / upper_CC.square().sum(0)  # H^-1 = U^T U
