"""Whole units as a pattern: the input columns of the matrix that reads them are dropped, and then everything that writes them.

Shapes: R, C = rows and columns of a reader, U = its units, K = columns of a unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.maths.linalg import drop_smallest
from llmprune.types import Mask


@dataclass(frozen=True, eq=False)
class Units:
    """Units of one matrix's input are dropped as a whole, those whose scores have the smallest sums, equally many of each run of ``groups``."""

    columns_UK: Tensor
    groups: int = 1
    least: int = 1  # units that are kept in any case
    unit: int = 1
    tall: int = 1
    local: bool = False
    levels: tuple[float, ...] = ()

    def at(self, ratio: float) -> Units:
        return self

    def dropped(self, rows: int, columns: int, sparsity: float) -> int:
        units, width = self.columns_UK.shape
        count = min(round(sparsity * units / self.groups) * self.groups, units - self.least)
        return rows * width * count

    def count(self, rows: int, drop: int) -> int:
        """The number of units that ``drop`` weights make."""
        return drop // (rows * self.columns_UK.shape[1])

    def project(self, score_RC: Tensor, drop: int) -> Mask:
        score_U = score_RC.sum(0, dtype=torch.float64)[self.columns_UK].sum(1)
        each = self.count(score_RC.shape[0], drop) // self.groups
        return self.mask(drop_smallest(score_U.view(self.groups, -1), each).flatten(), score_RC)

    def mask(self, keep_U: Tensor, like_RC: Tensor) -> Mask:
        """The keep-mask of a matrix that keeps these units."""
        keep_C = torch.ones(like_RC.shape[1], dtype=torch.bool, device=like_RC.device)
        keep_C[self.columns_UK.to(keep_C.device)[~keep_U].flatten()] = False
        return keep_C.expand(like_RC.shape).clone()

    def kept(self, keep_RC: Mask) -> tuple[int, ...]:
        """Numbers of the kept units."""
        return tuple(keep_RC[0, self.columns_UK[:, 0]].nonzero().flatten().tolist())
