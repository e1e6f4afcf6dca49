"""score = 1/2 * w_rc ** 2 * H_cc, H = X^T X: the squared error of the outputs when only this weight is dropped, by the diagonal of the
layer's Hessian.

LeCun, Denker and Solla, Optimal Brain Damage, https://papers.nips.cc/paper/250-optimal-brain-damage. H_cc is the sum of x_c ** 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.types import Stat, Stats


@dataclass(frozen=True)
class OBD:
    needs: ClassVar[frozenset[Stat]] = frozenset({"input_sq"})

    def score(self, weight_RC: Tensor, stats: Stats) -> Tensor:
        assert stats.input_sq_C is not None
        return 0.5 * weight_RC.square() * stats.input_sq_C
