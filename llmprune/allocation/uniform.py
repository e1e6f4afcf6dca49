"""The same ratio for every matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.types import Seen, Stat


@dataclass(frozen=True)
class Uniform:
    needs: ClassVar[frozenset[Stat]] = frozenset()
    looks_at: ClassVar[str] = "nothing"
    scored: ClassVar[bool] = False

    def measure(self, seen: Seen) -> Tensor:
        return seen.weight_RC.new_zeros(0)

    def share(
        self, measured: dict[str, Tensor], sizes: dict[str, int], blocks: dict[str, str], sparsity: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        return dict.fromkeys(sizes, sparsity), {}
