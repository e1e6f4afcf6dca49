"""Any criterion's mask, then Adam on all kept weights of a block, min ||block(x') - y||^2: x' is the block's input on the pruned path, y the
output of the dense block. Where the loss's gradients are taken anyway (by ``kfac`` and ``block_obs``), an error e counts as the loss feels it,
e G_d e^T with those at the block's outputs (llmprune.maths.coupled_rows). Masks are frozen; norm scales and biases are trained too. After another
solver (``admm+reconstruct``) it starts from that one's weights.

Block reconstruction as in Li et al., BRECQ, https://arxiv.org/abs/2102.05426, with masks instead of rounding, and in a metric in place of its
diagonal Fisher information; Adam as in maths/masked_adam.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from llmprune.maths.masked_adam import SurvivorAdam
from llmprune.types import Pattern, Pruned, Stat, Stats


@dataclass(frozen=True)
class Reconstruct:
    steps: Annotated[int, Field(ge=1, description="of Adam, on each block")] = 100
    rate: Annotated[float, Field(gt=0, description="of a step, as a share of a tensor's root mean square")] = 0.04
    seed: int = 0
    needs: ClassVar[frozenset[Stat]] = frozenset()
    own_score: ClassVar[bool] = False
    work: ClassVar[tuple[int, int]] = (0, 16)
    fits_blocks: ClassVar[bool] = True

    def solve(self, weight_RC: Tensor, score_RC: Tensor | None, stats: Stats, pattern: Pattern, drop: int) -> Pruned:
        """The mask; ``fit`` does the rest when all matrices of the block have theirs."""
        assert score_RC is not None, "the recipe gives this solver a criterion"
        keep_RC = pattern.project(score_RC, drop)
        return Pruned(weight_RC.masked_fill(~keep_RC, 0), keep_RC)

    def fit(
        self,
        masked: list[nn.Parameter],
        free: list[nn.Parameter],
        outputs: Callable[[int], tuple[Tensor, Tensor]],
        batches: int,
        settle: Callable[[], None] = lambda: None,
    ) -> bool:
        """Train parameters of a block in place. outputs: micro-batch -> (the block's output, the wanted one), in the metric of the
        errors. settle: rounds the parameters to their stored dtype. False: nothing was gained, and they are as before.
        """

        def error() -> float:
            return sum(_squared(*outputs(batch), size=1.0).item() for batch in range(batches))

        before = error()
        size = sum(outputs(batch)[1].float().square().sum().item() for batch in range(batches)) / batches
        order = torch.Generator().manual_seed(self.seed)
        with SurvivorAdam(masked, free, self.steps, self.rate) as adam:
            for _ in range(self.steps):
                batch = int(torch.randint(batches, (), generator=order))
                with torch.enable_grad():
                    adam.add(_squared(*outputs(batch), size=size))
                adam.step()
            settle()
            adam.keep = error() < before
        return adam.keep


def _squared(out: Tensor, wanted: Tensor, size: float) -> Tensor:
    return (out.float() - wanted.float()).square().sum() / size
