"""min over allowed V of tr (G (V - W) H (V - W)^T) by ADMM, finished by conjugate gradients on the kept weights.

G couples the rows by the gradients of the dense model's loss at the outputs (llmprune.maths.coupled_rows), H the columns by the inputs: the
Kronecker-factored curvature of Martens and Grosse (https://arxiv.org/abs/1503.05671), by which LLM Surgeon prunes with OBS updates
(https://arxiv.org/abs/2312.17244). Both sides are scaled to a unit diagonal; the ridge step is elementwise in the two eigenbases; projection and
rho are those of ``admm``. Rows are not coupled where no gradient reached a matrix; where an eigenbasis takes too long, in the refit alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmprune.maths.coupled_rows import LEAST, Basis, Identity, coupled_refit, rows_of
from llmprune.maths.linalg import Damping, Eigen, eigen_of, ridge_inverse_of, scaled_of
from llmprune.solvers._alternation import Wide, WideIterations, WideRho, alternate, settle, too_wide
from llmprune.types import Mask, Pattern, Pruned, Stat, Stats


@dataclass(frozen=True)
class KFAC:
    damping: Damping = 0.01
    identity: Identity = LEAST
    iterations: Annotated[int, Field(ge=1, description="at most, of ADMM")] = 100
    refit_steps: Annotated[int, Field(ge=0, description="of conjugate gradients on the weights that stay")] = 10
    wide: Wide = 4096
    wide_rho: WideRho = 1.0
    wide_iterations: WideIterations = 30
    needs: ClassVar[frozenset[Stat]] = frozenset({"gram", "grad_out_gram"})
    own_score: ClassVar[bool] = True
    work: ClassVar[tuple[int, int]] = (40, 60)

    def solve(self, weight_RC: Tensor, score_RC: Tensor | None, stats: Stats, pattern: Pattern, drop: int) -> Pruned:
        if drop == 0:
            return Pruned(weight_RC, torch.ones_like(weight_RC, dtype=torch.bool), 0.0)
        rows, problem = rows_of(weight_RC, stats, self.identity), scaled_of(stats, self.damping)
        scaled_RC = weight_RC * problem.scale_C * rows.scale_R1

        def project(value_RC: Tensor) -> Mask:
            return pattern.project(value_RC.square(), drop)

        wide = too_wide(weight_RC, self.wide)
        if wide:
            inverse_CC = ridge_inverse_of(stats, self.damping, self.wide_rho)
            start_RC, keep_RC = settle(scaled_RC, problem.matrix_CC, inverse_CC, project, self.wide_rho, self.wide_iterations)
        else:
            eigen = eigen_of(stats, self.damping)
            product_RC = rows.times(scaled_RC @ problem.matrix_CC)
            start_RC, keep_RC = alternate(product_RC, scaled_RC, project, ridge_of(rows.basis(), eigen), drop, self.iterations)
        refit_RC = coupled_refit(rows, scaled_RC, problem.matrix_CC, keep_RC, start_RC, self.refit_steps) / rows.scale_R1
        error_RC = refit_RC - weight_RC * problem.scale_C
        lost = float(((error_RC @ problem.matrix_CC) * error_RC).sum())
        notes = (f"more than {self.wide} inputs on a CPU: ADMM with a fixed rho, its rows coupled in the refit alone",) if wide else ()
        return Pruned((refit_RC / problem.scale_C).masked_fill_(~keep_RC, 0), keep_RC, max(lost, 0.0), notes)


def ridge_of(basis: Basis, eigen: Eigen) -> Callable[[float], Callable[[Tensor], Tensor]]:
    """Of a rho, what solves B X A + rho X = value for X: elementwise in the two eigenbases."""

    def ridge(rho: float) -> Callable[[Tensor], Tensor]:
        both_RC = basis.values_R1 * eigen.values_C + rho
        return lambda value_RC: basis.turned_back(basis.turned(value_RC @ eigen.vectors_CC).div_(both_RC)) @ eigen.vectors_CC.T

    return ridge
