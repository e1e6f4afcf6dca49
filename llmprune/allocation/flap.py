"""One threshold for the standardised fluctuation of the units of the whole model: of each matrix, the scores ||W_:c||^2 var(x_c), summed over the
columns c of a unit (a channel, a head; without units, a single column), are brought to mean 0 and deviation 1, and compared with
all others.

An et al., Fluctuation-based Adaptive Structured Pruning, https://arxiv.org/abs/2312.11983
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.maths.budget import spend
from llmprune.maths.counts import under_one_threshold
from llmprune.maths.scores import flap
from llmprune.types import Seen, Stat


@dataclass(frozen=True)
class Flap:
    needs: ClassVar[frozenset[Stat]] = frozenset({"input_sq", "input_sum"})
    looks_at: ClassVar[str] = "inputs"
    scored: ClassVar[bool] = False

    def measure(self, seen: Seen) -> Tensor:
        """[U] scores of the units."""
        if seen.stats.tokens == 0:
            return seen.weight_RC.new_zeros(0)
        units_UK = torch.arange(seen.weight_RC.shape[1]).unsqueeze(1) if seen.units_UK is None else seen.units_UK
        return flap(seen.weight_RC, seen.stats, units_UK).cpu()

    def share(
        self, measured: dict[str, Tensor], sizes: dict[str, int], blocks: dict[str, str], sparsity: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        scores = {name: value for name, value in measured.items() if len(value)}
        each = {name: sizes[name] // len(value) for name, value in scores.items()}
        goal = round(sparsity * sum(each[name] * len(value) for name, value in scores.items()))
        kept = under_one_threshold(scores, each, {}, goal) if scores else {}
        under = {name: 1 - kept[name] / len(value) for name, value in scores.items()}
        return spend({name: under.get(name, sparsity) for name in sizes}, sizes, sparsity), under
