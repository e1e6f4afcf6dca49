"""score = |w_rc| * ||x_c||_2: magnitude times the norm of the input that the weight multiplies.

Sun et al., A Simple and Effective Pruning Approach for Large Language Models, eq. 1, https://arxiv.org/abs/2306.11695
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.types import Stat, Stats


@dataclass(frozen=True)
class Wanda:
    needs: ClassVar[frozenset[Stat]] = frozenset({"input_sq"})

    def score(self, weight_RC: Tensor, stats: Stats) -> Tensor:
        assert stats.input_sq_C is not None
        return weight_RC.abs() * stats.input_sq_C.sqrt()
