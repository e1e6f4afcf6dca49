"""Measured: each matrix is pruned by the plan's own method at a few ratios, on the dense model's inputs. The error of its outputs, weighed by their
Fisher information lam_r (the K-FAC approximation of the loss), sum_r lam_r (w - v)_r H (w - v)_r^T, gives a curve; of all ratios that meet the budget
those with the least sum of errors are taken, exactly: the curves are convex except for noise, which their lower hull removes.

For experts the curve is the relative squared error of a block's output without its least ones (ratios/dropped_experts.py).

Error curves and a Lagrangian as in Frantar and Alistarh, SPDY, https://arxiv.org/abs/2201.13096; the error as in Martens and Grosse, K-FAC,
https://arxiv.org/abs/1503.05671
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.maths.budget import cheapest
from llmprune.maths.linalg import as_summed
from llmprune.types import Seen, Stat


@dataclass(frozen=True)
class Sensitivity:
    levels: tuple[float, ...] = (0.0, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
    needs: ClassVar[frozenset[Stat]] = frozenset({"gram", "grad_out_sq"})
    looks_at: ClassVar[str] = "prunings"
    scored: ClassVar[bool] = False

    def measure(self, seen: Seen) -> Tensor:
        """[2, K]: the levels and the errors at them."""
        weight_RC, stats = seen.weight_RC, seen.stats
        if stats.gram_CC is None or stats.grad_out_sq_R is None or not stats.grad_tokens:
            return weight_RC.new_zeros(0)  # no token reached it
        rows_R1 = (stats.grad_out_sq_R / stats.grad_tokens).unsqueeze(1)
        errors, levels, summed_CC = [], seen.levels or self.levels, as_summed(stats)
        for level in levels:
            apart_RC = weight_RC - seen.pruned_at(level)
            errors.append(float((rows_R1 * apart_RC * (apart_RC @ summed_CC)).sum(dtype=torch.float64)))
        return torch.tensor([list(levels), errors], dtype=torch.float64)

    def share(
        self, measured: dict[str, Tensor], sizes: dict[str, int], blocks: dict[str, str], sparsity: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        curves = {name: (value[0], value[1]) for name, value in measured.items() if len(value)}
        ratios = cheapest(curves, sizes, sparsity)
        return ratios, {name: _at(ratios[name], *curve) for name, curve in curves.items()}


def _at(ratio: float, ratios_K: Tensor, losses_K: Tensor) -> float:
    """The error at a ratio, linear between two measured ones, or at the only one."""
    if len(ratios_K) == 1:
        return float(losses_K[0])
    k = min(max(1, int(torch.searchsorted(ratios_K, ratio))), len(ratios_K) - 1)
    share = (ratio - float(ratios_K[k - 1])) / float(ratios_K[k] - ratios_K[k - 1])
    return float(losses_K[k - 1] + share * (losses_K[k] - losses_K[k - 1]))
