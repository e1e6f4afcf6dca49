"""score = |w_rc| * |g_c|, g the scale of the RMSNorm or LayerNorm whose output enters the matrix: the norm's output has a root mean square of
about |g_c| in channel c, so this is Wanda's score without data. A matrix that no norm feeds is ranked by magnitude, which is noted.

Scales as scores: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, https://arxiv.org/abs/1708.06519
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.types import Stat, Stats


@dataclass(frozen=True)
class NormScale:
    needs: ClassVar[frozenset[Stat]] = frozenset({"norm_scale"})

    def score(self, weight_RC: Tensor, stats: Stats) -> Tensor:
        return weight_RC.abs() if stats.norm_scale_C is None else weight_RC.abs() * stats.norm_scale_C.abs()
