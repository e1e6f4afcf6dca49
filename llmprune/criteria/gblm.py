"""score = |w| * sqrt(sum over windows n of g_n ** 2), g_n = dL_n/dW: magnitude times the l2 norm of the gradients.

Das et al., Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models (GBLM-Pruner), https://arxiv.org/abs/2311.04902: its
score by gradients alone. The authors' full score adds Wanda's, after a scaling of the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.types import Stat, Stats


@dataclass(frozen=True)
class GBLM:
    needs: ClassVar[frozenset[Stat]] = frozenset({"grad_sq"})

    def score(self, weight_RC: Tensor, stats: Stats) -> Tensor:
        assert stats.grad_sq_RC is not None
        return weight_RC.abs() * stats.grad_sq_RC.sqrt()
