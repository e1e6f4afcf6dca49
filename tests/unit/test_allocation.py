"""Allocations against direct computations: thresholds over all scores, outliers, spectra, named ratios.

Shapes: R = output rows, C = input columns.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmprune.budget import log_histogram, share_above, shares_below, spend
from llmprune.errors import RequestError
from llmprune.methods import build
from llmprune.types import Stats

SHAPES = {"a.0": (16, 24), "a.1": (8, 48), "b.0": (32, 16), "b.1": (4, 96)}
BLOCKS = {name: name[0] for name in SHAPES}
SIZES = {name: rows * columns for name, (rows, columns) in SHAPES.items()}


def model() -> dict[str, tuple[Tensor, Stats]]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for k, (name, (rows, columns)) in enumerate(SHAPES.items()):
        weight_RC = torch.randn(rows, columns, generator=generator) * (0.5 + k)
        squares_C, gradients_R = torch.rand(columns, generator=generator) * 10, torch.rand(rows, generator=generator) * 1e-6
        made[name] = weight_RC, Stats(tokens=50, grad_tokens=50, input_sq_C=squares_C, grad_out_sq_R=gradients_R)
    return made


def share(name: str, sparsity: float, **options: object) -> tuple[dict[str, float], dict[str, float]]:
    allocation = build("allocation", name, **options)
    measured = {n: allocation.measure(w, s, w.abs() if allocation.scored else None) for n, (w, s) in model().items()}
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
