"""Blocks whose weights have heavier-tailed spectra are trained better and lose less: the Hill estimate of the exponent of W^T W's eigenvalues,
alpha = 1 + k / sum_{i <= k} ln(l_i / l_{k+1}) over the largest half, averaged over a block, mapped linearly to asked * (1 - spread ... 1 + spread).

Lu et al., AlphaPruning, https://arxiv.org/abs/2410.10912
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmprune.maths.budget import spend
from llmprune.types import Seen, Stat


@dataclass(frozen=True)
class HeavyTail:
    spread: Annotated[float, Field(ge=0, le=1, description="the most that a ratio differs, as a share of the sparsity")] = 0.3
    needs: ClassVar[frozenset[Stat]] = frozenset()
    looks_at: ClassVar[str] = "weights"
    scored: ClassVar[bool] = False

    def measure(self, seen: Seen) -> Tensor:
        values = torch.linalg.svdvals(seen.weight_RC.double()).square()  # descending
        k = max(1, len(values) // 2)
        if len(values) < 2 or float(values[k]) <= 0:
            return seen.weight_RC.new_zeros(0)
        tail = (values[:k] / values[k]).log().sum()
        return (1 + k / tail.clamp_min(1e-12)).view(1)

    def share(
        self, measured: dict[str, Tensor], sizes: dict[str, int], blocks: dict[str, str], sparsity: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        alphas: dict[str, list[float]] = {}
        for name, value in measured.items():
            if len(value):
                alphas.setdefault(blocks[name], []).append(float(value))
        alpha = {block: mean(values) for block, values in alphas.items()}
        low, high = min(alpha.values(), default=0.0), max(alpha.values(), default=0.0)
        scaled = {block: (a - low) / (high - low) if high > low else 0.5 for block, a in alpha.items()}
        wanted = {name: sparsity * (1 + self.spread * (2 * scaled.get(blocks[name], 0.5) - 1)) for name in sizes}
        return spend(wanted, sizes, sparsity), {name: alpha[blocks[name]] for name in sizes if blocks[name] in alpha}
