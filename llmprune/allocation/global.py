"""One threshold for the criterion's scores over the whole model. They are made comparable by LAMP: a weight's score over the sum of the scores of all
weights of its matrix that are not smaller. Solvers that rank by themselves are served by w_rc ** 2 * H_cc.

Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, https://arxiv.org/abs/2010.07611, on squared scores as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.maths.budget import log_histogram, shares_below, spend
from llmprune.types import Seen, Stat


@dataclass(frozen=True)
class Global:
    needs: ClassVar[frozenset[Stat]] = frozenset({"input_sq"})
    looks_at: ClassVar[str] = "inputs"
    scored: ClassVar[bool] = True

    def measure(self, seen: Seen) -> Tensor:
        if seen.score_RC is not None:
            squares = seen.score_RC.double().square()
        elif seen.stats.input_sq_C is not None:
            squares = seen.weight_RC.double().square() * seen.stats.input_sq_C
        else:
            return seen.weight_RC.new_zeros(0)  # no token reached it
        ascending = squares.flatten().sort().values
        behind = ascending.flip(0).cumsum(0).flip(0)
        return log_histogram((ascending / behind.clamp_min(1e-300)).log2())

    def share(
        self, measured: dict[str, Tensor], sizes: dict[str, int], blocks: dict[str, str], sparsity: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        under = shares_below(measured, sparsity)
        return spend({name: under.get(name, sparsity) for name in sizes}, sizes, sparsity), under
