"""Uniform ratios and some others are tried: the model is pruned by each, and the one with the least divergence from the dense model on
calibration windows that the pruning has not seen is taken. So it is never worse than uniform there, and the figures of all are reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Auto:
    starts: tuple[str, ...] = ("uniform", "fisher", "owl")
    tried: ClassVar[bool] = True
    evolves: ClassVar[bool] = False

    def improve(self, room: dict[str, tuple[int, int]], fitness: Callable[[list[dict[str, int]], int], list[float]]) -> None:
        """The best start is used as it is."""
