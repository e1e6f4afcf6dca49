"""Whole units of a structured pattern: the greedy choice of those whose removal costs least, then the least-squares values of the kept columns,
min tr (G (V - W) H (V - W)^T) over V that is zero in the dropped columns. Both are exact, under the same damping. G couples the rows by the
gradients of the dense model's loss at the outputs (llmprune.maths.coupled_rows), and counts in the choice alone: the values are the same for any G.

Kurtic et al., ZipLM, https://arxiv.org/abs/2302.04089, for the choice; see maths/greedy_obs.py and maths/least_squares.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.maths.coupled_rows import LEAST, Identity, felt, root_of
from llmprune.maths.greedy_obs import greedy_obs
from llmprune.maths.least_squares import refit_kept
from llmprune.maths.linalg import Damping
from llmprune.maths.unit_columns import Units
from llmprune.types import Pattern, Pruned, Stat, Stats


@dataclass(frozen=True)
class BlockOBS:
    damping: Damping = 0.01
    identity: Identity = LEAST
    needs: ClassVar[frozenset[Stat]] = frozenset({"gram", "grad_out_gram"})
    own_score: ClassVar[bool] = True
    work: ClassVar[tuple[int, int]] = (56, 16)
    units_only: ClassVar[bool] = True

    def solve(self, weight_RC: Tensor, score_RC: Tensor | None, stats: Stats, pattern: Pattern, drop: int) -> Pruned:
        assert isinstance(pattern, Units), "the recipe gives this solver a structured pattern"
        assert stats.gram_CC is not None
        if drop == 0:
            return Pruned(weight_RC, torch.ones_like(weight_RC, dtype=torch.bool), 0.0)
        remove = pattern.count(len(weight_RC), drop)
        columns_UK = pattern.columns_UK.to(weight_RC.device)
        root_BQQ = root_of(stats, self.identity)
        turned_RC = weight_RC if root_BQQ is None else felt(weight_RC.T, root_BQQ).T
        chosen = greedy_obs(turned_RC, stats.gram_CC, columns_UK, remove, pattern.groups, self.damping)
        keep_RC = pattern.mask(chosen.keep_U, weight_RC)
        found = refit_kept(weight_RC, stats.gram_CC, keep_RC[0], self.damping)
        return Pruned(found.weight_RC, keep_RC, found.lost, tuple(dict.fromkeys(chosen.notes + found.notes)))
