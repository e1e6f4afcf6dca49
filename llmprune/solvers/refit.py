"""Any criterion's mask, then the least-squares values of the kept weights: min tr (V - W) H (V - W)^T over V inside the mask,
by conjugate gradients on all rows at once (Jacobi-preconditioned by the scaling to a unit diagonal of H).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmprune.maths.linalg import Damping, masked_refit, scaled_of
from llmprune.types import Pattern, Pruned, Stat, Stats


@dataclass(frozen=True)
class Refit:
    damping: Damping = 0.01
    steps: Annotated[int, Field(ge=0, description="of conjugate gradients")] = 20
    needs: ClassVar[frozenset[Stat]] = frozenset({"gram"})
    own_score: ClassVar[bool] = False
    work: ClassVar[tuple[int, int]] = (32, 36)

    def solve(self, weight_RC: Tensor, score_RC: Tensor | None, stats: Stats, pattern: Pattern, drop: int) -> Pruned:
        assert score_RC is not None, "the recipe gives this solver a criterion"
        if drop == 0:
            return Pruned(weight_RC, torch.ones_like(weight_RC, dtype=torch.bool), 0.0)
        keep_RC = pattern.project(score_RC, drop)
        problem = scaled_of(stats, self.damping)
        scaled_RC = weight_RC * problem.scale_C
        refit_RC = masked_refit(scaled_RC, problem.matrix_CC, keep_RC, scaled_RC, self.steps)
        error_RC = refit_RC - scaled_RC
        lost = float(((error_RC @ problem.matrix_CC) * error_RC).sum())
        return Pruned((refit_RC / problem.scale_C).masked_fill_(~keep_RC, 0), keep_RC, max(lost, 0.0))
