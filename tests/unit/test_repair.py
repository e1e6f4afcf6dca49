"""Solvers that repair weights, on Gram matrices that are hard for float32, and against each other.

Shapes: T = tokens, R = output rows, C = input columns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from folded import folded
from torch import Tensor

from llmprune.criteria.wanda import Wanda
from llmprune.patterns.nm import NM
from llmprune.patterns.unstructured import Unstructured
from llmprune.solvers.admm import ADMM
from llmprune.solvers.refit import Refit
from llmprune.solvers.sparsegpt import SparseGPT
from llmprune.types import Stats

ROWS, COLUMNS = 24, 48
KINDS = ["rank-deficient", "co-linear", "channels scaled", "all scaled"]
SOLVERS = {"sparsegpt": SparseGPT(), "admm": ADMM(), "admm, fixed rho": ADMM(wide=8), "refit": Refit()}
PATTERNS = {"unstructured": Unstructured("matrix"), "2:4": NM(2, 4)}


def inputs(kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    value_TC = random(200, COLUMNS) * (0.25 + 2 * torch.rand(COLUMNS, generator=generator, dtype=torch.float64))
    if kind == "rank-deficient":
        return random(COLUMNS // 4, COLUMNS)
    if kind == "co-linear":
        value_TC[:, 1::2] = value_TC[:, ::2] * (1 + 1e-7 * random(1, COLUMNS // 2))
    if kind == "channels scaled":  # their entries of the Gram matrix by 1e8
        value_TC[:, torch.randperm(COLUMNS, generator=generator)[:3]] *= 1e4
    return value_TC * 1e4 if kind == "all scaled" else value_TC


def error(solver: Any, pattern: Any, weight_RC: Tensor, value_TC: Tensor, dtype: torch.dtype) -> float:
    """tr (V - W) H (V - W)^T with H damped as the solvers do, by a solver that computes in ``dtype``."""
    gram_CC = value_TC.T @ value_TC
    stats = Stats(tokens=len(value_TC), gram_CC=gram_CC.to(dtype), input_sq_C=gram_CC.diagonal().to(dtype))
    score = None if solver.own_score else Wanda().score(weight_RC.to(dtype), stats)
    drop = pattern.dropped(ROWS, COLUMNS, 0.5)
    change_RC = solver.solve(weight_RC.to(dtype), score, stats, pattern, drop).weight_RC.double() - weight_RC
    h_CC = gram_CC + 0.01 * gram_CC.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    return float(((change_RC @ h_CC) * change_RC).sum())


@pytest.mark.parametrize("seeds", [range(10), pytest.param(range(10, 50), marks=pytest.mark.slow)], ids=["ten", "forty more"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", SOLVERS)
@folded("pattern", PATTERNS)
def test_float32_is_as_good_as_float64(kind: str, solver: str, pattern: str, seeds: range) -> None:
    """On 200 hard Gram matrices, 50 of each kind."""
    for seed in seeds:
        weight_RC = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)
        value_TC = inputs(kind, seed)
        single, double = (error(SOLVERS[solver], PATTERNS[pattern], weight_RC, value_TC, dtype) for dtype in (torch.float32, torch.float64))
        assert single <= 1.01 * double, seed


@pytest.mark.parametrize("pattern", PATTERNS)
def test_solvers_in_the_order_of_their_errors(pattern: str) -> None:
    sums = dict.fromkeys(SOLVERS, 0.0)
    for seed in range(10):
        weight_RC = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        mixed_TC = inputs("plain", seed) @ torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
        for name, solver in SOLVERS.items():
            sums[name] += error(solver, PATTERNS[pattern], weight_RC, mixed_TC, torch.float32)
    assert sums["admm"] < sums["admm, fixed rho"] < sums["sparsegpt"]
    assert sums["admm"] < sums["refit"]


def test_a_wide_matrix_says_how_it_was_solved() -> None:
    weight_RC = torch.randn(4, 16)
    stats = Stats(tokens=16, gram_CC=torch.eye(16))
    assert ADMM(wide=8).solve(weight_RC, None, stats, NM(2, 4), 32).notes == ("more than 8 inputs on a CPU: ADMM with a fixed rho",)
    assert ADMM().solve(weight_RC, None, stats, NM(2, 4), 32).notes == ()
