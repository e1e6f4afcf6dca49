"""Allocations against direct computations: thresholds over all scores, outliers, spectra, named ratios.

Shapes: R = output rows, C = input columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmprune.allocation.search import Search
from llmprune.errors import RequestError
from llmprune.maths.budget import cheapest, log_histogram, on_levels, share_above, shares_below, spend
from llmprune.maths.linalg import drop_smallest
from llmprune.methods import build
from llmprune.types import Seen, Stats

SHAPES = {"a.0": (16, 24), "a.1": (8, 48), "b.0": (32, 16), "b.1": (4, 96)}
BLOCKS = {name: name[0] for name in SHAPES}
SIZES = {name: rows * columns for name, (rows, columns) in SHAPES.items()}


def model() -> dict[str, tuple[Tensor, Stats]]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for k, (name, (rows, columns)) in enumerate(SHAPES.items()):
        weight_RC = torch.randn(rows, columns, generator=generator) * (0.5 + k)
        inputs_TC = torch.randn(50, columns, generator=generator) * torch.rand(columns, generator=generator)
        squares_C, gradients_R = torch.rand(columns, generator=generator) * 10, torch.rand(rows, generator=generator) * 1e-6
        made[name] = (
            weight_RC,
            Stats(
                tokens=50,
                grad_tokens=50,
                input_sq_C=squares_C,
                input_sum_C=squares_C * 0.3,
                gram_CC=inputs_TC.T @ inputs_TC,
                grad_out_sq_R=gradients_R,
            ),
        )
    return made


def smallest_gone(weight_RC: Tensor) -> Callable[[float], Tensor]:
    """Stands in for a plan's method: the smallest weights go."""
    return lambda ratio: weight_RC * drop_smallest(weight_RC.abs().flatten(), round(ratio * weight_RC.numel())).view_as(weight_RC)


def share(name: str, sparsity: float, **options: object) -> tuple[dict[str, float], dict[str, float]]:
    allocation = build("allocation", name, **options)
    measured = {n: allocation.measure(Seen(w, s, w.abs() if allocation.scored else None, smallest_gone(w))) for n, (w, s) in model().items()}
    return allocation.share(measured, SIZES, BLOCKS, sparsity)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_fisher_is_one_threshold_over_the_model(sparsity: float) -> None:
    scores = {n: w.double().square() * s.grad_out_sq_R.unsqueeze(1) / 50 * s.input_sq_C for n, (w, s) in model().items()}
    threshold = torch.cat([s.flatten() for s in scores.values()]).kthvalue(round(sparsity * sum(SIZES.values()))).values
    under = {n: float((s <= threshold).double().mean()) for n, s in scores.items()}
    ratios, reasons = share("fisher", sparsity, width=1.0)
    assert reasons == pytest.approx(under, abs=0.02)
    assert ratios == pytest.approx(under, abs=0.02)
    narrow, _ = share("fisher", sparsity, width=0.05)
    clipped = {n: min(sparsity + 0.05, max(sparsity - 0.05, r)) for n, r in reasons.items()}
    apart = [narrow[n] - clipped[n] for n in SIZES]
    assert max(apart) - min(apart) < 2 / min(SIZES.values())  # all shifted alike, to a weight


def test_global_ranks_by_lamp() -> None:
    lamps = {}
    for name, (weight_RC, _) in model().items():
        ascending = weight_RC.double().square().flatten().sort().values
        lamps[name] = torch.stack([ascending[i] / ascending[i:].sum() for i in range(len(ascending))])
    threshold = torch.cat(list(lamps.values())).kthvalue(sum(SIZES.values()) // 2).values
    under = {n: float((s <= threshold).double().mean()) for n, s in lamps.items()}
    assert share("global", 0.5)[1] == pytest.approx(under, abs=0.02)


def test_owl_follows_the_outliers_of_a_block() -> None:
    together = {b: torch.cat([(w.abs() * s.input_sq_C.sqrt()).flatten() for n, (w, s) in model().items() if n[0] == b]) for b in "ab"}
    outliers = {b: float((v > 2 * v.mean()).double().mean()) for b, v in together.items()}
    ratios, reasons = share("owl", 0.5, times=2.0)
    assert {n[0]: r for n, r in reasons.items()} == pytest.approx(outliers, abs=0.01)
    fewer, more = sorted(outliers, key=outliers.__getitem__)
    assert ratios[f"{fewer}.0"] - ratios[f"{more}.0"] == pytest.approx(0.16, abs=0.005)


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.9])
def test_erk_keeps_by_shape_and_no_matrix_more_than_all(sparsity: float) -> None:
    ratios, _ = share("erk", sparsity)
    assert sum(ratios[name] * size for name, size in SIZES.items()) == pytest.approx(sparsity * sum(SIZES.values()), abs=1)
    by_shape = {name: (1 - ratios[name]) / ((rows + columns) / (rows * columns)) for name, (rows, columns) in SHAPES.items()}
    free = [value for name, value in by_shape.items() if ratios[name] > 0]
    assert max(free, default=0) == pytest.approx(min(free, default=0), rel=0.02)
    assert all(by_shape[name] <= max(free, default=math.inf) * 1.02 for name in SHAPES if ratios[name] == 0)


def test_heavy_tails_give_up_less() -> None:
    alphas = {}
    for name, (weight_RC, _) in model().items():
        values = torch.linalg.eigvalsh(
            weight_RC.double() @ weight_RC.double().T if len(weight_RC) < weight_RC.shape[1] else weight_RC.double().T @ weight_RC.double()
        )
        k = len(values) // 2
        alphas[name] = 1 + k / sum(math.log(float(values[-i] / values[-k - 1])) for i in range(1, k + 1))
    means = {b: (alphas[f"{b}.0"] + alphas[f"{b}.1"]) / 2 for b in "ab"}
    ratios, reasons = share("heavy_tail", 0.5)
    assert {n[0]: r for n, r in reasons.items()} == pytest.approx(means, rel=1e-6)
    assert (ratios["a.0"] > ratios["b.0"]) == (means["a"] > means["b"])


def test_flap_is_one_threshold_for_standardised_fluctuations() -> None:
    scores = {}
    for name, (weight_RC, stats) in model().items():
        variance_C = (stats.input_sq_C.double() - stats.input_sum_C.double() ** 2 / 50) / 49
        score_C = weight_RC.double().square().sum(0) * variance_C
        scores[name] = (score_C - score_C.mean()) / score_C.std()
    ratios, under = share("flap", 0.5)
    highest_gone = max(float(scores[n].sort().values[round(under[n] * len(scores[n])) - 1]) for n in SIZES if under[n])
    lowest_kept = min(float(scores[n].sort().values[round(under[n] * len(scores[n]))]) for n in SIZES if under[n] < 1)
    assert highest_gone <= lowest_kept
    assert sum(under[n] * SIZES[n] for n in SIZES) == pytest.approx(0.5 * sum(SIZES.values()), abs=max(rows for rows, _ in SHAPES.values()))
    assert ratios == pytest.approx(under, abs=0.05)


def test_named_ratios_hold_and_the_rest_meets_the_budget() -> None:
    ratios, reasons = share("explicit", 0.5, ratios=(("a.1", 0.2), ("a", 0.7)))
    assert (ratios["a.0"], ratios["a.1"]) == (0.7, 0.2)
    assert reasons == {"a.0": 0.7, "a.1": 0.2}
    assert ratios["b.0"] == ratios["b.1"]
    assert sum(ratios[n] * SIZES[n] for n in SIZES) == pytest.approx(0.5 * sum(SIZES.values()))
    for bad in ((("c", 0.5),), (("a", 0.0), ("b.0", 0.0)), ((".", 0.4),)):
        with pytest.raises(RequestError, match="ratios: "):
            share("explicit", 0.5, ratios=bad)


def test_histograms_tell_shares_to_a_bin() -> None:
    values = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) ** 5
    histogram = log_histogram(values.log2())
    assert histogram.sum() == len(values)
    for value in (1e-6, 1e-3, 0.1, 0.9):
        assert share_above(histogram, value) == pytest.approx(float((values > value).double().mean()), abs=0.01)
    low, high = log_histogram(torch.tensor([-math.inf, -1000.0])), log_histogram(torch.tensor([math.inf, 1000.0]))
    assert shares_below({"low": low, "high": high, "none": torch.zeros(0)}, 0.5) == {"low": 1.0, "high": 0.0}


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.98, 0.999])
def test_a_budget_is_met_with_ratios_at_their_ends(sparsity: float) -> None:
    wanted = {"low": -0.4, "middle": 0.5, "high": 1.7}
    sizes = {"low": 10, "middle": 1000, "high": 317}
    ratios = spend(wanted, sizes, sparsity)
    assert sum(ratios[n] * sizes[n] for n in sizes) == pytest.approx(sparsity * 1327, abs=1.0)
    assert all(0 <= ratio < 1 for ratio in ratios.values())
    assert ratios["middle"] <= ratios["high"] + 1 / 317


CURVES = {
    "convex": [[0.0, 1.0, 3.0, 9.0, 40.0], [0.0, 0.1, 0.3, 2.0, 9.0], [0.0, 4.0, 9.0, 20.0, 60.0]],
    "falling first": [[5.0, 1.0, 2.0, 7.0, 30.0], [0.0, 0.5, 2.0, 8.0, 9.0e3], [0.0, 1e-3, 1.0, 3.0, 6.0]],
}
LEVELS = [0.0, 0.2, 0.5, 0.75, 0.95]


def between(ratio: float, losses: list[float]) -> float:
    k = next(k for k in range(1, 5) if ratio <= LEVELS[k] + 1e-12)
    return losses[k - 1] + (ratio - LEVELS[k - 1]) / (LEVELS[k] - LEVELS[k - 1]) * (losses[k] - losses[k - 1])


@pytest.mark.parametrize("sparsity", [0.1, 0.4, 0.6, 0.9])
@pytest.mark.parametrize("kind", list(CURVES))
def test_the_cheapest_choice_is_that_of_brute_force(kind: str, sparsity: float) -> None:
    """Of piecewise linear losses under one budget an optimum has all matrices but one at a level: try them all."""
    sizes = {"a": 1000, "b": 3000, "c": 500}
    curves = dict(zip(sizes, CURVES[kind], strict=True))
    best = math.inf
    for free in sizes:
        fixed = [name for name in sizes if name != free]
        for levels in itertools.product(LEVELS, repeat=2):
            rest = sparsity * 4500 - sum(level * sizes[name] for name, level in zip(fixed, levels, strict=True))
            if 0 <= rest / sizes[free] <= LEVELS[-1]:
                chosen = dict(zip(fixed, levels, strict=True)) | {free: rest / sizes[free]}
                best = min(best, sum(between(chosen[name], curves[name]) for name in sizes))
    ratios = cheapest({name: (torch.tensor(LEVELS), torch.tensor(losses)) for name, losses in curves.items()}, sizes, sparsity)
    assert sum(ratios[n] * sizes[n] for n in sizes) == pytest.approx(sparsity * 4500, abs=0.5)
    slope = max(losses[-1] - losses[-2] for losses in curves.values()) / 0.2 / min(sizes.values())  # ratios are of whole weights
    assert sum(between(ratios[name], curves[name]) for name in sizes) == pytest.approx(best, abs=3 * slope)


def test_sensitivity_measures_the_weighed_error_of_outputs() -> None:
    allocation = build("allocation", "sensitivity", levels=(0.0, 0.5, 0.9))
    for weight_RC, stats in model().values():
        found = allocation.measure(Seen(weight_RC, stats, None, smallest_gone(weight_RC)))
        for level, error in found.T.tolist():
            apart_RC = (weight_RC - smallest_gone(weight_RC)(level)).double()
            rows_R = stats.grad_out_sq_R.double() / stats.grad_tokens
            expected = sum(float(rows_R[r] * apart_RC[r] @ stats.gram_CC.double() @ apart_RC[r]) for r in range(len(weight_RC)))
            assert error == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_sensitivity_takes_the_least_sum_of_errors_of_all_combinations_of_levels() -> None:
    levels = (0.0, 0.25, 0.5, 0.75, 0.95)
    allocation = build("allocation", "sensitivity", levels=levels)
    measured = {n: allocation.measure(Seen(w, s, None, smallest_gone(w))) for n, (w, s) in model().items() if n != "b.1"}
    sizes = {n: SIZES[n] for n in measured}
    ratios, reasons = allocation.share(measured, sizes, BLOCKS, 0.5)
    total, goal = sum(reasons.values()), 0.5 * sum(sizes.values())
    for chosen in itertools.product(range(5), repeat=3):
        if sum(levels[k] * size for k, size in zip(chosen, sizes.values(), strict=True)) >= goal:
            assert total <= sum(float(measured[n][1, k]) for n, k in zip(sizes, chosen, strict=True)) * (1 + 1e-6)
    assert abs(sum(ratios[n] * sizes[n] for n in sizes) - goal) < 1


def test_inputs_of_more_directions_are_kept() -> None:
    entropy = {}
    for name, (_, stats) in model().items():
        shares = torch.linalg.eigvalsh(stats.gram_CC.double()).clamp_min(1e-300)
        shares /= shares.sum()
        entropy[name] = -float((shares * shares.log()).sum()) / math.log(len(shares))
    ratios, reasons = share("entropy", 0.5)
    assert reasons == pytest.approx(entropy, rel=1e-6)
    narrow, wide = min(entropy, key=entropy.__getitem__), max(entropy, key=entropy.__getitem__)
    assert ratios[narrow] - ratios[wide] == pytest.approx(0.16, abs=0.01)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.33, 0.4999])
def test_levels_stay_within_the_budget_and_leave_less_than_a_step(sparsity: float) -> None:
    sizes = {"a": 64, "b": 4096, "c": 1024, "d": 1024}
    wanted = {"a": 0.1, "b": 0.45, "c": 0.3, "d": 0.02}
    levels = (0.0, 0.25, 0.5)
    ratios = on_levels(wanted, sizes, dict.fromkeys(sizes, levels), sparsity)
    assert set(ratios.values()) <= set(levels)
    left = sparsity * sum(sizes.values()) - sum(ratios[n] * sizes[n] for n in sizes)
    assert -0.5 <= left < 0.25 * min(size for name, size in sizes.items() if ratios[name] < 0.5) + 0.5


def test_a_search_finds_the_best_exchange_and_keeps_the_budget() -> None:
    """A fitness with one optimum at known steps, by which offspring of any number of windows are judged alike."""
    best = {"a": 2, "b": -1, "c": -1, "d": 0}
    seen: list[dict[str, int]] = []

    def fitness(candidates: list[dict[str, int]], windows: int) -> list[float]:
        seen.extend(candidates)
        return [float(sum((c[n] - best[n]) ** 2 for n in best)) for c in candidates]

    room = {"a": (-3, 3), "b": (-1, 1), "c": (-3, 3), "d": (0, 2)}
    assert Search().improve(room, fitness) == best
    assert all(sum(c.values()) == 0 for c in seen)
    assert all(room[n][0] <= c[n] <= room[n][1] for c in seen for n in room)
    assert Search().improve({"a": (-3, 3)}, fitness) is None
    assert Search(generations=3).improve(room, lambda candidates, windows: [0.0] * len(candidates)) is None
