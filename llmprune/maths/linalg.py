"""Numerics shared by patterns and solvers: ranking, damping, inverse factors.

Shapes: R = output rows, C = input columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from llmprune.errors import StoppedError
from llmprune.types import Mask, Stats

Damping: TypeAlias = Annotated[float, Field(ge=0, description="added to the diagonal of the Gram matrix, as a share of its mean")]
SMALL_GROUP = 8  # up to this length pairwise comparison beats selection
NOT_FINITE = "the Gram matrix of the calibration inputs is not finite"
CORRELATED = 3.0
TRUSTED = 64
PSEUDO_TOKENS = 16
DAMPING_LADDER = (1.0, 10.0, 100.0)


def drop_smallest(score: Tensor, k: int) -> Mask:
    """Keep-mask with exactly ``k`` False along the last axis: the smallest scores, of equal ones the earlier position.

    score: [..., n] without NaN. The only place in the project that ranks.
    """
    n = score.shape[-1]
    if k == 0 or k == n:
        return torch.full_like(score, k == 0, dtype=torch.bool)
    if n <= SMALL_GROUP:
        return _ranks(score) >= k
    threshold = _kth_smallest(score, k)
    keep = score > threshold
    surplus = (n - k) - keep.sum(-1, keepdim=True)  # tied weights that have to be kept, the later ones
    if bool(surplus.any()):
        tied = score == threshold
        keep |= tied & (tied.cumsum(-1) > tied.sum(-1, keepdim=True) - surplus)
    return keep


def _kth_smallest(score: Tensor, k: int) -> Tensor:
    """[..., 1]; on CPU by numpy's vectorised selection, several times faster than torch's."""
    if score.device.type != "cpu" or score.dtype == torch.bfloat16:  # which numpy does not know
        return score.kthvalue(k, dim=-1, keepdim=True).values
    return torch.from_numpy(np.partition(score.detach().numpy(), k - 1, axis=-1)[..., k - 1 : k].copy())


def all_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity: decided by the sum, which propagates both, and checked element by element only if that is not finite."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    total = tensor.sum(dtype=torch.float32 if half else None)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def _ranks(score: Tensor) -> Tensor:
    """Rank of each entry along a short last axis, ties by position."""
    entries = score.unbind(-1)
    ranks = [torch.zeros_like(entry, dtype=torch.int8) for entry in entries]
    for i, left in enumerate(entries):
        for j in range(i + 1, len(entries)):
            left_first = left <= entries[j]
            ranks[j] += left_first
            ranks[i] += ~left_first
    return torch.stack(ranks, -1)


def few_tokens(columns: int, tokens: int, ours: bool) -> bool:
    """Whether sums over so many tokens are too uncertain to be used as they are: below TRUSTED tokens for every input; by the papers' own recipes
    (not ``ours``) only where there are fewer tokens than inputs. No tokens at all is handled elsewhere.
    """
    return 0 < tokens < enough_tokens(columns, ours)


def enough_tokens(columns: int, ours: bool) -> int:
    """The least number that is not few for so many inputs."""
    return columns * (TRUSTED if ours else 1)


def shrink(found: Iterable[Stats], ours: bool) -> None:
    """Shrink the correlations in Gram matrices of few tokens towards zero, in place: with about as many tokens as inputs, repairs overfit the sample
    and do worse than none. The diagonal grows by CORRELATED * (C / tokens - 1 / TRUSTED), as the error of the correlations does; its growth is kept
    in ``shrunk``.

    The idea is Ledoit and Wolf's, A well-conditioned estimator for large-dimensional covariance matrices, with the diagonal as the target.
    """
    grown: set[int] = set()  # matrices with the same input share one Gram matrix
    for stats in found:
        gram_CC = stats.gram_CC
        if gram_CC is None or not few_tokens(len(gram_CC), stats.tokens, ours):
            continue
        stats.shrunk = CORRELATED * (len(gram_CC) / stats.tokens - 1 / TRUSTED)
        if id(gram_CC) not in grown:
            gram_CC.diagonal().mul_(1 + stats.shrunk)
            grown.add(id(gram_CC))


def as_summed(stats: Stats) -> Tensor:
    """[C, C]: the Gram matrix without what ``shrink`` has added to its diagonal."""
    assert stats.gram_CC is not None
    if not stats.shrunk:
        return stats.gram_CC
    summed_CC = stats.gram_CC.clone()
    summed_CC.diagonal().div_(1 + stats.shrunk)
    return summed_CC


def squared_error(change_RC: Tensor, stats: Stats) -> float:
    """tr D H D^T of a change D to a matrix's weights, by its Gram matrix as it was summed."""
    assert stats.gram_CC is not None
    diagonal_C = stats.gram_CC.diagonal() * (stats.shrunk / (1 + stats.shrunk))
    return float((change_RC * (change_RC @ stats.gram_CC)).sum() - (change_RC.square() * diagonal_C).sum())


def drawn_to_mean(squares_C: Tensor, tokens: int) -> Tensor:
    """[C] sums of squared inputs, as if there had been PSEUDO_TOKENS more with the mean of all inputs in each: sums of few tokens are uncertain.
    An input that was zero in more tokens than that is dead, and remains so.
    """
    alive_C = (squares_C > 0) | (tokens <= PSEUDO_TOKENS)
    return squares_C + PSEUDO_TOKENS / tokens * squares_C.mean() * alive_C


def damped(gram_CC: Tensor, damping: float) -> Tensor:
    """gram + damping * mean(diagonal) * I. A never-seen column gets the damping alone, so it costs almost nothing to drop."""
    out_CC = gram_CC.clone()
    out_CC.diagonal().add_(damping * gram_CC.diagonal().mean())
    return out_CC


@dataclass(frozen=True)
class Damped:
    """A Gram matrix damped until it is positive definite, in float64.

    ``lower_CC`` is the Cholesky factor of the matrix with rows and columns in reverse order.
    """

    matrix_CC: Tensor
    lower_CC: Tensor
    damping: float
    notes: tuple[str, ...] = ()


def definite(gram_CC: Tensor, damping: float) -> Damped:
    """gram + damping * mean(diag) * I in float64; where that is not positive definite, with 10, then 100 times the damping, which is noted.

    Raises StoppedError when the Gram matrix is not finite, or stays indefinite.
    """
    if not all_finite(gram_CC):
        raise StoppedError(NOT_FINITE, "compute in --dtype float32, or look for overflowing activations")
    for step in DAMPING_LADDER:
        matrix_CC = damped(gram_CC.double(), damping * step)
        lower_CC, failed = torch.linalg.cholesky_ex(matrix_CC.flip((0, 1)))
        if not bool(failed) and all_finite(lower_CC):
            note = f"Gram matrix not positive definite: damping raised to {damping * step:g}"
            return Damped(matrix_CC, lower_CC, damping * step, (note,) if step != 1.0 else ())
    raise StoppedError(
        f"the Gram matrix [{gram_CC.shape[0]} columns] is still indefinite even with {DAMPING_LADDER[-1]:g} x the damping in float64",
        "calibrate with more or other text",
    )


@dataclass(frozen=True)
class Factor:
    """Upper-triangular U with U^T U = (gram + damping * mean(diag) * I)^-1."""

    upper_CC: Tensor
    damping: float
    notes: tuple[str, ...] = ()


def inverse_factor(gram_CC: Tensor, damping: float) -> Factor:
    """The Cholesky factor of the damped inverse, without forming the inverse; computed in float64, returned in the Gram's dtype.

    With J the reversal of order and J H J = M M^T, the factor V = J M J is upper triangular and H = V V^T, so U = V^-1.
    Raises StoppedError as ``definite`` does.
    """
    found = definite(gram_CC, damping)
    return Factor(triangular_inverse(found.lower_CC.flip((0, 1))).to(gram_CC.dtype), found.damping, found.notes)


def triangular_inverse(upper_CC: Tensor, base: int = 128) -> Tensor:
    """Inverse of an upper-triangular matrix by halves: most of the work becomes matrix products."""
    n = upper_CC.shape[0]
    if n <= base:
        identity = torch.eye(n, dtype=upper_CC.dtype, device=upper_CC.device)
        return torch.linalg.solve_triangular(upper_CC, identity, upper=True)
    h = n // 2
    out_CC = torch.zeros_like(upper_CC)
    out_CC[:h, :h] = triangular_inverse(upper_CC[:h, :h], base)
    out_CC[h:, h:] = triangular_inverse(upper_CC[h:, h:], base)
    out_CC[:h, h:] = out_CC[:h, :h] @ (upper_CC[:h, h:] @ out_CC[h:, h:]).neg_()
    return out_CC


def factor_of(stats: Stats, damping: float) -> Factor:
    """The inverse factor of a matrix's Gram, computed once for all matrices that share the input."""
    if damping not in stats.factors:
        assert stats.gram_CC is not None, "a solver that needs the Gram matrix declares it"
        stats.factors[damping] = inverse_factor(stats.gram_CC, damping)
    return stats.factors[damping]


@dataclass(frozen=True)
class Scaled:
    """A damped Gram matrix brought to a unit diagonal, A = S^-1 (gram + damping * mean(diag) * I) S^-1 with S = diag(scale).

    Weights times ``scale`` live in the scaled problem; outlier channels no longer exceed float32's precision there.
    """

    matrix_CC: Tensor
    scale_C: Tensor
    notes: tuple[str, ...] = ()


def scaled_of(stats: Stats, damping: float) -> Scaled:
    """The scaled problem of a matrix, computed once for all matrices that share the input. Raises StoppedError as ``definite`` does."""
    key = ("scaled", damping)
    if key not in stats.factors:
        assert stats.gram_CC is not None, "a solver that needs the Gram matrix declares it"
        found = definite(stats.gram_CC, damping)
        scale_C = found.matrix_CC.diagonal().sqrt()
        dtype = stats.gram_CC.dtype
        stats.factors[key] = Scaled((found.matrix_CC / scale_C / scale_C.unsqueeze(1)).to(dtype), scale_C.to(dtype), found.notes)
    return stats.factors[key]


@dataclass(frozen=True)
class Eigen:
    """The eigenbasis of a scaled problem A, so that (A + rho I)^-1 costs one product for any rho."""

    values_C: Tensor
    vectors_CC: Tensor
    notes: tuple[str, ...] = ()

    def inverse(self, rho: float) -> Tensor:
        return (self.vectors_CC / (self.values_C + rho)) @ self.vectors_CC.T


def eigen_of(stats: Stats, damping: float) -> Eigen:
    """The eigenbasis of a matrix's scaled problem, computed in float64 and once for all matrices that share the input."""
    key = ("eigen", damping)
    if key not in stats.factors:
        matrix_CC = scaled_of(stats, damping).matrix_CC
        values_C, vectors_CC = torch.linalg.eigh(matrix_CC.double())
        stats.factors[key] = Eigen(values_C.clamp_(min=0).to(matrix_CC.dtype), vectors_CC.to(matrix_CC.dtype))
    return stats.factors[key]


@dataclass(frozen=True)
class Spectrum:
    values_C: Tensor
    notes: tuple[str, ...] = ()


def spectrum_of(stats: Stats) -> Tensor:
    """[C] eigenvalues of a matrix's Gram as it was summed, in float64 and once for all matrices that share the input."""
    if "spectrum" not in stats.factors:
        assert stats.gram_CC is not None
        stats.factors["spectrum"] = Spectrum(torch.linalg.eigvalsh(as_summed(stats).double()).clamp_(min=0))
    return stats.factors["spectrum"].values_C


@dataclass(frozen=True)
class Inverse:
    matrix_CC: Tensor
    notes: tuple[str, ...] = ()


def ridge_inverse_of(stats: Stats, damping: float, rho: float) -> Tensor:
    """(A + rho I)^-1 of a matrix's scaled problem A, by Cholesky in float64 and once for all matrices that share the input."""
    key = ("ridge", damping, rho)
    if key not in stats.factors:
        matrix_CC = scaled_of(stats, damping).matrix_CC
        ridge_CC = matrix_CC.to(torch.float64, copy=True)
        ridge_CC.diagonal().add_(rho)
        stats.factors[key] = Inverse(torch.cholesky_inverse(torch.linalg.cholesky(ridge_CC)).to(matrix_CC.dtype))
    return stats.factors[key].matrix_CC


def masked_refit(target_RC: Tensor, matrix_CC: Tensor, keep_RC: Mask, start_RC: Tensor, steps: int) -> Tensor:
    """min over V inside the mask of tr (V - target) A (V - target)^T, by ``steps`` of conjugate gradients from ``start``, row by row at once.

    A: positive definite with unit diagonal. A row whose residual has fallen by 1e-6 is done.
    """
    value_RC = start_RC * keep_RC
    residual_RC = ((target_RC - value_RC) @ matrix_CC) * keep_RC
    direction_RC = residual_RC
    size_R1 = residual_RC.square().sum(1, keepdim=True)
    small_R1 = size_R1 * 1e-12
    for _ in range(steps):
        image_RC = (direction_RC @ matrix_CC) * keep_RC
        curvature_R1 = (direction_RC * image_RC).sum(1, keepdim=True)
        step_R1 = torch.where(size_R1 > small_R1, size_R1 / curvature_R1.clamp_min(1e-30), 0.0)
        value_RC = value_RC + step_R1 * direction_RC
        residual_RC = residual_RC - step_R1 * image_RC
        before_R1, size_R1 = size_R1, residual_RC.square().sum(1, keepdim=True)
        direction_RC = residual_RC + size_R1 / before_R1.clamp_min(1e-30) * direction_RC
    return value_RC


def notes_of(stats: Stats) -> tuple[str, ...]:
    """What had to be done differently to derive something from a matrix's statistics, each once."""
    return tuple(dict.fromkeys(note for derived in stats.factors.values() for note in derived.notes))
