"""The mask that is best in the diagonal of the Kronecker-factored curvature, largest w^2 G_rr H_cc, then values for the kept weights in all of it:
min over V inside the mask of tr (G (V - W) H (V - W)^T), by conjugate gradients. No eigenbasis, no iterations of the mask: the quick relative of
``kfac``.

G couples the rows by the gradients of the dense model's loss at the outputs (llmprune.maths.coupled_rows). Martens and Grosse,
https://arxiv.org/abs/1503.05671; the mask is OBD's (LeCun et al., Optimal Brain Damage) in that curvature. Rows are not coupled where no gradient
reached a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmprune.maths.coupled_rows import LEAST, Identity, coupled_refit, rows_of
from llmprune.maths.linalg import Damping, scaled_of
from llmprune.types import Pattern, Pruned, Stat, Stats


@dataclass(frozen=True)
class CoupledRefit:
    damping: Damping = 0.01
    identity: Identity = LEAST
    steps: Annotated[int, Field(ge=0, description="of conjugate gradients")] = 20
    needs: ClassVar[frozenset[Stat]] = frozenset({"gram", "grad_out_gram"})
    own_score: ClassVar[bool] = True
    work: ClassVar[tuple[int, int]] = (32, 48)

    def solve(self, weight_RC: Tensor, score_RC: Tensor | None, stats: Stats, pattern: Pattern, drop: int) -> Pruned:
        if drop == 0:
            return Pruned(weight_RC, torch.ones_like(weight_RC, dtype=torch.bool), 0.0)
        rows, problem = rows_of(weight_RC, stats, self.identity), scaled_of(stats, self.damping)
        scaled_RC = weight_RC * problem.scale_C * rows.scale_R1
        keep_RC = pattern.project(scaled_RC.square(), drop)
        refit_RC = coupled_refit(rows, scaled_RC, problem.matrix_CC, keep_RC, scaled_RC, self.steps) / rows.scale_R1
        error_RC = refit_RC - weight_RC * problem.scale_C
        lost = float(((error_RC @ problem.matrix_CC) * error_RC).sum())
        return Pruned((refit_RC / problem.scale_C).masked_fill_(~keep_RC, 0), keep_RC, max(lost, 0.0))
