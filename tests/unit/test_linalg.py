"""Ranking and factors against sorting and torch.linalg in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmprune.errors import StoppedError
from llmprune.maths.linalg import SMALL_GROUP, all_finite, damped, drop_smallest, factor_of, inverse_factor, triangular_inverse
from llmprune.types import Stats
from unit.references import stable_argsort_keep

LEVELS = [float("-inf"), -2.0, -1.5, -0.0, 0.0, 1e-30, 0.5, 1.0, 1.0078125, 3e38, float("inf")]


@st.composite
def scores_and_counts(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Scores of 1 to 3 dimensions from few levels (so many ties), the last axis short or long; and how many go."""
    lead = draw(st.lists(st.integers(1, 4), max_size=2))
    n = draw(st.one_of(st.integers(1, SMALL_GROUP), st.integers(SMALL_GROUP + 1, 40), st.sampled_from([129, 300])))
    k = draw(st.integers(0, n))
    levels = draw(st.lists(st.sampled_from(LEVELS), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**32 - 1))
    score = np.random.default_rng(seed).choice(np.array(levels, dtype=np.float32), size=(*lead, n))
    return score, k


@settings(max_examples=400, deadline=None, derandomize=True)
@given(scores_and_counts())
@example((np.zeros((2, 3, 8), np.float32), 5))
@example((np.zeros((2, 3, 9), np.float32), 5))
def test_drop_smallest_is_a_stable_sort(case: tuple[np.ndarray, int]) -> None:
    score, k = case
    given_score = torch.from_numpy(score.copy())
    keep = drop_smallest(given_score, k)
    assert keep.dtype == torch.bool
    np.testing.assert_array_equal(keep.numpy(), stable_argsort_keep(score, k))
    np.testing.assert_array_equal(given_score.numpy(), score)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [4, 8, 9, 1000])
def test_drop_smallest_takes_every_float_dtype_and_layout(dtype: torch.dtype, n: int) -> None:
    score = torch.rand(n, 6, generator=torch.Generator().manual_seed(n)).to(dtype)
    wanted = stable_argsort_keep(score.T.double().numpy(), n // 3)
    np.testing.assert_array_equal(drop_smallest(score.T, n // 3).numpy(), wanted)
    np.testing.assert_array_equal(drop_smallest(score.T.contiguous(), n // 3).numpy(), wanted)


def test_drop_smallest_in_a_large_matrix_of_few_values() -> None:
    """bf16 weights have few magnitudes: at a million entries almost every threshold is tied."""
    score = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).bfloat16().abs().float()
    keep = drop_smallest(score, 500_001)
    np.testing.assert_array_equal(keep.numpy(), stable_argsort_keep(score.numpy(), 500_001))


def random_gram(columns: int, tokens: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    value_TC = torch.randn(tokens, columns, generator=g, dtype=torch.float64)
    value_TC += torch.randn(tokens, 1, generator=g, dtype=torch.float64)
    return value_TC.T @ value_TC


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    gram_CC = torch.diag(torch.tensor([1.0, 2.0, 0.0, 5.0]))
    gram_CC[0, 1] = gram_CC[1, 0] = 0.5
    before_CC = gram_CC.clone()
    wanted_CC = gram_CC + torch.eye(4) * 0.1 * 2.0
    torch.testing.assert_close(damped(gram_CC, 0.1), wanted_CC, rtol=1e-6, atol=0)
    assert gram_CC.equal(before_CC)


@pytest.mark.parametrize("columns", [1, 2, 127, 128, 129, 172, 300])
def test_triangular_inverse_is_the_inverse(columns: int) -> None:
    upper_CC = torch.linalg.cholesky(random_gram(columns, 2 * columns + 5), upper=True)
    inverse_CC = triangular_inverse(upper_CC)
    torch.testing.assert_close(inverse_CC, torch.linalg.inv(upper_CC), rtol=1e-9, atol=1e-12)
    assert inverse_CC.equal(inverse_CC.triu())


@pytest.mark.parametrize("base", [1, 2, 7, 64])
def test_triangular_inverse_at_any_base(base: int) -> None:
    upper_CC = torch.linalg.cholesky(random_gram(50, 120), upper=True)
    torch.testing.assert_close(triangular_inverse(upper_CC, base), torch.linalg.inv(upper_CC), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("columns", [1, 2, 64, 172, 300])
@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_the_factor_is_the_cholesky_factor_of_the_damped_inverse(columns: int, damping: float) -> None:
    gram_CC = random_gram(columns, columns + 3)
    factor = inverse_factor(gram_CC, damping)
    inverse_CC = torch.linalg.inv(damped(gram_CC, damping))
    torch.testing.assert_close(factor.upper_CC, torch.linalg.cholesky(inverse_CC, upper=True), rtol=1e-8, atol=1e-12)
    assert factor.upper_CC.equal(factor.upper_CC.triu())
    assert (factor.damping, factor.notes) == (damping, ())


@pytest.mark.parametrize("columns", [64, 300])
def test_the_factor_in_float32_is_near_the_one_in_float64(columns: int) -> None:
    gram_CC = random_gram(columns, 2 * columns)
    single, double = inverse_factor(gram_CC.float(), 0.01).upper_CC, inverse_factor(gram_CC, 0.01).upper_CC
    assert single.dtype == torch.float32
    assert float((single.double() - double).norm() / double.norm()) < 1e-5


def test_own_inverse_entries_are_those_after_earlier_columns_left() -> None:
    """U_cc^2 = [(H_c:,c:)^-1]_00 and U_cj / U_cc = its first row / its first entry: what the sweep takes from the factor."""
    gram_CC = random_gram(20, 60)
    upper_CC = inverse_factor(gram_CC, 0.01).upper_CC
    for c in range(20):
        rest = torch.linalg.inv(damped(gram_CC, 0.01)[c:, c:])
        torch.testing.assert_close(upper_CC[c, c] ** 2, rest[0, 0], rtol=1e-10, atol=0)
        torch.testing.assert_close(upper_CC[c, c:] / upper_CC[c, c], rest[0] / rest[0, 0], rtol=1e-8, atol=1e-12)


def with_lowest_eigenvalue(lowest: float, columns: int = 32) -> Tensor:
    basis_CC = torch.linalg.qr(torch.randn(columns, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    values_C = torch.full((columns,), (columns - lowest) / (columns - 1), dtype=torch.float64)
    values_C[0] = lowest
    return (basis_CC * values_C) @ basis_CC.T


@pytest.mark.parametrize(("lowest", "damping"), [(-0.005, 0.01), (-0.05, 0.1), (-0.5, 1.0)])
def test_an_indefinite_gram_climbs_the_damping_ladder(lowest: float, damping: float) -> None:
    gram_CC = with_lowest_eigenvalue(lowest)
    factor = inverse_factor(gram_CC.float(), 0.01)
    assert factor.damping == pytest.approx(damping)
    assert len(factor.notes) == (damping != 0.01)
    assert all(f"{damping:g}" in note for note in factor.notes)
    wanted_CC = torch.linalg.cholesky(torch.linalg.inv(damped(gram_CC, damping)), upper=True)
    assert float((factor.upper_CC.double() - wanted_CC).norm() / wanted_CC.norm()) < 1e-3


def test_what_no_damping_cures_is_refused() -> None:
    with pytest.raises(StoppedError, match="32 columns"):
        inverse_factor(with_lowest_eigenvalue(-1.5), 0.01)
    with pytest.raises(StoppedError):
        inverse_factor(torch.zeros(4, 4), 0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gram_that_is_not_finite_is_refused(bad: float) -> None:
    gram_CC = random_gram(8, 20)
    gram_CC[2, 5] = bad
    with pytest.raises(StoppedError, match="not finite"):
        inverse_factor(gram_CC, 0.01)


def test_matrices_that_share_an_input_share_the_factor() -> None:
    stats = Stats(tokens=20, gram_CC=random_gram(8, 20))
    first = factor_of(stats, 0.01)
    assert factor_of(stats, 0.01) is first
    assert factor_of(stats, 0.1) is not first
    assert factor_of(stats, 0.1).damping == 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_all_finite_is_decided_by_single_values(dtype: torch.dtype) -> None:
    """Large values whose sum overflows are finite; infinities of both signs and a NaN at either end are not."""
    large = torch.full((9999,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(large)
    assert all_finite(torch.empty(0, dtype=dtype))
    for bad in ([float("inf"), -float("inf")], [-float("inf")], [float("nan")]):
        for at in (0, 9990):
            spoiled = large.clone()
            spoiled[at : at + len(bad)] = torch.tensor(bad, dtype=dtype)
            assert not all_finite(spoiled)
