"""score = uniform noise from a seed: the baseline of every other criterion. It depends on the shape alone, so equal shapes get equal noise.

The baseline of, among others, Blalock et al., What is the State of Neural Network Pruning?, https://arxiv.org/abs/2003.03033
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.types import Stat, Stats


@dataclass(frozen=True)
class Random:
    seed: int = 0
    needs: ClassVar[frozenset[Stat]] = frozenset()

    def score(self, weight_RC: Tensor, stats: Stats) -> Tensor:
        noise = torch.Generator().manual_seed(self.seed)  # on the CPU: the same on every device
        return torch.rand(weight_RC.shape, generator=noise, dtype=weight_RC.dtype).to(weight_RC.device)
