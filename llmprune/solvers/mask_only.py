"""Zero the weights that the pattern drops by the criterion's score; the others keep their values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.types import Pattern, Pruned, Stat, Stats


@dataclass(frozen=True)
class MaskOnly:
    needs: ClassVar[frozenset[Stat]] = frozenset()
    own_score: ClassVar[bool] = False
    work: ClassVar[tuple[int, int]] = (0, 16)
    repairs: ClassVar[bool] = False

    def solve(self, weight_RC: Tensor, score_RC: Tensor | None, stats: Stats, pattern: Pattern, drop: int) -> Pruned:
        assert score_RC is not None, "the recipe gives this solver a criterion"
        keep_RC = pattern.project(score_RC, drop)
        return Pruned(weight_RC.masked_fill(~keep_RC, 0), keep_RC)
