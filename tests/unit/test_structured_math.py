"""The mathematics of structured pruning against slow references and explicit data.

Shapes: T = tokens, R = output rows, C = input columns, U = units, K = columns of a unit.
"""

from __future__ import annotations

import math

import pytest
import torch
from contract.cases import generator, make_inputs, make_weight
from torch import Tensor

from llmprune.criteria.taylor import Taylor
from llmprune.errors import RequestError, StoppedError
from llmprune.maths import counts, scores
from llmprune.maths.asymmetric_target import asymmetric_target
from llmprune.maths.greedy_obs import greedy_obs
from llmprune.maths.least_squares import mean_bias, refit_kept
from llmprune.pruners.experts import few_tokens
from llmprune.types import Stats
from unit.references import best_repair, damped, naive_greedy, output_error

DAMPING = 0.01
CASES = [(12, 1, 7, 1), (12, 1, 6, 2), (12, 1, 9, 3), (6, 2, 3, 1), (6, 3, 4, 2), (4, 4, 3, 1), (1, 3, 1, 1), (5, 2, 5, 1)]


def runs(units: int, width: int) -> Tensor:
    return torch.arange(units * width).view(units, width)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def sums(value_TC: Tensor, **more: Tensor) -> Stats:
    return Stats(len(value_TC), value_TC.square().sum(0), value_TC.sum(0), value_TC.T @ value_TC, **more)


# The greedy choice --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "weighed"])
@pytest.mark.parametrize("slab", [1, 3, 96])
@pytest.mark.parametrize(
    ("units", "width", "remove", "groups"),
    [(12, 1, 7, 1), (12, 1, 6, 2), (12, 1, 9, 3), (6, 2, 3, 1), (6, 3, 4, 2), (4, 4, 3, 1), (1, 3, 1, 1), (5, 2, 5, 1)],
)
def test_greedy_obs_is_the_greedy_removal_by_solving_anew(units: int, width: int, remove: int, groups: int, slab: int, weighed: bool) -> None:
    for seed in range(3):
        weight_RC, value_TC = make_weight(6, units * width, seed).double(), make_inputs(units * width, seed + 9)
        root_RR = random(6, 6, seed=seed).double() if weighed else torch.eye(6, dtype=torch.float64)
        columns_UK = torch.randperm(units * width, generator=generator(seed)).view(units, width)  # heads may lie anywhere
        chosen = greedy_obs(root_RR.T @ weight_RC, value_TC.T @ value_TC, columns_UK, remove, groups, DAMPING, slab)
        metric_RR = root_RR @ root_RR.T
        keep, lost = naive_greedy(weight_RC, damped(value_TC.T @ value_TC, DAMPING), columns_UK.tolist(), remove, groups, metric_RR)
        assert chosen.keep_U.tolist() == keep
        assert chosen.lost == pytest.approx(lost, rel=1e-8)


def test_the_choice_for_fewer_is_how_it_began() -> None:
    weight_RC, value_TC = make_weight(6, 20), make_inputs(20)
    most = greedy_obs(weight_RC, value_TC.T @ value_TC, runs(20, 1), 15, slab=4)
    assert sorted(most.dropped) == (~most.keep_U).nonzero().flatten().tolist()
    for fewer in range(15):
        chosen = greedy_obs(weight_RC, value_TC.T @ value_TC, runs(20, 1), fewer)
        assert chosen.dropped == most.dropped[:fewer]
        assert chosen.prices == pytest.approx(most.prices[:fewer], rel=1e-8)


def test_columns_of_no_unit_stay_and_make_up_for_others() -> None:
    weight_RC, value_TC = make_weight(4, 10).double(), make_inputs(10)
    gram_CC, columns_UK = value_TC.T @ value_TC, torch.tensor([[1, 2], [4, 5], [8, 7]])
    chosen = greedy_obs(weight_RC, gram_CC, columns_UK, 2)
    keep, lost = naive_greedy(weight_RC, damped(gram_CC, DAMPING), columns_UK.tolist(), 2, 1, torch.eye(4, dtype=torch.float64))
    assert chosen.keep_U.tolist() == keep
    assert chosen.lost == pytest.approx(lost, rel=1e-8)


def test_what_the_choice_costs_is_what_the_refit_loses() -> None:
    weight_RC, value_TC = make_weight(8, 40), make_inputs(40)
    gram_CC = (value_TC.T @ value_TC).float()
    chosen = greedy_obs(weight_RC, gram_CC, runs(20, 2), 9)
    refitted = refit_kept(weight_RC, gram_CC, chosen.keep_U.repeat_interleave(2))
    assert refitted.lost == pytest.approx(chosen.lost, rel=1e-6)


def test_inputs_are_left_untouched() -> None:
    weight_RC, gram_CC = make_weight(3, 8), torch.eye(8) + 0.1
    copies = weight_RC.clone(), gram_CC.clone()
    greedy_obs(weight_RC, gram_CC, runs(8, 1), 5)
    refit_kept(weight_RC, gram_CC, torch.arange(8) < 4)
    assert all(a.equal(b) for a, b in zip(copies, (weight_RC, gram_CC), strict=True))


def test_dead_and_doubled_columns_go_first() -> None:
    """A channel that is never active costs nothing, nor does one of two equal ones."""
    value_TC = make_inputs(12)
    value_TC[:, 3] = 0
    value_TC[:, 7] = value_TC[:, 2]
    weight_RC = make_weight(6, 12)
    chosen = greedy_obs(weight_RC, value_TC.T @ value_TC, runs(12, 1), 2, damping=1e-6)
    gone = (~chosen.keep_U).nonzero().flatten().tolist()
    assert gone in ([2, 3], [3, 7])
    assert chosen.lost < 1e-4 * output_error(weight_RC, value_TC.T @ value_TC)


def test_of_equal_units_the_earlier_goes() -> None:
    assert greedy_obs(torch.ones(2, 6), torch.eye(6), runs(6, 1), 2).keep_U.tolist() == [False, False, True, True, True, True]
    assert greedy_obs(torch.ones(2, 6), torch.eye(6), runs(6, 1), 2, groups=2).keep_U.tolist() == [False, True, True, False, True, True]


def test_none_and_all() -> None:
    assert bool(greedy_obs(torch.ones(2, 6), torch.eye(6), runs(3, 2), 0).keep_U.all())
    everything = greedy_obs(torch.ones(2, 6), torch.eye(6), runs(3, 2), 3)
    assert not bool(everything.keep_U.any())
    assert everything.lost == pytest.approx(2 * 6 * 1.01)


def test_a_gram_matrix_that_fails_says_so() -> None:
    with pytest.raises(StoppedError, match="not finite"):
        greedy_obs(torch.ones(2, 2), torch.full((2, 2), math.nan), runs(2, 1), 1)
    slightly_CC = torch.eye(4) - 0.02 * torch.diag(torch.tensor([52.0, 0, 0, 0]))  # not positive definite before the damping is raised
    assert "damping raised" in greedy_obs(torch.ones(2, 4), slightly_CC, runs(4, 1), 1).notes[0]
    assert "damping raised" in refit_kept(torch.ones(2, 4), slightly_CC, torch.arange(4) > 0).notes[0]


def test_many_steps_lose_no_digits() -> None:
    """Changes summed up over hundreds of steps end where a fresh solution does, on inputs that are nearly of low rank."""
    value_TC = random(400, 20) @ random(20, 256, seed=1) + 1e-3 * random(400, 256, seed=2)
    weight_RC, gram_CC = random(16, 256, seed=3), value_TC.T @ value_TC
    chosen = greedy_obs(weight_RC, gram_CC, runs(256, 1), 230, damping=1e-6)
    refitted = refit_kept(weight_RC, gram_CC, chosen.keep_U, 1e-6)
    assert chosen.lost == pytest.approx(refitted.lost, rel=1e-4)


# The refit ------------------------------------------------------------------------------------------------------------------------------------


def test_refit_is_least_squares_under_the_mask() -> None:
    weight_RC, value_TC, keep_C = make_weight(5, 12).double(), make_inputs(12), torch.arange(12) % 3 != 0
    refitted = refit_kept(weight_RC, value_TC.T @ value_TC, keep_C)
    h_CC = damped(value_TC.T @ value_TC, DAMPING)
    wanted_RC = best_repair(weight_RC, keep_C.expand_as(weight_RC), h_CC)
    torch.testing.assert_close(refitted.weight_RC, wanted_RC, rtol=1e-9, atol=1e-12)
    assert refitted.lost == pytest.approx(output_error(wanted_RC - weight_RC, h_CC), rel=1e-9)
    assert not bool(refitted.weight_RC[:, ~keep_C].signbit().any())
    assert not bool(refitted.weight_RC[:, ~keep_C].any())


def test_refit_of_the_asymmetric_target_fits_the_dense_paths_outputs() -> None:
    """argmin over V on the kept columns of sum_t ||W x + p - p' - V x'||^2 + d ||W - V||^2, by lstsq on the tokens themselves."""
    weight_RC, dense_TC, keep_C = make_weight(5, 12).double(), make_inputs(12), torch.arange(12) % 4 != 1
    pruned_TC = dense_TC + 0.3 * make_inputs(12, seed=5)
    apart_TR = random(len(dense_TC), 5, seed=6)  # p - p'
    stats = sums(pruned_TC, cross_CC=dense_TC.T @ pruned_TC, partner_RC=apart_TR.T @ pruned_TC)
    assert stats.gram_CC is not None
    got_RC = refit_kept(asymmetric_target(weight_RC, stats, share=1.0), stats.gram_CC, keep_C).weight_RC
    pull = math.sqrt(DAMPING * float(stats.gram_CC.diagonal().mean()))
    left = torch.cat([pruned_TC, pull * torch.eye(12, dtype=torch.float64)])[:, keep_C]
    right = torch.cat([dense_TC @ weight_RC.T + apart_TR, pull * weight_RC.T])
    torch.testing.assert_close(got_RC[:, keep_C], torch.linalg.lstsq(left, right).solution.T, rtol=1e-8, atol=1e-10)


def test_refit_keeps_the_dtype_and_the_weights_when_all_stay() -> None:
    weight_RC, value_TC = make_weight(5, 12), make_inputs(12)
    refitted = refit_kept(weight_RC, (value_TC.T @ value_TC).float(), torch.ones(12, dtype=torch.bool))
    assert refitted.weight_RC.dtype == torch.float32
    torch.testing.assert_close(refitted.weight_RC, weight_RC)


@pytest.mark.parametrize("refit", [False, True])
def test_the_bias_restores_the_mean_output(refit: bool) -> None:
    weight_RC, value_TC, keep_C = make_weight(5, 12).double(), make_inputs(12) + 1.5, torch.arange(12) > 4
    stats = sums(value_TC)
    assert stats.gram_CC is not None
    pruned_RC = refit_kept(weight_RC, stats.gram_CC, keep_C).weight_RC if refit else weight_RC * keep_C
    bias_R = mean_bias(weight_RC, pruned_RC, stats)
    torch.testing.assert_close((value_TC @ pruned_RC.T + bias_R).mean(0), (value_TC @ weight_RC.T).mean(0))
    if not refit:
        torch.testing.assert_close(bias_R, weight_RC[:, ~keep_C] @ value_TC[:, ~keep_C].mean(0))


# Scores ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3])
def test_flap_is_the_fluctuation_times_the_columns_norm(width: int) -> None:
    weight_RC, value_TC = make_weight(5, 12).double(), make_inputs(12) + 2
    got_U = scores.flap(weight_RC, sums(value_TC), runs(12 // width, width))
    each = [float(weight_RC[:, c].norm() ** 2 * value_TC[:, c].var()) for c in range(12)]
    assert got_U.tolist() == pytest.approx([sum(each[a : a + width]) for a in range(0, 12, width)])


def test_taylor_is_the_gradient_of_closing_a_channel() -> None:
    """By autograd: gates z = 1 on the inputs of a matrix; dL/dz_c is what L changes by to first order when channel c goes."""
    weight_RC, value_TC = make_weight(5, 8).double().requires_grad_(), make_inputs(8)
    gate_C = torch.ones(8, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy((value_TC * gate_C) @ weight_RC.T, torch.arange(len(value_TC)) % 5, reduction="sum")
    by_gate_C, grad_RC = torch.autograd.grad(loss, [gate_C, weight_RC])
    score_RC = Taylor().score(weight_RC.detach(), Stats(grad_RC=grad_RC))
    assert score_RC.sum(0).tolist() == pytest.approx(by_gate_C.abs().tolist())


def test_block_influence_is_a_mean_over_tokens_by_micro_batches() -> None:
    before_NLD, after_NLD = random(6, 4, 8), random(6, 4, 8, seed=1)
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(before_NLD.view(-1, 8), after_NLD.view(-1, 8), strict=True)]
    parts = [scores.block_influence(a, b) for a, b in zip(before_NLD.split(4), after_NLD.split(4), strict=True)]
    assert sum(parts, scores.Mean()).value == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-5)
    assert scores.block_influence(before_NLD, 3 * before_NLD).value == pytest.approx(0, abs=1e-6)


def test_routed_norm_is_over_routed_tokens() -> None:
    gate_T, output_TD = torch.tensor([0.5, 0.25]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    parts = [scores.routed_norm(gate_T[t : t + 1], output_TD[t : t + 1]) for t in range(2)]
    assert sum(parts, scores.Mean()).value == pytest.approx((2.5 + 0.5) / 2)
    assert (scores.Mean() + scores.routed_norm(gate_T[:0], output_TD[:0])).value == 0


# Counts ---------------------------------------------------------------------------------------------------------------------------------------


def spaces() -> tuple[dict[str, Tensor], dict[str, int]]:
    found, sizes = {}, {}
    for layer in range(4):
        found[f"{layer}.channels"] = random(40, seed=layer).exp() * 10**layer
        found[f"{layer}.heads"] = random(8, seed=9 + layer).exp()
        sizes |= {f"{layer}.channels": 3 * 64, f"{layer}.heads": 4 * 64 * 8}
    return found, sizes


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.8])
def test_one_threshold_meets_the_budget_within_a_unit(share: float) -> None:
    found, sizes = spaces()
    total = sum(len(s) * sizes[name] for name, s in found.items())
    budget = round(share * total)
    kept = counts.under_one_threshold(found, sizes, dict.fromkeys(found, 2), budget)
    assert abs(sum((len(found[n]) - k) * sizes[n] for n, k in kept.items()) - budget) < max(sizes.values())
    assert all(2 <= k <= len(found[n]) for n, k in kept.items())


def test_one_threshold_is_over_standardised_scores() -> None:
    found, sizes = spaces()
    kept = counts.under_one_threshold(found, dict.fromkeys(sizes, 1), {}, 90)
    pooled = sorted((float((s[u] - s.mean()) / s.std()), name) for name, s in found.items() for u in range(len(s)))
    gone = [name for _, name in pooled[:90]]
    assert kept == {name: len(s) - gone.count(name) for name, s in found.items()}


def test_what_has_to_stay_stays() -> None:
    kept = counts.under_one_threshold({"a": torch.tensor([1.0, 2, 3, 50]), "b": torch.tensor([5.0])}, {"a": 1, "b": 1}, {"a": 1, "b": 1}, 3)
    assert kept == {"a": 1, "b": 1}
    with pytest.raises(RequestError, match="4 parameters were to be dropped, but the units that may be dropped hold 3"):
        counts.under_one_threshold({"a": torch.tensor([1.0, 2, 3, 50])}, {"a": 1}, {"a": 1}, 4)


def test_layers_of_least_cost_go() -> None:
    cost = {0: 0.5, 1: 0.1, 2: 0.3, 3: 0.1, 4: 0.9}
    assert counts.least_needed(cost, 1) == [1]
    assert counts.least_needed(cost, 3) == [1, 2, 3]
    assert counts.least_needed(cost, 2, fixed=[1]) == [2, 3]
    with pytest.raises(RequestError, match="5 layers were to be dropped of 4 that may be"):
        counts.least_needed(cost, 5, fixed=[0])


def test_experts_that_saw_few_tokens_are_named() -> None:
    assert few_tokens([64, 65, 1000]) == ()
    assert few_tokens([0, 63, 5, 64]) == (
        "1 of 4 experts were never chosen: they are dropped first",
        "2 of 4 experts saw fewer than 64 tokens, the least 5: give more --samples",
    )
