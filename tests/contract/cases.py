"""Every method that exists, found by name, in all its variants; and small inputs to hold it to.

A method is made with each value of its Literal fields; a pattern with fields ``n`` and ``m`` with the N:M pairs below, one with
``height`` and ``width`` with the blocks. Nothing here knows a method's name. Everything of a new file is found by itself, and so is a
new statistic; one that has to agree with others is taught to ``make_stats``.

Shapes: R = output rows, C = input columns, T = tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from folded import Case, Test, without
from torch import Tensor

from llmprune.maths.linalg import notes_of
from llmprune.methods import build, names, trait
from llmprune.types import STATISTICS, Criterion, Pattern, Pruned, Solver, Stats, shape_of

BLOCKS = [(1, 4), (4, 4), (2, 3)]
PAIRS = [(1, 4), (2, 4), (4, 8), (3, 6), (1, 3), (7, 8), (2, 16)]
SHAPES = [(7, 13), (5, 172), (1, 24), (9, 4), (1, 1)]  # columns are rounded up to the pattern's unit
SPARSITIES = [0.001, 0.01, 0.3, 0.5, 0.7, 0.99, 0.999]


@dataclass(frozen=True)
class Made:
    """A method in one variant, under the name that a failure shows."""

    id: str
    method: Any


@dataclass(frozen=True)
class Combo:
    """What a plan holds for one matrix."""

    id: str
    criterion: Criterion | None
    pattern: Pattern
    solver: Solver

    @property
    def needs(self) -> frozenset[str]:
        return self.solver.needs | (self.criterion.needs if self.criterion else frozenset())

    def run(self, weight_RC: Tensor, stats: Stats, drop: int) -> Pruned:
        score_RC = self.criterion.score(weight_RC, stats) if self.criterion else None
        pruned = self.solver.solve(weight_RC, score_RC, stats, self.pattern, drop)
        return dataclasses.replace(pruned, notes=pruned.notes + notes_of(stats))

    def shapes(self) -> list[tuple[int, int]]:
        return list(dict.fromkeys((rounded(rows, self.pattern.tall), rounded(columns, self.pattern.unit)) for rows, columns in SHAPES))

    def drops(self, rows: int, columns: int) -> list[int]:
        """The distinct counts that the sparsities ask of a shape."""
        return sorted({self.pattern.dropped(rows, columns, s) for s in SPARSITIES})


def rounded(size: int, unit: int) -> int:
    """The next multiple."""
    return -(-size // unit) * unit


def made(kind: str) -> list[Made]:
    return [variant for name in names(kind) for variant in _variants(kind, name)]


def _variants(kind: str, name: str) -> list[Made]:
    cls = type(build(kind, name))
    hints = get_type_hints(cls)
    free = {f.name: get_args(hints[f.name]) for f in dataclasses.fields(cls) if get_origin(hints[f.name]) is Literal}
    choices: list[dict[str, Any]] = [dict(zip(free, values, strict=True)) for values in itertools.product(*free.values())]
    if {"n", "m"} <= hints.keys():
        choices = [{**c, "n": n, "m": m} for c in choices for n, m in PAIRS]
    if {"height", "width"} <= hints.keys():
        choices = [{**c, "height": h, "width": w} for c in choices for h, w in BLOCKS]
    return [Made(f"{name}[{','.join(map(str, c.values()))}]" if c else name, build(kind, name, **c)) for c in choices]


def units_only(method: Any) -> bool:
    """Whether a method is for the units of structured patterns alone."""
    return method is not None and bool(trait(method, "units_only"))


CRITERIA = made("criteria")
PATTERNS = made("patterns")
SOLVERS = made("solvers")
ALLOCATIONS = made("allocation")
NOBODY = [Made("", None)]
COMBOS = [
    Combo("+".join(part.id for part in (criterion, pattern, solver) if part.id), criterion.method, pattern.method, solver.method)
    for solver in SOLVERS
    if not units_only(solver.method)  # those are held to their promises in test_structured_math
    for criterion in (NOBODY if solver.method.own_score else CRITERIA)
    if not units_only(criterion.method)
    for pattern in PATTERNS
    if trait(pattern.method, "in_slabs") or not trait(solver.method, "by_slab")  # lines are cut by slabs: the recipe refuses it
    # a criterion ranks alike under any N:M and any block, so the rarer ones are tried with one criterion
    if criterion in (*NOBODY, CRITERIA[0]) or pattern.id in ("nm[2,4]", "nm[3,6]", "block[2,3]") or not pattern.id.startswith(("nm", "block"))
]


def fixed(pattern: Pattern) -> bool:
    """Whether the pattern alone says how much goes, as N:M does."""
    return bool(trait(pattern, "fixes_ratio"))


def each(things: list[Any]) -> list[Any]:
    return [pytest.param(t, id=t.id) for t in things]


def rare(combo: Combo) -> bool:
    """Whether a combo waits for the slow tests: a solver repairs alike whichever criterion has chosen, so blocks and lines are repaired after one."""
    repairs = combo.criterion is not None and bool(combo.solver.needs)
    return repairs and combo.criterion != CRITERIA[0].method and combo.id.split("+")[1].startswith(("block", "vector"))


def every(combos: list[Combo]) -> Callable[[Test], Test]:
    """Call the test for each; combos that differ in nothing but the pattern's variant (N and M, block, group) are folded into one test."""
    families: dict[str, list[Combo]] = {}
    for combo in combos:
        families.setdefault(re.sub(r"\[[^]]*\]", "", combo.id), []).append(combo)

    def fold(test: Test) -> Test:
        @functools.wraps(test)
        def run(family: list[Combo], **given: Any) -> None:
            for combo in family:
                with Case(combo.id):
                    test(combo=combo, **given)

        cases = [pytest.param(family, id=name, marks=[pytest.mark.slow] * rare(family[0])) for name, family in families.items()]
        return pytest.mark.parametrize("family", cases)(without(run, test, "combo", instead=("family",)))

    return fold


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_weight(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights without zeros and, but for accidents, without ties."""
    weight_RC = torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)
    assert bool((weight_RC != 0).all())
    return weight_RC.to(dtype)


def make_inputs(columns: int, seed: int = 1, tokens: int | None = None) -> Tensor:
    """Correlated inputs of unlike scales, in float64."""
    tokens = 2 * columns + 16 if tokens is None else tokens
    g = generator(seed)
    value_TC = torch.randn(tokens, columns, generator=g, dtype=torch.float64)
    value_TC += 0.5 * value_TC.roll(1, dims=1) + 0.5 * torch.randn(tokens, 1, generator=g, dtype=torch.float64)
    return value_TC * (0.25 + 2 * torch.rand(columns, generator=g, dtype=torch.float64))


def make_stats(needs: frozenset[str], value_TC: Tensor, dtype: torch.dtype = torch.float32) -> Stats:
    """Just the statistics that were asked for, so that one used without being declared is missed at once.

    Gradients have one row for all rows of the weights, whose number is not known here: so rows may be permuted without them.
    """
    grad_TC = value_TC * torch.randn(len(value_TC), 1, generator=generator(2), dtype=torch.float64)  # of a loss that one token has
    windows = grad_TC.split(4)
    makers = {
        "input_sq": lambda: {"input_sq_C": value_TC.square().sum(0).to(dtype)},
        "input_sum": lambda: {"input_sum_C": value_TC.sum(0).to(dtype)},
        "norm_scale": lambda: {"norm_scale_C": value_TC.square().mean(0).sqrt().to(dtype)},
        "gram": lambda: {"gram_CC": (value_TC.T @ value_TC).to(dtype)},
        "grad": lambda: {"grad_RC": grad_TC.sum(0, keepdim=True).to(dtype)},
        "grad_sq": lambda: {"grad_sq_RC": sum(w.sum(0, keepdim=True).square() for w in windows).to(dtype)},
        "first_grad": lambda: {"first_grad_RC": windows[0].sum(0, keepdim=True).to(dtype)},
        "grad_out_sq": lambda: {"grad_out_sq_R": (grad_TC / value_TC.norm()).square().sum().reshape(1).to(dtype)},
    }
    fields: dict[str, Tensor] = {}
    for need in sorted(needs):
        fields |= makers[need]() if need in makers else made_up(STATISTICS[need].name, value_TC.shape[1], dtype)
    counts = {"grad_tokens": len(value_TC), "grad_windows": len(windows)} if any("grad" in need for need in needs) else {}
    return Stats(tokens=value_TC.shape[0], **fields, **counts)


def made_up(name: str, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A statistic that does not have to go with the others: positive, of the shape that its name ends in."""
    sizes = {"R": 1, "C": columns, "B": 1, "Q": 1}
    value = 0.1 + torch.rand([sizes[letter] for letter in shape_of(name)], generator=generator(3), dtype=torch.float64)
    return {name: (value @ value.T if shape_of(name) == "CC" else value).to(dtype)}


def tensors_of(stats: Stats) -> dict[str, Tensor]:
    found = {f.name: getattr(stats, f.name) for f in dataclasses.fields(stats)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return left.contiguous().view(torch.uint8).equal(right.contiguous().view(torch.uint8)) if left.numel() else True


def check_promises(combo: Combo, pruned: Pruned, weight_RC: Tensor, drop: int, where: str) -> None:
    """What holds for every result: exact count, +0.0 where dropped, finite, the dtype and shape of the weight, groups of N:M."""
    keep_RC, out_RC = pruned.keep_RC, pruned.weight_RC
    assert keep_RC.dtype == torch.bool, where
    assert keep_RC.shape == weight_RC.shape == out_RC.shape, where
    assert out_RC.dtype == weight_RC.dtype, where
    assert int((~keep_RC).sum()) == drop, where
    assert bool((out_RC[~keep_RC] == 0).all()), where
    assert not bool(out_RC[~keep_RC].signbit().any()), f"{where}: -0.0"
    assert bool(torch.isfinite(out_RC).all()), where
    if hasattr(combo.pattern, "n") and hasattr(combo.pattern, "m"):
        gone = (~keep_RC).reshape(weight_RC.shape[0], -1, combo.pattern.m).sum(-1)
        assert bool((gone == combo.pattern.m - combo.pattern.n).all()), where
    if pruned.lost is not None:
        assert pruned.lost >= 0, where
        assert pruned.lost < float("inf"), where
