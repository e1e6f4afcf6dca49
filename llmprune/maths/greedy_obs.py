"""Greedy choice of the input units whose removal costs a matrix least, when the least-squares refit of all others compensates for them.

With A = (H + d I)^-1 and W the refit so far, also dropping unit g (columns of one head, one channel) costs, summed over tokens and in a metric
G = L L^T of the outputs,

    tr G W_g (A_gg)^-1 W_g^T = tr (A_gg)^-1 S_gg,    S = W^T G W = (L^T W)^T (L^T W),

and leaves W - W_g (A_gg)^-1 A_g: and A - A_:g (A_gg)^-1 A_g:, the inverse on the remaining columns. The cheapest unit is dropped, and all
others are priced again.
Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon,
https://papers.nips.cc/paper/647-second-order-derivatives-for-network-pruning-optimal-brain-surgeon; in blocks as in Kurtic et al., ZipLM,
https://arxiv.org/abs/2302.04089.

Only A and S are carried, never W: the metric goes into S once, and the changes of both have low rank, so they are collected over a slab of steps
and applied by one matrix product, as a blocked Cholesky factorisation does. Nothing is approximated by this.

Shapes: R = output rows, C = input columns, U = units, K = columns of a unit, N = columns that units hold, P = columns dropped in a slab.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.maths.linalg import definite, drop_smallest

SLAB = 96  # columns dropped between two products with the whole of A and S


@dataclass(frozen=True)
class Chosen:
    """Which units are kept; and the dropped ones in order, which is also the choice for any smaller number."""

    keep_U: Tensor  # bool
    dropped: tuple[int, ...]  # units in the order in which they were dropped
    prices: tuple[float, ...]  # what each has added to ``lost``
    notes: tuple[str, ...] = ()

    @property
    def lost(self) -> float:
        """Squared error of the refit, weighed by rows and damped, summed over rows and calibration tokens."""
        return sum(self.prices)


def greedy_obs(
    weight_RC: Tensor,
    gram_CC: Tensor,
    columns_UK: Tensor,
    remove: int,
    groups: int = 1,
    damping: float = 0.01,
    slab: int = SLAB,
) -> Chosen:
    """Drop ``remove`` units one by one, ``remove / groups`` from each of ``groups`` equal runs of units. Ties by position.

    weight_RC: L^T W of the reader (or of its asymmetric target), W itself without a metric. gram_CC: of its inputs, undamped. columns_UK: what each
    unit holds; columns that no unit holds are kept, and take part in the refit. Works in float64, on about 5 C^2 numbers at a time, with some 4 C^2
    operations for every dropped column.
    Raises StoppedError as linalg.definite does.
    """
    units, width = columns_UK.shape
    assert remove <= units
    assert remove % groups == 0, "equal numbers are dropped from every run of units"
    assert units % groups == 0, "runs of units are equal"
    left, notes = _start(weight_RC.double(), gram_CC, columns_UK, damping)
    keep_U = torch.ones(units, dtype=torch.bool, device=gram_CC.device)
    quota_G = torch.full((groups,), remove // groups, device=gram_CC.device)
    dropped: list[tuple[int, float]] = []
    while len(dropped) < remove:
        left, more = _slab(left, keep_U, quota_G, min(remove - len(dropped), max(1, slab // width)))
        dropped += more
    return Chosen(keep_U, tuple(unit for unit, _ in dropped), tuple(price for _, price in dropped), notes)


@dataclass(frozen=True)
class _Left:
    """A and S on the units that are still there, unit by unit."""

    inverse_NN: Tensor
    outer_NN: Tensor
    units_U: Tensor  # their numbers
    width: int  # K


def _start(rows_RC: Tensor, gram_CC: Tensor, columns_UK: Tensor, damping: float) -> tuple[_Left, tuple[str, ...]]:
    """A and S before anything is dropped. Columns that no unit holds need not be carried: dropping others never reads them."""
    found = definite(gram_CC, damping)
    held_N = columns_UK.reshape(-1)
    inverse_NN = torch.cholesky_inverse(found.lower_CC).flip((0, 1))[held_N][:, held_N]
    held_RN = rows_RC[:, held_N]
    return _Left(inverse_NN, held_RN.T @ held_RN, torch.arange(len(columns_UK), device=gram_CC.device), columns_UK.shape[1]), found.notes


def _slab(left: _Left, keep_U: Tensor, quota_G: Tensor, steps: int) -> tuple[_Left, list[tuple[int, float]]]:
    """Drop ``steps`` units, marking them in ``keep_U`` and ``quota_G``; (the remaining problem, (unit, price) of the dropped ones)."""
    width, units = left.width, len(left.units_U)
    changes = _Changes(left, steps * width)
    group_U = left.units_U // (len(keep_U) // len(quota_G))
    closed = torch.tensor(torch.inf, dtype=torch.float64, device=left.units_U.device)
    here_U = torch.ones(units, dtype=torch.bool, device=left.units_U.device)
    dropped = []
    for _ in range(steps):
        price_U = torch.where(here_U & (quota_G[group_U] > 0), changes.prices(), closed)
        unit = int((~drop_smallest(price_U, 1)).nonzero())
        dropped.append((int(left.units_U[unit]), max(0.0, float(price_U[unit]))))
        changes.take(unit)
        here_U[unit] = False
        keep_U[left.units_U[unit]] = False
        quota_G[group_U[unit]] -= 1
    return changes.settle(here_U), dropped


class _Changes:
    """A - F F^T and S - Y F^T - F Y^T, with F and Y growing by K columns per dropped unit; their diagonal blocks are kept up to date."""

    def __init__(self, left: _Left, columns: int) -> None:
        self._left = left
        size = len(left.inverse_NN)
        self._f_NP = left.inverse_NN.new_zeros(size, columns)
        self._y_NP = left.inverse_NN.new_zeros(size, columns)
        self._done = 0
        self._inverse_UKK = _diagonal_blocks(left.inverse_NN, left.width)
        self._outer_UKK = _diagonal_blocks(left.outer_NN, left.width)

    def prices(self) -> Tensor:
        """[U]: tr (A_gg)^-1 S_gg; of dropped units, anything. Rounding may leave values slightly below zero."""
        if self._left.width == 1:
            return (self._outer_UKK / self._inverse_UKK.clamp_min(torch.finfo(torch.float64).tiny)).view(-1).nan_to_num(0.0)
        lower_UKK, _ = torch.linalg.cholesky_ex(self._inverse_UKK)
        return torch.cholesky_solve(self._outer_UKK, lower_UKK).diagonal(dim1=1, dim2=2).sum(1).nan_to_num(0.0)

    def take(self, unit: int) -> None:
        """With A_gg = L L^T: F gains f = A_:g L^-T, and Y gains y = S_:g L^-T - f q / 2, q = L^-1 S_gg L^-T."""
        width, end = self._left.width, self._done + self._left.width
        own = slice(unit * width, (unit + 1) * width)
        f_NP, y_NP = self._f_NP[:, : self._done], self._y_NP[:, : self._done]
        # both are symmetric, and their rows are contiguous
        inverse_NK = self._left.inverse_NN[own].T - f_NP @ f_NP[own].T
        outer_NK = self._left.outer_NN[own].T - y_NP @ f_NP[own].T - f_NP @ y_NP[own].T
        lower_KK = torch.linalg.cholesky(inverse_NK[own])
        f_NK, s_NK = (torch.linalg.solve_triangular(lower_KK.T, value_NK, upper=True, left=False) for value_NK in (inverse_NK, outer_NK))
        y_NK = s_NK - f_NK @ torch.linalg.solve_triangular(lower_KK, s_NK[own], upper=False) / 2
        self._f_NP[:, self._done : end], self._y_NP[:, self._done : end] = f_NK, y_NK
        self._done = end
        f_UKK, y_UKK = f_NK.view(-1, width, width), y_NK.view(-1, width, width)
        cross_UKK = y_UKK @ f_UKK.mT
        self._inverse_UKK -= f_UKK @ f_UKK.mT
        self._outer_UKK -= cross_UKK + cross_UKK.mT
        self._inverse_UKK[unit] = torch.eye(width, dtype=torch.float64, device=f_NK.device)  # dropped columns must not affect the prices

    def settle(self, here_U: Tensor) -> _Left:
        """The remaining problem, with the changes applied."""
        width = self._left.width
        here_N = here_U.repeat_interleave(width)
        f_NP, y_NP = self._f_NP[here_N], self._y_NP[here_N]
        inverse_NN = self._left.inverse_NN[here_N][:, here_N].addmm_(f_NP, f_NP.T, alpha=-1)
        cross_NN = y_NP @ f_NP.T
        outer_NN = self._left.outer_NN[here_N][:, here_N].sub_(cross_NN).sub_(cross_NN.T)
        return _Left(inverse_NN, outer_NN, self._left.units_U[here_U], width)


def _diagonal_blocks(value_NN: Tensor, width: int) -> Tensor:
    """[U, K, K]"""
    units = len(value_NN) // width
    return value_NN.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
