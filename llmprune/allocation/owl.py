"""Blocks with more outliers lose less: ratio = asked - width * (2 d - 1), d the share of a block's |w| * ||x|| above ``times`` their mean,
scaled to 0 ... 1 over the blocks.

Yin et al., Outlier Weighed Layerwise Sparsity, https://arxiv.org/abs/2310.05175
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmprune.maths.budget import log_histogram, share_above, spend
from llmprune.types import Seen, Stat


@dataclass(frozen=True)
class OWL:
    width: Annotated[float, Field(ge=0, description="the most that a ratio differs from the sparsity")] = 0.08
    times: Annotated[float, Field(gt=0, description="an outlier is above so many times the mean score")] = 5.0
    needs: ClassVar[frozenset[Stat]] = frozenset({"input_sq"})
    looks_at: ClassVar[str] = "inputs"
    scored: ClassVar[bool] = False

    def measure(self, seen: Seen) -> Tensor:
        """Their sum, then their histogram."""
        if seen.stats.input_sq_C is None:
            return seen.weight_RC.new_zeros(0)
        score_RC = seen.weight_RC.abs() * seen.stats.input_sq_C.sqrt()
        return torch.cat([score_RC.sum(dtype=torch.float64).view(1).cpu(), log_histogram(score_RC.log2())])

    def share(
        self, measured: dict[str, Tensor], sizes: dict[str, int], blocks: dict[str, str], sparsity: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        together: dict[str, Tensor] = {}
        for name, value in measured.items():
            if len(value):
                together[blocks[name]] = together.get(blocks[name], 0) + value
        outliers = {block: share_above(v[1:], self.times * float(v[0]) / float(v[1:].sum())) for block, v in together.items()}
        low, high = min(outliers.values(), default=0.0), max(outliers.values(), default=0.0)
        scaled = {block: (d - low) / (high - low) if high > low else 0.5 for block, d in outliers.items()}
        wanted = {name: sparsity - self.width * (2 * scaled.get(blocks[name], 0.5) - 1) for name in sizes}
        return spend(wanted, sizes, sparsity), {name: outliers[blocks[name]] for name in sizes if blocks[name] in outliers}
