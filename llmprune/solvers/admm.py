"""min over allowed V of tr (V - W) H (V - W)^T by ADMM, finished by conjugate gradients on the kept weights.

Columns are scaled to a unit diagonal of H. A ridge solve, X = (W H - Y + rho D)(H + rho I)^-1, alternates with the projection of X + Y / rho onto
the pattern; rho grows as the support settles (Meng et al., ALPS, algorithm 1, https://arxiv.org/abs/2406.07831). Row weights sqrt(lam_r), where they
are known (Fisher information of the row's output), only weigh rows against each other in the choice of the mask. rho is fixed where an eigenbasis,
which gives the ridge solve for any rho, would take too long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmprune.maths.linalg import Damping, Eigen, eigen_of, masked_refit, ridge_inverse_of, scaled_of
from llmprune.types import Mask, Pattern, Pruned, Stat, Stats

CHECK_EVERY = 3  # iterations between two checks of the support
LEAST_ITERATIONS = 30
# share of the support that changed -> growth of rho
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
SETTLED = 3e-4


@dataclass(frozen=True)
class ADMM:
    damping: Damping = 0.01
    iterations: Annotated[int, Field(ge=1, description="at most, of ADMM")] = 100
    refit_steps: Annotated[int, Field(ge=0, description="of conjugate gradients on the weights that stay")] = 10
    # an eigenbasis costs about 40 times as much as one Cholesky factor, which is enough for a fixed rho
    wide: Annotated[int, Field(ge=1, description="columns from which a CPU takes a fixed rho")] = 4096
    wide_rho: Annotated[float, Field(gt=0, description="the fixed rho of wide matrices")] = 1.0
    wide_iterations: Annotated[int, Field(ge=1, description="of wide matrices")] = 30
    needs: ClassVar[frozenset[Stat]] = frozenset({"gram"})
    own_score: ClassVar[bool] = True
    work: ClassVar[tuple[int, int]] = (40, 44)

    def solve(self, weight_RC: Tensor, score_RC: Tensor | None, stats: Stats, pattern: Pattern, drop: int) -> Pruned:
        if drop == 0:
            return Pruned(weight_RC, torch.ones_like(weight_RC, dtype=torch.bool), 0.0)
        problem = scaled_of(stats, self.damping)
        scaled_RC = weight_RC * problem.scale_C
        rows_R1 = torch.ones_like(weight_RC[:, :1]) if stats.row_weight_R is None else stats.row_weight_R.to(weight_RC).unsqueeze(1)
        too_wide = weight_RC.shape[1] > self.wide and weight_RC.device.type == "cpu"
        if too_wide:
            inverse_CC = ridge_inverse_of(stats, self.damping, self.wide_rho)
            start_RC, keep_RC = self._settle(scaled_RC, rows_R1, problem.matrix_CC, inverse_CC, pattern, drop)
        else:
            start_RC, keep_RC = self._alternate(scaled_RC, rows_R1, problem.matrix_CC, eigen_of(stats, self.damping), pattern, drop)
        refit_RC = masked_refit(scaled_RC, problem.matrix_CC, keep_RC, start_RC, self.refit_steps)
        error_RC = refit_RC - scaled_RC
        lost = float(((error_RC @ problem.matrix_CC) * error_RC).sum())
        notes = (f"more than {self.wide} inputs on a CPU: ADMM with a fixed rho",) if too_wide else ()
        return Pruned((refit_RC / problem.scale_C).masked_fill_(~keep_RC, 0), keep_RC, max(lost, 0.0), notes)

    def _settle(self, scaled_RC: Tensor, rows_R1: Tensor, matrix_CC: Tensor, inverse_CC: Tensor, pattern: Pattern, drop: int) -> tuple[Tensor, Mask]:
        """ADMM with a fixed rho."""
        product_RC, rho = scaled_RC @ matrix_CC, self.wide_rho
        keep_RC = pattern.project((scaled_RC * rows_R1).square_(), drop)
        primal_RC = scaled_RC.masked_fill(~keep_RC, 0)
        dual_RC = torch.zeros_like(scaled_RC)
        for _ in range(self.wide_iterations):
            ridge_RC = (product_RC - dual_RC + rho * primal_RC) @ inverse_CC
            free_RC = ridge_RC + dual_RC / rho
            keep_RC = pattern.project((free_RC * rows_R1).square_(), drop)
            primal_RC = free_RC.masked_fill(~keep_RC, 0)
            dual_RC = dual_RC + rho * (ridge_RC - primal_RC)
        return primal_RC, keep_RC

    def _alternate(self, scaled_RC: Tensor, rows_R1: Tensor, matrix_CC: Tensor, eigen: Eigen, pattern: Pattern, drop: int) -> tuple[Tensor, Mask]:
        def project(value_RC: Tensor) -> Mask:
            return pattern.project((value_RC * rows_R1).square_(), drop)

        product_RC = scaled_RC @ matrix_CC
        keep_RC = project(scaled_RC)
        kept = max(1, scaled_RC.numel() - drop)
        first_RC = primal_RC = scaled_RC.masked_fill(~keep_RC, 0)
        dual_RC = torch.zeros_like(scaled_RC)
        before_RC = keep_RC
        rho, moving = 0.1, False
        inverse_CC = eigen.inverse(rho)
        for iteration in range(1, self.iterations + 1):
            ridge_RC = (product_RC - dual_RC + rho * primal_RC) @ inverse_CC
            free_RC = ridge_RC + dual_RC / rho
            keep_RC = project(free_RC)
            primal_RC = free_RC.masked_fill(~keep_RC, 0)
            dual_RC = dual_RC + rho * (ridge_RC - primal_RC)
            if iteration % CHECK_EVERY:
                continue
            changed = int((keep_RC ^ before_RC).sum()) / kept
            before_RC = keep_RC
            if moving and changed == 0:
                break
            if changed > GROWTH[1][0] or (moving and changed > 0):
                rho *= next(growth for above, growth in GROWTH if changed > above)
                moving = True
            else:  # rho is too large for the support to change: start again with a smaller one
                rho /= 5
                if changed:
                    primal_RC, dual_RC = first_RC, torch.zeros_like(dual_RC)
            if iteration >= LEAST_ITERATIONS and changed < SETTLED:
                break
            inverse_CC = eigen.inverse(rho)
        return primal_RC, keep_RC
