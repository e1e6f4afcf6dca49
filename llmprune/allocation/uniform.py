"""The same ratio for every matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.types import Stat, Stats


@dataclass(frozen=True)
class Uniform:
    needs: frozenset[Stat] = frozenset()
    looks_at: str = "nothing"
    scored: bool = False

    def measure(self, weight_RC: Tensor, stats: Stats, score_RC: Tensor | None) -> Tensor:
        return weight_RC.new_zeros(0)

    def share(
        self, measured: dict[str, Tensor], sizes: dict[str, int], blocks: dict[str, str], sparsity: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        return dict.fromkeys(sizes, sparsity), {}
