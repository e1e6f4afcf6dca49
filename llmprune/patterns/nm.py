"""N of every M consecutive weights along the input dimension are kept ("2:4" = 2 non-zeros in every 4).

Mishra et al., Accelerating Sparse Deep Neural Networks, https://arxiv.org/abs/2104.08378
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from llmprune.errors import RequestError
from llmprune.maths.linalg import drop_smallest
from llmprune.types import Mask


@dataclass(frozen=True)
class NM:
    spellings: ClassVar[dict[str, str]] = {"N:M": "2:4"}
    fixes_ratio: ClassVar[bool] = True
    n_of_m: ClassVar[bool] = True
    n: int = 2
    m: int = 4
    tall: ClassVar[int] = 1
    local: ClassVar[bool] = True

    @classmethod
    def parse(cls, text: str) -> dict[str, Any]:
        n, m = map(int, text.split(":"))
        if not 0 < n < m:
            raise RequestError(f"pattern {text!r} would keep {n} of every {m} weights", "N:M needs 0 < N < M, such as 2:4")
        return {"n": n, "m": m}

    @property
    def unit(self) -> int:
        return self.m

    @property
    def levels(self) -> tuple[float, ...]:
        """The ratios of matrices when patterns are mixed: every K:M from dense to N:M."""
        return tuple((self.m - kept) / self.m for kept in range(self.m, self.n - 1, -1))

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def at(self, ratio: float) -> NM:
        return replace(self, n=self.m - round(ratio * self.m))

    def dropped(self, rows: int, columns: int, sparsity: float) -> int:
        return rows * columns // self.m * (self.m - self.n)

    def project(self, score_RC: Tensor, drop: int) -> Mask:
        groups = score_RC.reshape(-1, self.m)
        return drop_smallest(groups, self.m - self.n).view(score_RC.shape)
