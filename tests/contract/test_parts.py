"""Promises of criteria, patterns and allocations on their own. Methods are found by name: see cases.py."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from folded import folded
from torch import Tensor

from contract.cases import (
    ALLOCATIONS,
    COMBOS,
    CRITERIA,
    PATTERNS,
    SHAPES,
    SOLVERS,
    SPARSITIES,
    Made,
    each,
    fixed,
    generator,
    make_inputs,
    make_stats,
    make_weight,
    rounded,
    same_bits,
    tensors_of,
    units_only,
)
from llmprune.errors import RequestError
from llmprune.methods import KINDS, build, document, names, trait
from llmprune.recipe.named import METHODS
from llmprune.types import Pattern, Seen, Stats

all_criteria = pytest.mark.parametrize("made", each(CRITERIA))
all_patterns = pytest.mark.parametrize("made", each(PATTERNS))
all_allocations = pytest.mark.parametrize("made", each([made for made in ALLOCATIONS if not trait(made.method, "tried")]))


def test_the_suite_sees_every_method() -> None:
    seen = {"criteria": CRITERIA, "patterns": PATTERNS, "solvers": SOLVERS, "allocation": ALLOCATIONS}
    for kind in KINDS:
        assert names(kind), kind
        assert {made.id.split("[")[0] for made in seen[kind]} == set(names(kind))
    in_combos = {type(p) for c in COMBOS for p in (c.criterion, c.pattern, c.solver) if p is not None}
    everything = [made.method for kind in ("criteria", "patterns", "solvers") for made in seen[kind]]
    assert in_combos == {type(method) for method in everything if not units_only(method)}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in names(kind)])
def test_a_method_is_a_frozen_dataclass_whose_file_names_its_source(kind: str, name: str) -> None:
    method = build(kind, name)
    assert type(method).__dataclass_params__.frozen
    assert build(kind, name) == method
    text = document(kind, name)
    assert text, "the first lines say what it is"
    with pytest.raises(RequestError):
        build(kind, name, no_such_option=1)
    if kind in ("criteria", "solvers"):
        assert isinstance(method.needs, frozenset)


def test_recipes_of_papers_name_methods_that_exist() -> None:
    for name, method in METHODS.items():
        solver = build("solvers", method.solver)
        assert solver.own_score == (method.criterion is None), name
        if method.criterion is not None:
            build("criteria", method.criterion)
        build("patterns", "unstructured", group=method.group)


@folded("dtype", [torch.float32, torch.float64])
@all_criteria
def test_scores_are_numbers_of_the_weights_shape_and_dtype(made: Made, dtype: torch.dtype) -> None:
    for rows, columns in SHAPES:
        weight_RC = make_weight(rows, columns, dtype=dtype)
        weight_RC.view(-1)[::3] = 0
        stats = make_stats(made.method.needs, make_inputs(columns).masked_fill(torch.arange(columns) % 5 == 1, 0), dtype)
        before = [weight_RC.clone(), *(t.clone() for t in tensors_of(stats).values())]
        score_RC = made.method.score(weight_RC, stats)
        assert score_RC.shape == weight_RC.shape
        assert score_RC.dtype == dtype
        assert not bool(score_RC.isnan().any())
        assert all(same_bits(b, a) for b, a in zip(before, [weight_RC, *tensors_of(stats).values()], strict=True))
        assert same_bits(score_RC, made.method.score(weight_RC, stats))


def scores_like(rows: int, columns: int) -> dict[str, Tensor]:
    g = generator(rows * 1000 + columns)
    plain = torch.rand(rows, columns, generator=g)
    return {
        "plain": plain,
        "equal": torch.ones(rows, columns),
        "few": (plain * 3).floor(),
        "half-infinite": plain.masked_fill(plain > 0.5, torch.inf),
        "infinite": torch.full((rows, columns), torch.inf),
        "negative": plain - 0.5,
        "minus-infinite": plain.masked_fill(plain > 0.5, -torch.inf),
        "signed-zeros": torch.where(plain > 0.5, 0.0, -0.0),
    }


def step(pattern: Pattern, rows: int, columns: int) -> int:
    """How many weights a pattern decides together: no count that it gives lies between two multiples of this."""
    return math.gcd(*(pattern.dropped(rows, columns, i / 97) for i in range(98)))


@all_patterns
def test_a_pattern_lets_go_of_exactly_what_is_asked(made: Made) -> None:
    pattern = made.method
    for rows, columns in SHAPES:
        rows, columns = rounded(rows, pattern.tall), rounded(columns, pattern.unit)
        size = rows * columns
        for kind, score_RC in scores_like(rows, columns).items():
            before_RC = score_RC.clone()
            for sparsity in SPARSITIES if fixed(pattern) else [0.0, *SPARSITIES, 1.0]:
                drop = pattern.dropped(rows, columns, sparsity)
                wanted = pattern.sparsity if fixed(pattern) else sparsity
                assert type(drop) is int
                assert abs(drop - wanted * size) <= (0.0 if fixed(pattern) else step(pattern, rows, columns) / 2) + 1e-9 * size
                keep_RC = pattern.project(score_RC, drop)
                assert keep_RC.dtype == torch.bool
                assert keep_RC.shape == score_RC.shape
                assert int((~keep_RC).sum()) == drop, f"{kind} [{rows}, {columns}], {drop} asked"
            assert same_bits(score_RC, before_RC)


@all_patterns
def test_a_pattern_looks_at_the_order_of_scores(made: Made) -> None:
    """Doubling all scores changes nothing; a dropped weight that scores even less stays dropped; a kept one that scores more stays kept."""
    pattern = made.method
    rows, columns = rounded(6, pattern.tall), 6 * pattern.unit
    score_RC = torch.rand(rows, columns, generator=generator(4)) + 0.1
    for sparsity in (0.3, 0.5, 0.75):
        drop = pattern.dropped(rows, columns, sparsity)
        keep_RC = pattern.project(score_RC, drop)
        assert pattern.project(score_RC * 2, drop).equal(keep_RC)
        assert not bool(pattern.project(torch.where(keep_RC, score_RC, score_RC / 2), drop)[~keep_RC].any())
        for r, c in ((0, 0), (2, 3), (5, columns - 1)):
            moved_RC = score_RC.clone()
            moved_RC[r, c] = score_RC[r, c] * 4 if keep_RC[r, c] else 0.0
            assert pattern.project(moved_RC, drop)[r, c] == keep_RC[r, c]


@all_patterns
def test_of_equal_scores_the_same_go_every_time(made: Made) -> None:
    """Ties by position: equal scores end up the same whatever their common value, and the first go before the last."""
    pattern = made.method
    rows, columns = rounded(5, pattern.tall), 12 * pattern.unit
    drop = pattern.dropped(rows, columns, 0.3)
    keeps = [pattern.project(torch.full((rows, columns), value), drop) for value in (0.0, 1.0, 1e30)]
    assert keeps[0].equal(keeps[1])
    assert keeps[0].equal(keeps[2])
    assert not bool(keeps[0][0, 0])
    assert bool(keeps[0][-1, -1])


SIZES = [{"a": 64}, {"a": 64, "b": 4096, "c": 172 * 64, "d": 1}, {f"block.{i}.{m}": 256 * (i + 1) for i in range(5) for m in "qkvo"}]


def shared(made: Made, sizes: dict[str, int], sparsity: float, silent: str = "") -> dict[str, float]:
    """What an allocation makes of random matrices [R, C] of these sizes and random statistics of them; no token reached ``silent``."""
    measured = {}
    for k, (name, size) in enumerate(sorted(sizes.items())):
        rows = next(r for r in (16, 4, 1) if size % r == 0)
        weight_RC = make_weight(rows, size // rows, seed=k) * (1 + k)
        random = torch.rand(rows + size // rows, generator=generator(k)) + 0.1
        gram_CC = random[rows:].outer(random[rows:]) + random[rows:].diag()
        stats = Stats(tokens=8, grad_tokens=8, input_sq_C=random[rows:], input_sum_C=random[rows:] / 4, gram_CC=gram_CC, grad_out_sq_R=random[:rows])
        stats = Stats() if name == silent else stats
        score_RC = weight_RC.abs() if made.method.scored and name != silent else None
        measured[name] = made.method.measure(Seen(weight_RC, stats, score_RC, lambda ratio, weight_RC=weight_RC: weight_RC * (1 - ratio)))
    in_order = {name: measured[name] for name in sizes}
    ratios, reasons = made.method.share(in_order, sizes, {name: name.rpartition(".")[0] for name in sizes}, sparsity)
    assert reasons.keys() <= sizes.keys()
    return ratios


@folded("silent", ["", "a", "block.0.q"])
@folded("sizes", SIZES)
@all_allocations
def test_an_allocation_spends_the_budget(made: Made, sizes: dict[str, int], silent: str) -> None:
    before = dict(sizes)
    for sparsity in (0.0, *SPARSITIES):
        ratios = shared(made, sizes, sparsity, silent)
        assert list(ratios) == list(sizes)
        assert all(0 <= ratio < 1 for ratio in ratios.values())
        spent = sum(ratios[name] * size for name, size in sizes.items())
        assert abs(spent - sparsity * sum(sizes.values())) < 1
        assert shared(made, sizes, sparsity, silent) == ratios
        if sparsity == 0:
            assert max(ratios.values()) < 1e-9
    assert sizes == before


@all_allocations
def test_an_allocation_does_not_depend_on_names_order(made: Made) -> None:
    straight = shared(made, SIZES[2], 0.5)
    turned = shared(made, dict(reversed(SIZES[2].items())), 0.5)
    assert turned == pytest.approx(straight)


def test_variants_are_built_from_literal_fields() -> None:
    """The suite's own finder: a pattern with a Literal field is there in each of its values."""
    groups = [dataclasses.asdict(made.method).get("group") for made in PATTERNS]
    assert {"row", "matrix"} <= set(groups)
