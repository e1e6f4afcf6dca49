"""Matrices that saw few calibration tokens (an expert, a short calibration) are pruned with less trust in them, and that is noted.

Shapes: T = tokens, R = output rows, C = input columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny, tiny_windows
from torch import Tensor

import llmprune
from llmprune.allocation.uniform import Uniform
from llmprune.criteria.magnitude import Magnitude
from llmprune.criteria.wanda import Wanda
from llmprune.maths.asymmetric_target import asymmetric_target
from llmprune.maths.linalg import CORRELATED, PSEUDO_TOKENS, TRUSTED, drawn_to_mean, shrink
from llmprune.patterns.unstructured import Unstructured
from llmprune.pruners.matrix import solve
from llmprune.pruners.plan import Plan
from llmprune.solvers.admm import ADMM
from llmprune.solvers.mask_only import MaskOnly
from llmprune.solvers.refit import Refit
from llmprune.solvers.sparsegpt import SparseGPT
from llmprune.types import Pruned, Stats

R, C = 24, 32


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(value_TC: Tensor) -> Stats:
    return Stats(tokens=len(value_TC), gram_CC=value_TC.T @ value_TC, input_sq_C=value_TC.square().sum(0))


def half(weight_RC: torch.Tensor, stats: Stats, plan: Plan) -> Pruned:
    assert plan.pattern is not None
    return solve(weight_RC, stats, plan, plan.pattern, R * C // 2)


def plan_of(criterion: Any, solver: Any, ours: bool = True) -> Plan:
    return Plan(criterion, Unstructured("row"), solver, Uniform(), 0.5, ours=ours)


@pytest.mark.parametrize(
    ("tokens", "ours", "shrunk"),
    [
        (8, True, CORRELATED * (4 - 1 / TRUSTED)),
        (C, True, CORRELATED * (1 - 1 / TRUSTED)),
        (10 * C, True, CORRELATED * (1 / 10 - 1 / TRUSTED)),
        (TRUSTED * C, True, 0.0),
        (8, False, CORRELATED * (4 - 1 / TRUSTED)),
        (C, False, 0.0),
    ],
)
def test_the_diagonal_grows_with_fewer_tokens(tokens: int, ours: bool, shrunk: float) -> None:
    """By definition: every correlation is divided by 1 + 3 (C / T - 1 / 64); those of a paper's own recipe only where T < C."""
    value_TC = random(tokens, C)
    stats, gram_CC = seen(value_TC), value_TC.T @ value_TC
    shrink([stats, stats], ours)
    assert stats.shrunk == pytest.approx(shrunk)
    assert stats.gram_CC is not None
    torch.testing.assert_close(stats.gram_CC, gram_CC + shrunk * gram_CC.diagonal().diag())


def test_what_shares_a_gram_matrix_is_shrunk_once() -> None:
    first, silent = seen(random(C, C)), Stats(tokens=0)
    second = Stats(tokens=C, gram_CC=first.gram_CC, partner_RC=torch.ones(R, C))
    assert first.gram_CC is not None
    shrunk = CORRELATED * (1 - 1 / TRUSTED)
    wanted_CC = first.gram_CC + shrunk * first.gram_CC.diagonal().diag()
    shrink([first, second, silent], ours=True)
    torch.testing.assert_close(first.gram_CC, wanted_CC)
    assert (first.shrunk, second.shrunk, silent.shrunk) == (shrunk, shrunk, 0.0)


def test_the_target_of_shrunk_statistics_inverts_them_and_keeps_the_sums() -> None:
    """W + share [W (K - H) + E] (H + shrunk diag H + d I)^-1, by a plain solve."""
    pruned_TC, weight_RC, partner_RC = random(40, C), random(R, C, seed=1), random(R, C, seed=2)
    dense_TC = pruned_TC + 0.3 * random(40, C, seed=3)
    gram_CC, cross_CC = pruned_TC.T @ pruned_TC, dense_TC.T @ pruned_TC
    stats = Stats(tokens=40, gram_CC=gram_CC.clone(), cross_CC=cross_CC, partner_RC=partner_RC)
    shrink([stats], ours=True)
    inverted_CC = gram_CC + stats.shrunk * gram_CC.diagonal().diag()
    inverted_CC += 0.01 * inverted_CC.diagonal().mean() * torch.eye(C)
    wanted_RC = weight_RC + 0.75 * torch.linalg.solve(inverted_CC, (weight_RC @ (cross_CC - gram_CC) + partner_RC).T).T
    torch.testing.assert_close(asymmetric_target(weight_RC, stats), wanted_RC, rtol=1e-9, atol=1e-9)


def test_norms_of_few_tokens_are_drawn_to_their_mean() -> None:
    """As if 16 tokens more had been seen, each with the mean of all inputs; the scores of a plan are made of these."""
    value_TC = random(4, C)
    mean = value_TC.square().mean()
    more_TC = torch.cat([value_TC, mean.sqrt().expand(PSEUDO_TOKENS, C)])
    wanted_C = more_TC.square().sum(0)
    torch.testing.assert_close(drawn_to_mean(value_TC.square().sum(0), 4), wanted_C)
    weight_RC = random(R, C, seed=1)
    kept = (weight_RC.abs() * wanted_C.sqrt()).argsort(dim=1).argsort(dim=1) >= C // 2
    assert half(weight_RC, seen(value_TC), plan_of(Wanda(), MaskOnly())).keep_RC.equal(kept)


def test_an_input_that_was_always_zero_goes_first() -> None:
    """Of more than 16 tokens; of fewer it may just not have been seen."""
    value_TC, weight_RC = random(500, C), random(R, C, seed=1)
    value_TC[:, 5] = 0
    weight_RC[:, 5] *= 100
    plan = plan_of(Wanda(), MaskOnly())
    assert not half(weight_RC, seen(value_TC), plan).keep_RC[:, 5].any()
    assert half(weight_RC, seen(value_TC[:8]), plan).keep_RC[:, 5].all()


@pytest.mark.parametrize("solver", [SparseGPT(), ADMM(), Refit()], ids=["sparsegpt", "admm", "refit"])
def test_what_is_lost_is_counted_by_the_sums(solver: Any) -> None:
    """||(V - W) X||^2 over the calibration tokens, whatever was shrunk to find V."""
    value_TC, weight_RC = random(2 * C, C), random(R, C, seed=1)
    stats = seen(value_TC)
    shrink([stats], ours=True)
    pruned = half(weight_RC, stats, plan_of(Wanda() if isinstance(solver, Refit) else None, solver))
    assert stats.shrunk > 1
    assert pruned.lost == pytest.approx(float(((pruned.weight_RC - weight_RC) @ value_TC.T).square().sum()), rel=1e-6)


@pytest.mark.parametrize("solver", [SparseGPT(), ADMM()], ids=["sparsegpt", "admm"])
def test_a_repair_that_would_fit_the_sample_is_held_back(solver: Any) -> None:
    """Independent inputs have no correlations, so no repair can gain anything, and by as many tokens as inputs it only harms: held-out inputs say
    what is left of the harm. The control: without shrinkage it is worse than magnitude.
    """
    other_TC = random(4000, C, seed=9).float()

    def lost(plan: Plan, shrunk: bool) -> float:
        total = 0.0
        for seed in range(8):
            weight_RC, stats = random(R, C, seed=seed).float(), seen(random(C, C, seed=100 + seed).float())
            if shrunk:
                shrink([stats], ours=True)
            pruned_RC = half(weight_RC, stats, plan).weight_RC
            total += float(((pruned_RC - weight_RC) @ other_TC.T).square().sum() / (weight_RC @ other_TC.T).square().sum())
        return total / 8

    magnitude = lost(plan_of(Magnitude(), MaskOnly()), shrunk=False)
    assert lost(plan_of(None, solver), shrunk=False) > 1.5 * magnitude
    assert lost(plan_of(None, solver), shrunk=True) < 1.15 * magnitude


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (plan_of(None, SparseGPT()), "8 calibration tokens for 32 inputs: correlations divided by 13"),
        (plan_of(Wanda(), MaskOnly(), ours=False), "8 calibration tokens for 32 inputs: norms shrunk to their mean"),
        (plan_of(Magnitude(), MaskOnly()), ""),
    ],
)
def test_few_tokens_are_noted(plan: Plan, says: str) -> None:
    stats = seen(random(8, C).float())
    shrink([stats], plan.ours)
    assert half(random(R, C).float(), stats, plan).notes == ((says,) if says else ())


@pytest.mark.parametrize("method", [{"quality": "balanced"}, {"quality": "fast"}, {"method": "wanda"}, {"method": "sparsegpt"}], ids=str)
def test_every_expert_with_few_tokens_says_so(tmp_path: Path, method: dict[str, str]) -> None:
    """32 calibration tokens go to two of eight experts each."""
    source = save_tiny("qwen3_moe", tmp_path / "m")
    report = llmprune.prune(source, 0.5, calibration=tiny_windows(2), output=str(tmp_path / "out"), allocation="uniform", **method)
    few = [row for row in report.rows if row.tokens < row.columns]
    assert sum(row.tokens > 0 for row in few) > 4
    for row in few:
        wanted = f"{row.tokens} calibration tokens for {row.columns} inputs: " if row.tokens else "ranked by magnitude"
        assert any(wanted in note for note in row.notes), row
        assert row.zeros == row.rows * row.columns // 2
