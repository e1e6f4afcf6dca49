"""score = |w * g|, g = dL/dW of the first window alone: the connection sensitivity, from one batch.

Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, without its normalisation, which does not change the order,
https://arxiv.org/abs/1810.02340
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.types import Stat, Stats


@dataclass(frozen=True)
class SNIP:
    needs: ClassVar[frozenset[Stat]] = frozenset({"first_grad"})

    def score(self, weight_RC: Tensor, stats: Stats) -> Tensor:
        assert stats.first_grad_RC is not None
        return (weight_RC * stats.first_grad_RC).abs()
