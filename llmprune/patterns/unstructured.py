"""Any weight may be dropped; weights compete in their output row or in the whole matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llmprune.maths.linalg import drop_smallest
from llmprune.types import Mask


@dataclass(frozen=True)
class Unstructured:
    spellings: ClassVar[dict[str, str]] = {"unstructured": "unstructured"}
    group: Literal["row", "matrix"] = "matrix"
    unit: ClassVar[int] = 1
    tall: ClassVar[int] = 1
    local: ClassVar[bool] = False
    levels: ClassVar[tuple[float, ...]] = ()

    def at(self, ratio: float) -> Unstructured:
        return self

    def dropped(self, rows: int, columns: int, sparsity: float) -> int:
        return round(sparsity * rows * columns)

    def project(self, score_RC: Tensor, drop: int) -> Mask:
        if self.group == "matrix":
            return drop_smallest(score_RC.reshape(-1), drop).view(score_RC.shape)
        each, extra = divmod(drop, score_RC.shape[0])
        keep_RC = drop_smallest(score_RC, each)
        if extra:  # the remainder is dropped from the rows whose next weight matters least, one weight each
            fewer_RC = drop_smallest(score_RC, each + 1)
            next_R = score_RC[keep_RC & ~fewer_RC]
            keep_RC = torch.where(drop_smallest(next_R, extra).unsqueeze(1), keep_RC, fewer_RC)
        return keep_RC
