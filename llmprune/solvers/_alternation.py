"""The alternation of ADMM for pruning: a ridge solve and a projection onto the pattern, with the schedule of rho of Meng et al., ALPS, algorithm 1
(https://arxiv.org/abs/2406.07831).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from llmprune.types import Mask

CHECK_EVERY = 3  # iterations between two checks of the support
LEAST_ITERATIONS = 30
# share of the support that changed -> growth of rho
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
SETTLED = 3e-4

Solve = Callable[[Tensor], Tensor]

# an eigenbasis costs about 40 times as much as one Cholesky factor, which is enough for a fixed rho
Wide: TypeAlias = Annotated[int, Field(ge=1, description="columns from which a CPU takes a fixed rho")]
WideRho: TypeAlias = Annotated[float, Field(gt=0, description="the fixed rho of wide matrices")]
WideIterations: TypeAlias = Annotated[int, Field(ge=1, description="of wide matrices")]


def too_wide(weight_RC: Tensor, wide: int) -> bool:
    """Whether an eigenbasis of its inputs would take too long."""
    return weight_RC.shape[1] > wide and weight_RC.device.type == "cpu"


def settle(
    scaled_RC: Tensor, matrix_CC: Tensor, inverse_CC: Tensor, project: Callable[[Tensor], Mask], rho: float, iterations: int
) -> tuple[Tensor, Mask]:
    """``alternate`` with a fixed rho. inverse: (matrix + rho I)^-1."""
    product_RC = scaled_RC @ matrix_CC
    keep_RC = project(scaled_RC)
    primal_RC = scaled_RC.masked_fill(~keep_RC, 0)
    dual_RC = torch.zeros_like(scaled_RC)
    for _ in range(iterations):
        ridge_RC = (product_RC - dual_RC + rho * primal_RC) @ inverse_CC
        free_RC = ridge_RC + dual_RC / rho
        keep_RC = project(free_RC)
        primal_RC = free_RC.masked_fill(~keep_RC, 0)
        dual_RC = dual_RC + rho * (ridge_RC - primal_RC)
    return primal_RC, keep_RC


def alternate(
    product_RC: Tensor, scaled_RC: Tensor, project: Callable[[Tensor], Mask], ridge: Callable[[float], Solve], drop: int, iterations: int
) -> tuple[Tensor, Mask]:
    """(the weights on the last support, the support). product: the operator applied to the scaled weights. ridge: of a rho, what solves
    (operator + rho) X = value for X.
    """
    keep_RC = project(scaled_RC)
    kept = max(1, scaled_RC.numel() - drop)
    first_RC = primal_RC = scaled_RC.masked_fill(~keep_RC, 0)
    dual_RC = torch.zeros_like(scaled_RC)
    before_RC = keep_RC
    rho, moving = 0.1, False
    solve = ridge(rho)
    for iteration in range(1, iterations + 1):
        ridge_RC = solve(product_RC - dual_RC + rho * primal_RC)
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
        solve = ridge(rho)
    return primal_RC, keep_RC
