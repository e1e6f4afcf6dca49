"""score = w_rc^2 var(x_c): the error that remains when a bias compensates for the mean of a dropped input.

An et al., Fluctuation-based Adaptive Structured Pruning (FLAP), https://arxiv.org/abs/2312.11983
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.maths.scores import variance
from llmprune.types import Stat, Stats


@dataclass(frozen=True)
class Fluctuation:
    needs: ClassVar[frozenset[Stat]] = frozenset({"input_sq", "input_sum"})

    def score(self, weight_RC: Tensor, stats: Stats) -> Tensor:
        return weight_RC.square() * variance(stats).to(weight_RC.dtype)
