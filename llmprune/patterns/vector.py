"""Whole rows or whole columns of a matrix are dropped, those whose scores have the smallest sums. They are zeroed, the matrix keeps its shape.

Mao et al., Exploring the Granularity of Sparsity in Convolutional Neural Networks, https://arxiv.org/abs/1705.08922
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from llmprune.maths.linalg import drop_smallest
from llmprune.types import Mask


@dataclass(frozen=True)
class Vector:
    spellings: ClassVar[dict[str, str]] = {"row": "row", "column": "column"}
    lines: Literal["row", "column"] = "row"
    in_slabs: ClassVar[bool] = False
    unit: ClassVar[int] = 1
    tall: ClassVar[int] = 1
    local: ClassVar[bool] = False
    levels: ClassVar[tuple[float, ...]] = ()

    @classmethod
    def parse(cls, text: str) -> dict[str, Any]:
        return {"lines": text}

    def at(self, ratio: float) -> Vector:
        return self

    def dropped(self, rows: int, columns: int, sparsity: float) -> int:
        lines, length = (rows, columns) if self.lines == "row" else (columns, rows)
        return round(sparsity * lines) * length

    def project(self, score_RC: Tensor, drop: int) -> Mask:
        along = 1 if self.lines == "row" else 0
        keep = drop_smallest(score_RC.sum(along, dtype=torch.float64), drop // score_RC.shape[along])
        return keep.unsqueeze(along).expand(score_RC.shape).clone()
