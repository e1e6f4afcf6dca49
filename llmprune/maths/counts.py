"""How many units every space keeps under one budget of parameters, and which layers are dropped.

Shapes: U = units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from llmprune.errors import RequestError
from llmprune.maths.linalg import drop_smallest
from llmprune.maths.scores import standardised


def under_one_threshold(scores: Mapping[str, Tensor], sizes: Mapping[str, int], least: Mapping[str, int], budget: int) -> dict[str, int]:
    """Units that each space keeps, when all units of the model whose standardised score is below one threshold are dropped.

    scores: [U] of every space (channels of a layer, heads of a layer). sizes: parameters removed with one unit. least: units that a space keeps
    in any case. budget: parameters to drop in all; the result differs from it by less than one unit.
    The allocation of An et al., FLAP, https://arxiv.org/abs/2312.11983. Raises RequestError where the least counts leave too little to drop.
    """
    names = list(scores)
    pool = torch.cat([_with_least(standardised(scores[name]).cpu(), least.get(name, 0)) for name in names])
    size = torch.cat([torch.full((len(scores[name]),), sizes[name], dtype=torch.int64) for name in names])
    stay = _cheapest(pool, size, budget).split([len(scores[name]) for name in names])
    return {name: int(part.sum()) for name, part in zip(names, stay, strict=True)}


def _cheapest(pool: Tensor, size: Tensor, budget: int) -> Tensor:
    """Keep-mask over all units: the smallest are dropped until the budget is spent, those at infinity never."""
    free = pool.isfinite()
    if int(size[free].sum()) < budget:
        raise RequestError(
            f"{budget:,} parameters were to be dropped, but the units that may be dropped hold {int(size[free].sum()):,}", "ask for less sparsity"
        )
    return drop_smallest(pool, _nearest(pool, size, int(free.sum()), budget))


def _with_least(score_U: Tensor, least: int) -> Tensor:
    """The ``least`` largest get infinity: they are kept."""
    return score_U.masked_fill(drop_smallest(score_U, max(0, len(score_U) - least)), torch.inf)


def _nearest(pool: Tensor, size: Tensor, most: int, budget: int) -> int:
    """The number of smallest units, up to ``most``, that together come nearest to the budget."""

    def spent(count: int) -> int:
        return int(size[~drop_smallest(pool, count)].sum())

    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if spent(middle) >= budget else (middle + 1, high)
    return low - 1 if low and budget - spent(low - 1) < spent(low) - budget else low


def least_needed(cost: Mapping[int, float], remove: int, fixed: Iterable[int] = ()) -> list[int]:
    """The ``remove`` layers of least cost, in the model's order; ``fixed`` ones are kept. cost: block influence, or the measured rise of
    the loss, of every layer. Ties by position.
    """
    layers = sorted(set(cost) - set(fixed))
    if remove > len(layers):
        raise RequestError(f"{remove} layers were to be dropped of {len(layers)} that may be", "ask for less sparsity")
    keep = drop_smallest(torch.tensor([cost[layer] for layer in layers], dtype=torch.float64), remove)
    return [layer for layer, stays in zip(layers, keep.tolist(), strict=True) if not stays]
