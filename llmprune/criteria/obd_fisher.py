"""score = 1/2 * w ** 2 * E[g ** 2]: the change of the true loss to second order, its Hessian's diagonal taken as the empirical Fisher information,
the mean over windows of the squared gradient.

LeCun, Denker and Solla, Optimal Brain Damage, https://papers.nips.cc/paper/250-optimal-brain-damage; with the Fisher information: Theis et al.,
Faster gaze prediction with dense networks and Fisher pruning, https://arxiv.org/abs/1801.05787
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.types import Stat, Stats


@dataclass(frozen=True)
class OBDFisher:
    needs: ClassVar[frozenset[Stat]] = frozenset({"grad_sq"})

    def score(self, weight_RC: Tensor, stats: Stats) -> Tensor:
        assert stats.grad_sq_RC is not None
        return 0.5 * weight_RC.square() * (stats.grad_sq_RC / max(stats.grad_windows, 1))
