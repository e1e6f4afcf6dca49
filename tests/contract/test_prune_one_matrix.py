"""Every criterion x pattern x solver that exists, held to the same promises. Methods are found by name: see cases.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from folded import folded
from torch import Tensor
from unit.references import output_error

from contract.cases import (
    COMBOS,
    Combo,
    check_promises,
    every,
    fixed,
    generator,
    make_inputs,
    make_stats,
    make_weight,
    rounded,
    same_bits,
    tensors_of,
)
from llmprune.errors import StoppedError

all_combos = every(COMBOS)
with_gram = every([c for c in COMBOS if "gram" in c.needs])
ranked_by_inputs = every([c for c in COMBOS if (c.solver if c.solver.own_score else c.criterion).needs])
with_free_sparsity = every([c for c in COMBOS if not fixed(c.pattern)])  # N:M alone says how much goes
both_dtypes = folded("dtype", [torch.float32, torch.float64])


@all_combos
@both_dtypes
def test_exactly_the_asked_number_goes_at_any_shape_and_sparsity(combo: Combo, dtype: torch.dtype) -> None:
    for rows, columns in combo.shapes():
        weight_RC = make_weight(rows, columns, dtype=dtype)
        stats = make_stats(combo.needs, make_inputs(columns), dtype)
        for drop in combo.drops(rows, columns):
            pruned = combo.run(weight_RC, stats, drop)
            where = f"[{rows}, {columns}], {drop} dropped"
            check_promises(combo, pruned, weight_RC, drop, where)
            assert bool((pruned.weight_RC[pruned.keep_RC] != 0).all()), f"{where}: a kept weight became zero"


@with_free_sparsity
def test_everything_may_go(combo: Combo) -> None:
    for rows, columns in combo.shapes():
        weight_RC, drop = make_weight(rows, columns), combo.pattern.dropped(rows, columns, 1.0)
        assert drop == weight_RC.numel()
        check_promises(combo, combo.run(weight_RC, make_stats(combo.needs, make_inputs(columns)), drop), weight_RC, drop, f"[{rows}, {columns}]")


@all_combos
def test_inputs_are_left_alone(combo: Combo) -> None:
    rows, columns = combo.shapes()[1]
    weight_RC, stats = make_weight(rows, columns), make_stats(combo.needs, make_inputs(columns))
    before = {"weight": weight_RC.clone()} | {name: t.clone() for name, t in tensors_of(stats).items()}
    tokens = stats.tokens
    pruned = combo.run(weight_RC, stats, combo.pattern.dropped(rows, columns, 0.5))
    after = {"weight": weight_RC} | tensors_of(stats)
    assert after.keys() == before.keys()
    assert [name for name in before if not same_bits(before[name], after[name])] == []
    assert stats.tokens == tokens
    assert pruned.weight_RC.untyped_storage().data_ptr() != weight_RC.untyped_storage().data_ptr(), "the result is the input itself"


@all_combos
def test_a_transposed_view_gives_the_same(combo: Combo) -> None:
    """Conv1D stores its weights transposed; solvers see a view whose rows are strided."""
    rows, columns = combo.shapes()[1]
    weight_RC, inputs = make_weight(rows, columns), make_inputs(columns)
    strided_RC = weight_RC.T.contiguous().T
    drop = combo.pattern.dropped(rows, columns, 0.5)
    straight = combo.run(weight_RC, make_stats(combo.needs, inputs), drop)
    strided = combo.run(strided_RC, make_stats(combo.needs, inputs), drop)
    assert straight.keep_RC.equal(strided.keep_RC)
    torch.testing.assert_close(straight.weight_RC, strided.weight_RC, rtol=1e-5, atol=1e-6)


TIES: dict[str, Callable[[Tensor], Tensor]] = {
    "all-equal": torch.ones_like,
    "all-zero": torch.zeros_like,
    "one-sign-each": torch.sign,
    "few-bfloat16": lambda w: (w * 2).round().clamp(-3, 3).add(0.5).bfloat16().to(w.dtype),
    "30%-zeros": lambda w: w.masked_fill(torch.rand(w.shape, generator=generator(5)) < 0.3, 0),
    "30%-negative-zeros": lambda w: w.masked_fill(torch.rand(w.shape, generator=generator(5)) < 0.3, -0.0),
}


@all_combos
@folded("tie", TIES)
def test_ties_change_no_count(combo: Combo, tie: str) -> None:
    for rows, columns in combo.shapes()[:2]:
        weight_RC, drops = TIES[tie](make_weight(rows, columns)), combo.drops(rows, columns)
        for inputs_TC, counts in ((make_inputs(columns), drops[::2]), (torch.eye(columns, dtype=torch.float64), drops[::3])):
            stats = make_stats(combo.needs, inputs_TC)
            for drop in counts:
                check_promises(combo, combo.run(weight_RC, stats, drop), weight_RC, drop, f"[{rows}, {columns}], {drop} dropped")


def dead(columns: int) -> Tensor:
    """Every third column never saw a signal."""
    return torch.arange(columns) % 3 == 1


@all_combos
def test_dead_inputs_change_no_count(combo: Combo) -> None:
    for rows, columns in combo.shapes()[:4]:
        if columns == 1:
            continue
        weight_RC, inputs = make_weight(rows, columns), make_inputs(columns).masked_fill(dead(columns), 0)
        for drop in combo.drops(rows, columns):
            pruned = combo.run(weight_RC, make_stats(combo.needs, inputs), drop)
            check_promises(combo, pruned, weight_RC, drop, f"[{rows}, {columns}], {drop} dropped")


@ranked_by_inputs
def test_weights_of_dead_inputs_go_first(combo: Combo) -> None:
    """Who ranks by what the inputs were lets go of what never met one."""
    if vars(combo.pattern).get("lines") == "row":
        return  # every row meets every input
    unit = combo.pattern.unit
    rows, columns = rounded(16, combo.pattern.tall), 24 * unit
    gone = dead(columns) if combo.pattern.local or unit == 1 else torch.arange(columns) // unit % 3 == 1  # blocks are dead as a whole
    weight_RC, inputs = make_weight(rows, columns), make_inputs(columns).masked_fill(gone, 0)
    drop = combo.pattern.dropped(rows, columns, 0.4)
    keep_RC = combo.run(weight_RC, make_stats(combo.needs, inputs), drop).keep_RC
    share_dead = 1 - keep_RC[:, gone].float().mean().item()
    assert share_dead > drop / weight_RC.numel(), f"{share_dead:.2f} of the dead columns' weights went, {drop / weight_RC.numel():.2f} of all"


@with_free_sparsity
def test_nothing_asked_nothing_changed(combo: Combo) -> None:
    for rows, columns in combo.shapes():
        assert combo.pattern.dropped(rows, columns, 0.0) == 0
        weight_RC = make_weight(rows, columns)
        pruned = combo.run(weight_RC, make_stats(combo.needs, make_inputs(columns)), 0)
        assert bool(pruned.keep_RC.all())
        assert same_bits(pruned.weight_RC, weight_RC)


@all_combos
def test_permuted_rows_commute(combo: Combo) -> None:
    rows, columns = rounded(9, combo.pattern.tall), 24 * combo.pattern.unit
    weight_RC = make_weight(rows, columns, dtype=torch.float64)
    stats = make_stats(combo.needs, make_inputs(columns), torch.float64)
    if combo.criterion and combo.criterion.score(weight_RC, stats).equal(combo.criterion.score(weight_RC.exp(), stats)):
        return  # the scores look at no weight
    tall = combo.pattern.tall  # rows that are decided together stay together
    order_R = torch.arange(rows).view(-1, tall)[torch.randperm(rows // tall, generator=generator(3))].flatten()
    for sparsity in (0.3, 0.5, 0.55):
        drop = combo.pattern.dropped(rows, columns, sparsity)
        straight, permuted = combo.run(weight_RC, stats, drop), combo.run(weight_RC[order_R], stats, drop)
        assert permuted.keep_RC.equal(straight.keep_RC[order_R])
        if stats.gram_CC is None:
            torch.testing.assert_close(permuted.weight_RC, straight.weight_RC[order_R], rtol=1e-10, atol=1e-12)
        else:  # on some processors a product rounds by the place of the row, and what conjugate gradients have not settled yet enlarges it
            change_RC = permuted.weight_RC - straight.weight_RC[order_R]
            assert output_error(change_RC, stats.gram_CC) <= 1e-12 * output_error(weight_RC, stats.gram_CC)


@all_combos
def test_two_calls_agree_to_the_bit(combo: Combo) -> None:
    rows, columns = combo.shapes()[1]
    weight_RC, drop = make_weight(rows, columns), combo.pattern.dropped(rows, columns, 0.5)
    stats = make_stats(combo.needs, make_inputs(columns))
    first, again = combo.run(weight_RC, stats, drop), combo.run(weight_RC, stats, drop)  # the second finds whatever the first left in stats
    afresh = combo.run(weight_RC.clone(), make_stats(combo.needs, make_inputs(columns)), drop)
    for other in (again, afresh):
        assert other.keep_RC.equal(first.keep_RC)
        assert same_bits(other.weight_RC, first.weight_RC)
        assert (other.lost, other.notes) == (first.lost, first.notes)


HARD: dict[str, Callable[[int], Tensor]] = {
    "rank-deficient": lambda c: make_inputs(c, tokens=max(1, c // 4)),
    "one-token": lambda c: make_inputs(c, tokens=1),
    "co-linear": lambda c: make_inputs(c)[:, torch.arange(c) // 2] * (1 + torch.arange(c) % 2),
    "all-columns-equal": lambda c: make_inputs(c)[:, :1].expand(-1, c),
    "gram-1e8": lambda c: 1e4 * make_inputs(c),
    "gram-1e-8": lambda c: 1e-4 * make_inputs(c),
    "one-outlier-1e6": lambda c: make_inputs(c) * torch.where(torch.arange(c) == c // 2, 1e3, 1.0),
    "one-live-input": lambda c: make_inputs(c) * (torch.arange(c) == c // 2),
}


@all_combos
@folded("hard", HARD)
def test_hard_inputs_are_survived(combo: Combo, hard: str) -> None:
    for number, (rows, columns) in enumerate(combo.shapes()[:4]):
        weight_RC, inputs = make_weight(rows, columns), HARD[hard](columns)
        drop = combo.pattern.dropped(rows, columns, (0.3, 0.9)[number % 2])
        pruned = combo.run(weight_RC, make_stats(combo.needs, inputs), drop)
        check_promises(combo, pruned, weight_RC, drop, f"[{rows}, {columns}], {drop} dropped")


def gram_with_lowest_eigenvalue(lowest: float, columns: int) -> Tensor:
    """Mean diagonal 1, one eigenvalue ``lowest``: what rounding makes of a Gram matrix, only more so."""
    basis_CC = torch.linalg.qr(torch.randn(columns, columns, generator=generator(11), dtype=torch.float64)).Q
    values_C = torch.full((columns,), (columns - lowest) / (columns - 1), dtype=torch.float64)
    values_C[-1] = lowest
    return (basis_CC * values_C) @ basis_CC.T


@with_gram
def test_a_damping_retry_is_noted(combo: Combo) -> None:
    rows, columns = rounded(5, combo.pattern.tall), 24 * combo.pattern.unit
    weight_RC, drop = make_weight(rows, columns), combo.pattern.dropped(rows, columns, 0.5)
    stats = make_stats(combo.needs, make_inputs(columns))
    assert combo.run(weight_RC, stats, drop).notes == ()
    stats = make_stats(combo.needs, make_inputs(columns))
    stats.gram_CC = gram_with_lowest_eigenvalue(-0.05, columns).float()
    for _ in range(2):  # the second call finds the factor that the first one left, and must say so too
        pruned = combo.run(weight_RC, stats, drop)
        check_promises(combo, pruned, weight_RC, drop, "indefinite")
        assert len(pruned.notes) == 1
        assert "damping" in pruned.notes[0]


@with_gram
def test_a_hopeless_gram_stops_the_run(combo: Combo) -> None:
    rows, columns = rounded(5, combo.pattern.tall), 24 * combo.pattern.unit
    weight_RC, drop = make_weight(rows, columns), combo.pattern.dropped(rows, columns, 0.5)
    stats = make_stats(combo.needs, make_inputs(columns))
    stats.gram_CC = gram_with_lowest_eigenvalue(-2.0, columns).float()
    with pytest.raises(StoppedError, match="indefinite"):
        combo.run(weight_RC, stats, drop)


@with_gram
@folded("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gram_that_is_not_finite_stops_the_run(combo: Combo, bad: float) -> None:
    rows, columns = rounded(5, combo.pattern.tall), 4 * combo.pattern.unit
    weight_RC, drop = make_weight(rows, columns), combo.pattern.dropped(rows, columns, 0.5)
    stats = make_stats(combo.needs, make_inputs(columns))
    stats.gram_CC[0, -1] = bad
    with pytest.raises(StoppedError, match="not finite") as caught:
        combo.run(weight_RC, stats, drop)
    assert "\n" not in caught.value.message
    assert caught.value.hint
