"""Matrices whose inputs are spread over more directions lose less: the entropy of the activations' spectrum, -sum p_i ln p_i / ln C with p_i
the eigenvalues of the Gram matrix over their sum (its exponential is the effective rank), scaled to 0 ... 1 over the matrices and mapped linearly
to asked + width ... asked - width.

Roy and Vetterli, The effective rank, https://ieeexplore.ieee.org/document/7098875; redundancy by entropy as in E-Sparse,
https://arxiv.org/abs/2310.15929
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmprune.maths.budget import spend
from llmprune.maths.linalg import spectrum_of
from llmprune.types import Seen, Stat


@dataclass(frozen=True)
class Entropy:
    width: Annotated[float, Field(ge=0, description="the most that a ratio differs from the sparsity")] = 0.08
    needs: ClassVar[frozenset[Stat]] = frozenset({"gram"})
    looks_at: ClassVar[str] = "inputs"
    scored: ClassVar[bool] = False

    def measure(self, seen: Seen) -> Tensor:
        gram_CC = seen.stats.gram_CC
        if gram_CC is None or len(gram_CC) < 2 or float(gram_CC.diagonal().sum()) <= 0:
            return seen.weight_RC.new_zeros(0)
        values_C = spectrum_of(seen.stats)
        return torch.special.entr(values_C / values_C.sum()).sum().view(1) / math.log(len(values_C))

    def share(
        self, measured: dict[str, Tensor], sizes: dict[str, int], blocks: dict[str, str], sparsity: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        entropy = {name: float(value) for name, value in measured.items() if len(value)}
        low, high = min(entropy.values(), default=0.0), max(entropy.values(), default=0.0)
        scaled = {name: (e - low) / (high - low) if high > low else 0.5 for name, e in entropy.items()}
        wanted = {name: sparsity - self.width * (2 * scaled.get(name, 0.5) - 1) for name in sizes}
        return spend(wanted, sizes, sparsity), entropy
