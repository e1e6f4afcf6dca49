"""score = (|w_rc| / sum_c' |w_rc'| + |w_rc| / sum_r' |w_r'c|) * ||x_c||_2 ** power: the share of a weight in its row and in its column.

Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models (power = 0.5),
https://openreview.net/forum?id=Tr0lPx9woF
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmprune.types import Stat, Stats


@dataclass(frozen=True)
class RIA:
    power: Annotated[float, Field(ge=0, description="of the norm of the input")] = 0.5
    needs: ClassVar[frozenset[Stat]] = frozenset({"input_sq"})

    def score(self, weight_RC: Tensor, stats: Stats) -> Tensor:
        assert stats.input_sq_C is not None
        size_RC = weight_RC.abs()
        tiny = torch.finfo(size_RC.dtype).tiny  # a row or column of zeros has relative sizes of zero
        share_RC = size_RC / size_RC.sum(1, keepdim=True).clamp_min(tiny) + size_RC / size_RC.sum(0, keepdim=True).clamp_min(tiny)
        return share_RC * stats.input_sq_C ** (self.power / 2)
