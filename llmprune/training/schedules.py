"""When masks change while a model is trained, and by how much: numbers of optimizer steps in, shares out.

Zhu and Gupta, To prune, or not to prune, https://arxiv.org/abs/1710.01878; Evci et al., Rigging the Lottery, https://arxiv.org/abs/1911.11134
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmprune.errors import RequestError


@dataclass(frozen=True)
class Schedule:
    """Masks change after the optimizer steps ``start``, ``start + every``, ... up to and with ``end``; step 0 is before the first one.

    Raises RequestError for one that has no steps.
    """

    start: int
    end: int
    every: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.end <= self.start:
            raise RequestError(f"start {self.start}, end {self.end}", "masks change from step start to a later step end; start is at least 0")
        if self.every < 1:
            raise RequestError(f"every {self.every}", "give the number of optimizer steps between two changes, at least 1")

    def due(self, step: int) -> bool:
        """Whether masks change after this step."""
        return self.start <= step <= self.end and ((step - self.start) % self.every == 0 or step == self.end)

    def progress(self, step: int) -> float:
        """Share of the schedule that lies behind, in [0, 1]."""
        return min(1.0, max(0.0, (step - self.start) / (self.end - self.start)))


def cubic(first: int, last: int, progress: float) -> int:
    """Weights that are masked: n_t = n_f + (n_i - n_f) (1 - t / T)^3, rounded; fast at first, where there is much that is redundant. Never fewer
    than at first.
    """
    return max(first, round(last + (first - last) * (1 - progress) ** 3))


def cosine(share: float, progress: float) -> float:
    """Share of the kept weights that are exchanged: share / 2 (1 + cos(pi t / T))."""
    return share / 2 * (1 + math.cos(math.pi * progress))
