"""One threshold for lam_r * w_rc ** 2 * H_cc over the whole model: the cost of dropping a weight, by the Fisher information lam_r of its output and
the squares H_cc of its input. Each matrix loses the weights below it, within ``width`` of the asked ratio; all are shifted to meet the budget.

Own combination; the diagonal Fisher as in Theis et al., Faster gaze prediction with dense networks and Fisher pruning, https://arxiv.org/abs/1801.05787
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from llmprune.maths.budget import log_histogram, shares_below, spend
from llmprune.types import Seen, Stat


@dataclass(frozen=True)
class Fisher:
    width: Annotated[float, Field(ge=0, description="the most that a ratio differs from the sparsity")] = 0.15
    needs: ClassVar[frozenset[Stat]] = frozenset({"input_sq", "grad_out_sq"})
    looks_at: ClassVar[str] = "inputs"
    scored: ClassVar[bool] = False

    def measure(self, seen: Seen) -> Tensor:
        weight_RC, stats = seen.weight_RC, seen.stats
        if stats.input_sq_C is None or stats.grad_out_sq_R is None or not stats.grad_tokens:
            return weight_RC.new_zeros(0)  # no token reached it
        logs_RC = weight_RC.abs().log2() * 2 + (stats.grad_out_sq_R / stats.grad_tokens).log2().unsqueeze(1) + stats.input_sq_C.log2()
        return log_histogram(logs_RC)

    def share(
        self, measured: dict[str, Tensor], sizes: dict[str, int], blocks: dict[str, str], sparsity: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        under = shares_below(measured, sparsity)
        wanted = {name: min(sparsity + self.width, max(sparsity - self.width, under.get(name, sparsity))) for name in sizes}
        return spend(wanted, sizes, sparsity), under
