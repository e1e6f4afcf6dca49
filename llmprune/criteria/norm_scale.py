"""score = |gamma_c| * |w_rc|: magnitude times the scale that the norm before the matrix gives to the input; magnitude where no norm stands there.

Liu et al., Learning Efficient Convolutional Networks through Network Slimming, https://arxiv.org/abs/1708.06519, judge channels by the scale of
their norm; here it weighs single weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.types import Stat, Stats


@dataclass(frozen=True)
class NormScale:
    needs: frozenset[Stat] = frozenset({"norm_scale"})

    def score(self, weight_RC: Tensor, stats: Stats) -> Tensor:
        if stats.norm_scale_C is None:
            return weight_RC.abs()
        return weight_RC.abs() * stats.norm_scale_C.abs()
