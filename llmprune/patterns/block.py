"""Blocks of R x C neighbouring weights are dropped together ("block:4x4"), those whose scores have the smallest sums in their matrix.

Gray, Radford and Kingma, GPU Kernels for Block-Sparse Weights, https://openai.com/index/block-sparse-gpu-kernels/
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from llmprune.errors import RequestError
from llmprune.maths.linalg import drop_smallest
from llmprune.types import Mask


@dataclass(frozen=True)
class Block:
    spellings: ClassVar[dict[str, str]] = {"block:RxC": "block:4x4"}
    height: int = 4
    width: int = 4
    local: ClassVar[bool] = False
    levels: ClassVar[tuple[float, ...]] = ()

    @classmethod
    def parse(cls, text: str) -> dict[str, Any]:
        height, width = map(int, text.removeprefix("block:").split("x"))
        if height * width < 2:
            raise RequestError(f"pattern {text!r} has no block of more than one weight", "write block:RxC, such as block:4x4 (4 rows by 4 columns)")
        return {"height": height, "width": width}

    @property
    def unit(self) -> int:
        return self.width

    @property
    def tall(self) -> int:
        return self.height

    def at(self, ratio: float) -> Block:
        return self

    def dropped(self, rows: int, columns: int, sparsity: float) -> int:
        size = self.height * self.width
        return round(sparsity * rows * columns / size) * size

    def project(self, score_RC: Tensor, drop: int) -> Mask:
        rows, columns = score_RC.shape
        sums = score_RC.reshape(rows // self.height, self.height, columns // self.width, self.width).sum((1, 3))
        keep = drop_smallest(sums.reshape(-1), drop // (self.height * self.width)).view(sums.shape)
        return keep.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1)
