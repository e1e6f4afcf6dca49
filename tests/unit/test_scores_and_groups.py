"""Magnitude and Wanda, and the groups in which weights compete, against loops over single weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from llmprune.criteria.magnitude import Magnitude
from llmprune.criteria.wanda import Wanda
from llmprune.patterns.nm import NM
from llmprune.patterns.unstructured import Unstructured
from llmprune.solvers.mask_only import MaskOnly
from llmprune.types import Stats
from unit.references import choose_in_matrix, choose_in_rows, choose_n_of_m, smallest_go


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def column_scales(columns: int) -> Tensor:
    return torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(9))]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_wanda_is_magnitude_times_input_norm_compared_in_each_row(sparsity: float) -> None:
    """Sun et al. 2023, eq. 1 and section 3: S_ij = |W_ij| * ||X_j||_2, the lowest s % of every output row go."""
    weight_RC, value_TC = draw(6, 20), draw(50, 20, seed=1) * column_scales(20)
    norms = [math.sqrt(sum(float(x) ** 2 for x in value_TC[:, c])) for c in range(20)]
    scores = [[abs(float(w)) * norms[c] for c, w in enumerate(row)] for row in weight_RC]
    wanted_RC = torch.tensor([smallest_go(row, int(sparsity * 20)) for row in scores])

    stats = Stats(tokens=50, input_sq_C=value_TC.square().sum(0))
    score_RC = Wanda().score(weight_RC, stats)
    torch.testing.assert_close(score_RC, torch.tensor(scores), rtol=1e-6, atol=0)
    pattern = Unstructured("row")
    pruned = MaskOnly().solve(weight_RC, score_RC, stats, pattern, pattern.dropped(6, 20, sparsity))
    assert pruned.keep_RC.equal(wanted_RC)
    assert pruned.weight_RC.equal(torch.where(wanted_RC, weight_RC, 0.0))


def test_wanda_and_magnitude_disagree_where_the_paper_says() -> None:
    """A small weight on a loud input outlives a large one on a quiet input."""
    weight_RC, stats = torch.tensor([[0.1, 1.0]]), Stats(tokens=1, input_sq_C=torch.tensor([400.0, 1.0]))
    assert Unstructured("row").project(Wanda().score(weight_RC, stats), 1).tolist() == [[True, False]]
    assert Unstructured("row").project(Magnitude().score(weight_RC, stats), 1).tolist() == [[False, True]]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_magnitude_drops_the_smallest_of_the_whole_matrix(sparsity: float) -> None:
    weight_RC = draw(6, 20) * torch.logspace(-1, 1, 6)[:, None]  # rows of unlike scale: a row-wise ranking would differ
    magnitudes = [abs(float(w)) for w in weight_RC.flatten()]
    wanted_RC = torch.tensor(smallest_go(magnitudes, round(sparsity * 120))).view(6, 20)
    assert len(set(wanted_RC.sum(1).tolist())) > 1

    pattern = Unstructured("matrix")
    score_RC = Magnitude().score(weight_RC, Stats())
    pruned = MaskOnly().solve(weight_RC, score_RC, Stats(), pattern, pattern.dropped(6, 20, sparsity))
    assert pruned.keep_RC.equal(wanted_RC)
    assert pruned.weight_RC.equal(torch.where(wanted_RC, weight_RC, 0.0))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(7, 13), (1, 9), (12, 1), (3, 40), (5, 8)])
def test_row_groups_share_out_the_remainder(rows: int, columns: int, ties: bool) -> None:
    score_RC = draw(rows, columns).abs()
    score_RC = (score_RC * 2).floor() if ties else score_RC
    for drop in range(rows * columns + 1):
        keep_RC = Unstructured("row").project(score_RC, drop)
        per_row = (~keep_RC).sum(1)
        assert int(per_row.sum()) == drop
        assert int(per_row.max() - per_row.min()) <= 1
        assert keep_RC.equal(choose_in_rows(score_RC, drop)), drop


def test_row_groups_stay_exact_among_infinite_scores() -> None:
    """A user's criterion may protect weights with infinity; the count is exact all the same."""
    score_RC = torch.tensor([[1.0, torch.inf, torch.inf], [torch.inf, torch.inf, torch.inf], [3.0, 2.0, 1.0]])
    for drop in range(10):
        keep_RC = Unstructured("row").project(score_RC, drop)
        assert int((~keep_RC).sum()) == drop
        assert keep_RC.equal(choose_in_rows(score_RC, drop)), drop


@pytest.mark.parametrize("ties", [False, True])
def test_matrix_groups_rank_all_weights_together(ties: bool) -> None:
    score_RC = draw(7, 13).abs()
    score_RC = (score_RC * 2).floor() if ties else score_RC
    for drop in range(92):
        assert Unstructured("matrix").project(score_RC, drop).equal(choose_in_matrix(score_RC, drop)), drop


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (3, 6), (1, 3), (7, 8), (2, 16), (1, 2), (5, 32)])
@pytest.mark.parametrize("ties", [False, True])
def test_n_of_m_keeps_the_largest_of_every_group(n: int, m: int, ties: bool) -> None:
    score_RC = draw(5, 6 * m).abs()
    score_RC = (score_RC * 2).floor() if ties else score_RC
    pattern = NM(n, m)
    assert (pattern.unit, pattern.sparsity) == (m, pytest.approx(1 - n / m))
    drop = pattern.dropped(5, 6 * m, pattern.sparsity)
    assert drop == 30 * (m - n)
    assert pattern.project(score_RC, drop).equal(choose_n_of_m(n, m)(score_RC, drop))


@pytest.mark.parametrize(("sparsity", "rows", "columns"), [(0.5, 7, 13), (0.0, 3, 3), (0.29, 10, 10), (0.57, 10, 10), (1 - 1e-9, 4, 4)])
def test_the_count_is_the_nearest_whole_number(sparsity: float, rows: int, columns: int) -> None:
    drop = Unstructured().dropped(rows, columns, sparsity)
    assert abs(drop - sparsity * rows * columns) == np.min(np.abs(np.arange(rows * columns + 1) - sparsity * rows * columns))
