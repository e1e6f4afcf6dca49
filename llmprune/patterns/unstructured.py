"""Any weight may go; weights compete inside their output row or inside the whole matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmprune.linalg import drop_smallest
from llmprune.types import Mask


@dataclass(frozen=True)
class Unstructured:
    group: Literal["row", "matrix"] = "matrix"
    unit: int = 1

    def dropped(self, rows: int, columns: int, sparsity: float) -> int:
        return round(sparsity * rows * columns)

    def project(self, score_RC: Tensor, drop: int) -> Mask:
        if self.group == "matrix":
            return drop_smallest(score_RC.reshape(-1), drop).view(score_RC.shape)
        each, extra = divmod(drop, score_RC.shape[0])
        keep_RC = drop_smallest(score_RC, each)
        if extra:  # the remainder goes to the rows whose next weight matters least, one weight each
            next_R, column_R = score_RC.masked_fill(~keep_RC, torch.inf).min(dim=1)
            rows = (~drop_smallest(next_R, extra)).nonzero().squeeze(1)
            keep_RC[rows, column_R[rows]] = False
        return keep_RC
