"""Column sweep: drop by the OBS saliency w^2 / U_cc^2 and push each dropped weight's error onto the columns after it,
w_j -= (w_c / U_cc) * U_cj with U^T U = (X^T X + damping)^-1.

Frantar and Alistarh, SparseGPT, algorithm 1, https://arxiv.org/abs/2301.00774. Unstructured masks are chosen slab by slab (128 columns),
blocks too, N:M masks group by group, each after the errors of all columns before it.

Shapes: R = output rows, B = columns of one slab, S = columns of one strip inside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmprune.maths.linalg import Damping, factor_of
from llmprune.types import Pattern, Pruned, Stat, Stats

STRIP = 32  # columns between two matrix products inside a slab: keeps the column-by-column part in cache


@dataclass(frozen=True)
class SparseGPT:
    damping: Damping = 0.01
    slab: Annotated[int, Field(ge=1, description="columns whose mask is chosen together")] = 128
    needs: ClassVar[frozenset[Stat]] = frozenset({"gram"})
    own_score: ClassVar[bool] = True
    work: ClassVar[tuple[int, int]] = (40, 16)
    by_slab: ClassVar[bool] = True

    def solve(self, weight_RC: Tensor, score_RC: Tensor | None, stats: Stats, pattern: Pattern, drop: int) -> Pruned:
        factor = factor_of(stats, self.damping)
        columns = weight_RC.shape[1]
        weight_RC = weight_RC.clone()
        keep_RC = torch.empty_like(weight_RC, dtype=torch.bool)
        slab = _multiple(self.slab, pattern.unit)
        piece = 1 if pattern.local else pattern.tall * pattern.unit  # weights that are dropped together
        lost = weight_RC.new_zeros(())
        for a in range(0, columns, slab):
            b = min(a + slab, columns)
            quota = piece * (drop // piece * b // columns - drop // piece * a // columns)
            upper_BB = factor.upper_CC[a:b, a:b]
            slab_BR = weight_RC[:, a:b].T.contiguous()
            keep_BR, error_BR = _sweep(slab_BR, upper_BB, pattern, quota)
            weight_RC[:, a:b] = slab_BR.masked_fill_(~keep_BR, 0).T
            keep_RC[:, a:b] = keep_BR.T
            weight_RC[:, b:].addmm_(error_BR.T, factor.upper_CC[a:b, b:], alpha=-1)
            lost += error_BR.square().sum()
        return Pruned(weight_RC, keep_RC, float(lost))


def _multiple(width: int, unit: int) -> int:
    return max(unit, width - width % unit)


def _sweep(slab_BR: Tensor, upper_BB: Tensor, pattern: Pattern, quota: int) -> tuple[Tensor, Tensor]:
    """Sweep one slab in place, column by column; (keep_BR, error_BR) with error = dropped weight / U_cc."""
    width = slab_BR.shape[0]
    decide = pattern.unit if pattern.local else width
    strip = _multiple(STRIP, pattern.unit)
    keep_BR = torch.empty_like(slab_BR, dtype=torch.bool)
    error_BR = torch.empty_like(slab_BR)
    gain_BR = torch.empty_like(slab_BR)  # 1 / U_cc where dropped, else 0
    inverse_B1 = upper_BB.diagonal().reciprocal().unsqueeze(1)
    for s in range(0, width, strip):
        e = min(s + strip, width)
        for c in range(s, e):
            if c % decide == 0:
                group = slice(c, c + decide)
                saliency_BR = (slab_BR[group] * inverse_B1[group]).square_()
                keep_BR[group] = pattern.project(saliency_BR.T, quota * decide // width).T
                gain_BR[group] = inverse_B1[group] * ~keep_BR[group]
            torch.mul(slab_BR[c], gain_BR[c], out=error_BR[c])
            if c + 1 < e:
                slab_BR[c + 1 : e].addr_(upper_BB[c, c + 1 : e], error_BR[c], alpha=-1)
        slab_BR[e:].addmm_(upper_BB[s:e, e:].T, error_BR[s:e], alpha=-1)
    return keep_BR, error_BR
