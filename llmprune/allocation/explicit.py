"""Ratios by name: the first regular expression that matches a matrix's name gives its ratio; all other matrices share the rest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.errors import RequestError
from llmprune.types import Seen, Stat

MOST = 0.99  # of a matrix that is not named


@dataclass(frozen=True)
class Explicit:
    ratios: tuple[tuple[str, float], ...] = ()
    needs: ClassVar[frozenset[Stat]] = frozenset()
    looks_at: ClassVar[str] = "nothing"
    scored: ClassVar[bool] = False

    def measure(self, seen: Seen) -> Tensor:
        return seen.weight_RC.new_zeros(0)

    def share(
        self, measured: dict[str, Tensor], sizes: dict[str, int], blocks: dict[str, str], sparsity: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Raises RequestError when an expression matches nothing, or the other matrices cannot meet the budget."""
        named: dict[str, float] = {}
        for pattern, ratio in self.ratios:
            found = [name for name in sizes if re.search(pattern, name)]
            if not found:
                raise RequestError(f"ratios: {pattern!r} matches no matrix's name", "llmprune inspect lists the names")
            named = dict.fromkeys(found, ratio) | named
        rest = {name: size for name, size in sizes.items() if name not in named}
        left = sparsity * sum(sizes.values()) - sum(ratio * sizes[name] for name, ratio in named.items())
        other = left / sum(rest.values()) if rest else 0.0
        if not (0 <= other <= max(MOST, sparsity) if rest else abs(left) < 1):
            raise RequestError(
                f"ratios: the other {len(rest)} matrices would have to lose {other:.1%} for {sparsity:g} in all", "change --sparsity or the ratios"
            )
        return {name: named.get(name, other) for name in sizes}, named
