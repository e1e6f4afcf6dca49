"""Rows coupled by the loss: the solver against the dense Kronecker problem, and against rows on their own.

Shapes: T = tokens, R = output rows, C = input columns, B = blocks of rows, Q = rows of a block.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmprune.maths import coupled_rows
from llmprune.maths.coupled_rows import coupled, coupled_refit, gram_of_rows, in_blocks, rows_together, with_identity
from llmprune.patterns.nm import NM
from llmprune.patterns.unstructured import Unstructured
from llmprune.solvers.admm import ADMM
from llmprune.solvers.coupled_refit import CoupledRefit
from llmprune.solvers.kfac import KFAC
from llmprune.types import Stats

ROWS, COLUMNS = 12, 16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int = 0, blocks: int = 1) -> tuple[Tensor, Stats]:
    """Weights, and statistics of correlated inputs and gradients."""
    value_TC = random(400, COLUMNS, seed=seed) @ random(COLUMNS, COLUMNS, seed=seed + 1)
    gradient_TR = random(400, ROWS, seed=seed + 2) @ random(ROWS, ROWS, seed=seed + 3)
    each = ROWS // blocks
    gram_BQQ = torch.stack([g.T @ g for g in gradient_TR.split(each, dim=1)])
    return random(ROWS, COLUMNS, seed=seed + 4), Stats(tokens=400, gram_CC=value_TC.T @ value_TC, grad_out_gram_BQQ=gram_BQQ, grad_tokens=400)


def loss(change_RC: Tensor, stats: Stats, share: float) -> float:
    """tr G_d D H D^T, H damped as the solver does."""
    assert stats.gram_CC is not None
    assert stats.grad_out_gram_BQQ is not None
    gram_BQQ = stats.grad_out_gram_BQQ / stats.grad_out_gram_BQQ.diagonal(dim1=-2, dim2=-1).mean()
    mixed_BQQ = (1 - share) * gram_BQQ + share * torch.eye(gram_BQQ.shape[-1], dtype=torch.float64)
    h_CC = stats.gram_CC + 0.01 * stats.gram_CC.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    return float((in_blocks(mixed_BQQ, change_RC @ h_CC) * change_RC).sum())


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_refit_solves_the_kronecker_problem(blocks: int) -> None:
    """min over the kept weights of vec(V - W)^T (G kron A) vec(V - W), solved densely."""
    weight_RC, stats = problem(blocks=blocks)
    assert stats.gram_CC is not None
    assert stats.grad_out_gram_BQQ is not None
    rows = coupled(stats.grad_out_gram_BQQ, 400, 0.1, torch.float64)
    matrix_CC = stats.gram_CC / stats.gram_CC.diagonal().mean()
    keep_RC = Unstructured("matrix").project(weight_RC.square(), ROWS * COLUMNS // 2)
    found_RC = coupled_refit(rows, weight_RC, matrix_CC, keep_RC, weight_RC, 2000)
    whole = torch.kron(torch.block_diag(*rows.matrix_BQQ), matrix_CC)
    kept = keep_RC.flatten()
    wanted = torch.linalg.solve(whole[kept][:, kept], whole[kept] @ weight_RC.flatten())
    torch.testing.assert_close(found_RC.flatten()[kept], wanted, rtol=1e-4, atol=1e-5)
    assert not found_RC[~keep_RC].any()


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_eigenbasis_is_that_of_the_rows(blocks: int) -> None:
    weight_RC, stats = problem(blocks=blocks)
    assert stats.grad_out_gram_BQQ is not None
    rows = coupled(stats.grad_out_gram_BQQ, 400, 0.1, torch.float64)
    basis = rows.basis()
    torch.testing.assert_close(basis.turned_back(basis.values_R1 * basis.turned(weight_RC)), rows.times(weight_RC))
    torch.testing.assert_close(rows.matrix_BQQ.diagonal(dim1=-2, dim2=-1), torch.ones(blocks, ROWS // blocks, dtype=torch.float64))


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured("matrix"), Unstructured("row")], ids=str)
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_loss_is_lower_than_that_of_rows_on_their_own(pattern: NM | Unstructured, blocks: int) -> None:
    lower = 0
    for seed in range(0, 50, 5):
        weight_RC, stats = problem(seed, blocks)
        drop = pattern.dropped(ROWS, COLUMNS, 0.5)
        ours, theirs = (solver.solve(weight_RC, None, stats, pattern, drop).weight_RC - weight_RC for solver in (KFAC(), ADMM()))
        lower += loss(ours, stats, 0.1) < loss(theirs, stats, 0.1)
    assert lower == 10


def test_uncoupled_rows_are_those_of_admm() -> None:
    weight_RC, stats = problem()
    ours, theirs = (solver.solve(weight_RC, None, stats, NM(2, 4), 96) for solver in (KFAC(identity=1.0, refit_steps=300), ADMM(refit_steps=300)))
    assert torch.equal(ours.keep_RC, theirs.keep_RC)
    torch.testing.assert_close(ours.weight_RC, theirs.weight_RC, rtol=1e-4, atol=1e-6)


def test_rows_in_another_order_with_their_gradients() -> None:
    weight_RC, stats = problem()
    assert stats.grad_out_gram_BQQ is not None
    order_R = torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))
    moved = Stats(tokens=400, gram_CC=stats.gram_CC, grad_tokens=400, grad_out_gram_BQQ=stats.grad_out_gram_BQQ[:, order_R][:, :, order_R])
    found = KFAC().solve(weight_RC, None, stats, NM(2, 4), 96)
    again = KFAC().solve(weight_RC[order_R], None, moved, NM(2, 4), 96)
    assert torch.equal(found.keep_RC[order_R], again.keep_RC)
    torch.testing.assert_close(found.weight_RC[order_R], again.weight_RC, rtol=1e-5, atol=1e-7)


def test_without_gradients_rows_are_not_coupled() -> None:
    weight_RC, stats = problem()
    wanted = KFAC(identity=1.0).solve(weight_RC, None, stats, NM(2, 4), 96)
    for gram_BQQ in (None, torch.zeros(1, ROWS, ROWS, dtype=torch.float64)):
        stats.grad_out_gram_BQQ = gram_BQQ
        found = KFAC(refit_steps=100).solve(weight_RC, None, stats, NM(2, 4), 96)
        assert torch.equal(found.keep_RC, wanted.keep_RC)


def test_rows_of_a_wide_matrix_are_coupled_in_the_refit() -> None:
    weight_RC, stats = problem()
    ours, theirs = (solver.solve(weight_RC, None, stats, NM(2, 4), 96) for solver in (KFAC(wide=8), ADMM(wide=8)))
    assert torch.equal(ours.keep_RC, theirs.keep_RC)
    assert loss(ours.weight_RC - weight_RC, stats, 0.1) < loss(theirs.weight_RC - weight_RC, stats, 0.1)
    assert ours.notes == ("more than 8 inputs on a CPU: ADMM with a fixed rho, its rows coupled in the refit alone",)


def test_few_tokens_are_trusted_less() -> None:
    """The share of the identity falls with the tokens of a row to the least one: seen in the off-diagonal entries of G."""
    gram_BQQ = (torch.ones(8, 8, dtype=torch.float64) + torch.eye(8, dtype=torch.float64)).unsqueeze(0)
    shares = [1 - float(coupled(gram_BQQ, tokens, 0.1, torch.float64).matrix_BQQ[0, 0, 1]) * 2 for tokens in (8, 80, 800, 8000)]
    assert shares == pytest.approx([1 / 1.1, 1 / 2, 0.1, 0.1])


def test_rows_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupled_rows, "MOST_ROWS", 10)
    assert [rows_together(rows) for rows in (7, 10, 12, 20, 22, 23)] == [7, 10, 6, 10, 2, 1]
    gradient_TR = random(30, 12)
    torch.testing.assert_close(gram_of_rows(gradient_TR), torch.stack([g.T @ g for g in gradient_TR.split(6, dim=1)]))


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_quick_relative_solves_for_the_mask_of_the_diagonal(blocks: int) -> None:
    """Largest w^2 G_rr H_cc are kept, and their values are those of the densely solved Kronecker problem."""
    weight_RC, stats = problem(blocks=blocks)
    assert stats.gram_CC is not None
    assert stats.grad_out_gram_BQQ is not None
    found = CoupledRefit(damping=0.01, steps=2000).solve(weight_RC, None, stats, Unstructured("matrix"), ROWS * COLUMNS // 2)
    h_CC = stats.gram_CC + 0.01 * stats.gram_CC.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    mixed_BQQ = with_identity(stats.grad_out_gram_BQQ, 400, 0.1)
    diagonal_R1 = mixed_BQQ.diagonal(dim1=-2, dim2=-1).reshape(-1, 1)
    saliency_RC = weight_RC.square() * diagonal_R1 * h_CC.diagonal()
    assert float(saliency_RC[found.keep_RC].min()) >= float(saliency_RC[~found.keep_RC].max())
    assert int(found.keep_RC.sum()) == ROWS * COLUMNS // 2
    whole, kept = torch.kron(torch.block_diag(*mixed_BQQ), h_CC), found.keep_RC.flatten()
    wanted = torch.linalg.solve(whole[kept][:, kept], whole[kept] @ weight_RC.flatten())
    torch.testing.assert_close(found.weight_RC.flatten()[kept], wanted, rtol=1e-4, atol=1e-5)
