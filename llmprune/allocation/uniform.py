"""The same ratio for every matrix."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Uniform:
    def share(self, sizes: dict[str, int], sparsity: float) -> dict[str, float]:
        return dict.fromkeys(sizes, sparsity)
