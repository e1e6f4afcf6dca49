"""Rows of a matrix that are coupled by the loss: G = sum over tokens of g g^T, g = dL/dy of the outputs y = W x, in blocks of rows.

What one row loses another one may make up for, in the directions of the output that the loss feels. G of few tokens is trusted less: it is mixed with
the identity, G_d = (1 - d) G / mean(diag G) + d I, where d = 1 / (1 + TRUST * tokens / rows), and at least ``least``.

Shapes: R = rows, C = columns, B = blocks of rows, Q = rows of a block (R = B * Q).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from llmprune.maths.linalg import masked_refit
from llmprune.types import Stats

MOST_ROWS = 768  # of a block
TRUST = 0.1
LEAST = 0.1  # share of the identity

Identity: TypeAlias = Annotated[float, Field(gt=0, le=1, description="least share of the identity in G; 1: rows are not coupled")]


def rows_together(rows: int) -> int:
    """Q: the largest divisor of the number of rows that is not above ``MOST_ROWS``."""
    return next(size for size in range(min(rows, MOST_ROWS), 0, -1) if rows % size == 0)


def gram_of_rows(gradient_TR: Tensor) -> Tensor:
    """[B, Q, Q]: G of the tokens of a micro-batch."""
    tokens, rows = gradient_TR.shape
    blocks_BQT = gradient_TR.T.reshape(rows // rows_together(rows), -1, tokens)
    return blocks_BQT @ blocks_BQT.mT


@dataclass(frozen=True)
class Rows:
    """G_d brought to a unit diagonal: T^-1 G_d T^-1 with T = diag(scale)."""

    matrix_BQQ: Tensor
    scale_R1: Tensor

    def times(self, value_RC: Tensor) -> Tensor:
        return in_blocks(self.matrix_BQQ, value_RC)

    def basis(self) -> Basis:
        blocks, size, _ = self.matrix_BQQ.shape
        if size == 1:
            return Basis(torch.ones_like(self.scale_R1), self.matrix_BQQ)
        values_BQ, vectors_BQQ = torch.linalg.eigh(self.matrix_BQQ.double())
        dtype = self.matrix_BQQ.dtype
        return Basis(values_BQ.clamp_(min=0).to(dtype).view(blocks * size, 1), vectors_BQQ.to(dtype))


@dataclass(frozen=True)
class Basis:
    """The eigenvalues and eigenvectors of ``Rows``."""

    values_R1: Tensor
    vectors_BQQ: Tensor

    def turned(self, value_RC: Tensor) -> Tensor:
        """Into the eigenbasis."""
        return in_blocks(self.vectors_BQQ.mT, value_RC)

    def turned_back(self, value_RC: Tensor) -> Tensor:
        return in_blocks(self.vectors_BQQ, value_RC)


def uncoupled(weight_RC: Tensor) -> Rows:
    """Every row by itself."""
    ones_R1 = torch.ones_like(weight_RC[:, :1])
    return Rows(ones_R1.unsqueeze(-1), ones_R1)


def in_blocks(matrix_BQQ: Tensor, value_RC: Tensor) -> Tensor:
    blocks, size, _ = matrix_BQQ.shape
    return (matrix_BQQ @ value_RC.view(blocks, size, -1)).view_as(value_RC)


def with_identity(gram_BQQ: Tensor, tokens: int, least: float) -> Tensor:
    """G_d, in float64. tokens: whose gradients are summed in G. least: share of the identity."""
    diagonal_BQ = gram_BQQ.diagonal(dim1=-2, dim2=-1).double()
    share = max(least, 1 / (1 + TRUST * tokens / gram_BQQ.shape[-1]))
    mixed_BQQ = gram_BQQ.double() * ((1 - share) / diagonal_BQ.mean())
    mixed_BQQ.diagonal(dim1=-2, dim2=-1).add_(share)
    return mixed_BQQ


def felt(value: Tensor, root_BQQ: Tensor) -> Tensor:
    """[..., R] values of outputs, turned so that their squares sum to what the loss feels: v G_d v^T. root: the Cholesky factor of G_d."""
    blocks, size, _ = root_BQQ.shape
    return torch.einsum("...bq,bqk->...bk", value.to(root_BQQ.dtype).unflatten(-1, (blocks, size)), root_BQQ).flatten(-2)


def known(stats: Stats) -> Tensor | None:
    """[B, Q, Q]: G of a matrix; None where no gradient reached it."""
    gram_BQQ = stats.grad_out_gram_BQQ
    return gram_BQQ if gram_BQQ is not None and bool(gram_BQQ.any()) else None


def root_of(stats: Stats, least: float) -> Tensor | None:
    """[B, Q, Q] in float64: the Cholesky factor of G_d of a matrix's outputs; None where no gradient reached it."""
    gram_BQQ = known(stats)
    return None if gram_BQQ is None else torch.linalg.cholesky(with_identity(gram_BQQ, stats.grad_tokens, least))


def coupled(gram_BQQ: Tensor, tokens: int, least: float, dtype: torch.dtype) -> Rows:
    """tokens: whose gradients are summed in G. least: share of the identity; 1 leaves rows uncoupled."""
    mixed_BQQ = with_identity(gram_BQQ, tokens, least)
    scale_BQ = mixed_BQQ.diagonal(dim1=-2, dim2=-1).sqrt()
    matrix_BQQ = mixed_BQQ / scale_BQ.unsqueeze(-1) / scale_BQ.unsqueeze(-2)
    return Rows(matrix_BQQ.to(dtype), scale_BQ.to(dtype).view(-1, 1))


def rows_of(weight_RC: Tensor, stats: Stats, least: float) -> Rows:
    """A matrix's rows as its gradients couple them; each by itself where none reached it."""
    gram_BQQ = known(stats)
    return uncoupled(weight_RC) if gram_BQQ is None else coupled(gram_BQQ, stats.grad_tokens, least, weight_RC.dtype)


def coupled_refit(rows: Rows, target_RC: Tensor, matrix_CC: Tensor, keep_RC: Tensor, start_RC: Tensor, steps: int) -> Tensor:
    """min over V inside the mask of tr G (V - target) A (V - target)^T, by ``steps`` of conjugate gradients from ``start``, on the whole matrix; row
    by row where rows are not coupled.
    """
    if rows.matrix_BQQ.shape[-1] == 1:
        return masked_refit(target_RC, matrix_CC, keep_RC, start_RC, steps)
    value_RC = start_RC * keep_RC
    residual_RC = rows.times((target_RC - value_RC) @ matrix_CC) * keep_RC
    direction_RC, size = residual_RC, residual_RC.square().sum()
    small = size * 1e-12
    for _ in range(steps):
        if size <= small:
            break
        image_RC = rows.times(direction_RC @ matrix_CC) * keep_RC
        step = size / (direction_RC * image_RC).sum().clamp_min(1e-30)
        value_RC = value_RC + step * direction_RC
        residual_RC = residual_RC - step * image_RC
        before, size = size, residual_RC.square().sum()
        direction_RC = residual_RC + size / before.clamp_min(1e-30) * direction_RC
    return value_RC
