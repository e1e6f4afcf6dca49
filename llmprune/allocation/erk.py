"""Densities by shape alone: a matrix of R x C keeps a share of its weights proportional to (R + C) / (R * C), at most all of them, so that small
matrices stay denser than large ones. Of a mixture, each expert's matrix counts by itself.

Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity (Erdős–Rényi), https://arxiv.org/abs/1707.04780;
Evci et al., Rigging the Lottery (with the kernels of convolutions, ERK), https://arxiv.org/abs/1911.11134
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.maths.budget import in_whole_weights
from llmprune.types import Seen, Stat


@dataclass(frozen=True)
class ERK:
    needs: ClassVar[frozenset[Stat]] = frozenset()
    looks_at: ClassVar[str] = "weights"
    scored: ClassVar[bool] = False

    def measure(self, seen: Seen) -> Tensor:
        return seen.weight_RC.new_tensor([by_shape(*seen.weight_RC.shape)])

    def share(
        self, measured: dict[str, Tensor], sizes: dict[str, int], blocks: dict[str, str], sparsity: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        return shared({name: float(measured[name]) for name in sizes}, sizes, sparsity)


def by_shape(rows: int, columns: int) -> float:
    """What the density of a matrix is proportional to."""
    return (rows + columns) / (rows * columns)


def shared(each: dict[str, float], sizes: dict[str, int], sparsity: float) -> tuple[dict[str, float], dict[str, float]]:
    """(ratios, densities) under the budget. each: ``by_shape`` of each matrix."""
    dense: set[str] = set()
    while True:  # matrices that would keep more than all are dense, and the others share what is left
        free = {name: size for name, size in sizes.items() if name not in dense}
        left = (1 - sparsity) * sum(sizes.values()) - sum(sizes[name] for name in dense)
        factor = left / sum(each[name] * size for name, size in free.items())
        full = {name for name in free if factor * each[name] >= 1}
        if not full or len(full) == len(free):
            break
        dense |= full
    kept = {name: 1.0 if name in dense else min(1.0, factor * each[name]) for name in sizes}
    return in_whole_weights({name: 1 - share for name, share in kept.items()}, sizes, sparsity), kept
