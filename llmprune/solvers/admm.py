"""min over allowed V of tr (V - W) H (V - W)^T by ADMM, finished by conjugate gradients on the kept weights.

Columns are scaled to a unit diagonal of H. A ridge solve, X = (W H - Y + rho D)(H + rho I)^-1, alternates with the projection of X + Y / rho onto
the pattern; rho grows as the support settles (Meng et al., ALPS, algorithm 1, https://arxiv.org/abs/2406.07831). rho is fixed where an eigenbasis,
which gives the ridge solve for any rho, would take too long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmprune.maths.linalg import Damping, eigen_of, masked_refit, ridge_inverse_of, scaled_of
from llmprune.solvers._alternation import Wide, WideIterations, WideRho, alternate, settle, too_wide
from llmprune.types import Mask, Pattern, Pruned, Stat, Stats


@dataclass(frozen=True)
class ADMM:
    damping: Damping = 0.01
    iterations: Annotated[int, Field(ge=1, description="at most, of ADMM")] = 100
    refit_steps: Annotated[int, Field(ge=0, description="of conjugate gradients on the weights that stay")] = 10
    wide: Wide = 4096
    wide_rho: WideRho = 1.0
    wide_iterations: WideIterations = 30
    needs: ClassVar[frozenset[Stat]] = frozenset({"gram"})
    own_score: ClassVar[bool] = True
    work: ClassVar[tuple[int, int]] = (40, 44)

    def solve(self, weight_RC: Tensor, score_RC: Tensor | None, stats: Stats, pattern: Pattern, drop: int) -> Pruned:
        if drop == 0:
            return Pruned(weight_RC, torch.ones_like(weight_RC, dtype=torch.bool), 0.0)
        problem = scaled_of(stats, self.damping)
        scaled_RC = weight_RC * problem.scale_C

        def project(value_RC: Tensor) -> Mask:
            return pattern.project(value_RC.square(), drop)

        wide = too_wide(weight_RC, self.wide)
        if wide:
            inverse_CC = ridge_inverse_of(stats, self.damping, self.wide_rho)
            start_RC, keep_RC = settle(scaled_RC, problem.matrix_CC, inverse_CC, project, self.wide_rho, self.wide_iterations)
        else:
            eigen = eigen_of(stats, self.damping)

            def ridge(rho: float) -> Callable[[Tensor], Tensor]:
                inverse_CC = eigen.inverse(rho)
                return lambda value_RC: value_RC @ inverse_CC

            start_RC, keep_RC = alternate(scaled_RC @ problem.matrix_CC, scaled_RC, project, ridge, drop, self.iterations)
        refit_RC = masked_refit(scaled_RC, problem.matrix_CC, keep_RC, start_RC, self.refit_steps)
        error_RC = refit_RC - scaled_RC
        lost = float(((error_RC @ problem.matrix_CC) * error_RC).sum())
        notes = (f"more than {self.wide} inputs on a CPU: ADMM with a fixed rho",) if wide else ()
        return Pruned((refit_RC / problem.scale_C).masked_fill_(~keep_RC, 0), keep_RC, max(lost, 0.0), notes)
