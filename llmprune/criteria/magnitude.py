"""score = |w|: small weights are dropped first.

Han et al., Learning both Weights and Connections for Efficient Neural Networks, https://arxiv.org/abs/1506.02626
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.types import Stat, Stats


@dataclass(frozen=True)
class Magnitude:
    needs: ClassVar[frozenset[Stat]] = frozenset()

    def score(self, weight_RC: Tensor, stats: Stats) -> Tensor:
        return weight_RC.abs()
