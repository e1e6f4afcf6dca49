"""One matrix: scored, masked and repaired; or only corrected towards the dense path's outputs.

Shapes: R = output rows, C = input columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmprune.criteria.magnitude import Magnitude
from llmprune.errors import StoppedError
from llmprune.maths.asymmetric_target import asymmetric_target
from llmprune.maths.linalg import all_finite, drawn_to_mean, few_tokens, notes_of, squared_error
from llmprune.maths.runs import runs_of
from llmprune.model.matrices import Matrix
from llmprune.pruners.plan import Plan
from llmprune.results import Row
from llmprune.solvers.mask_only import MaskOnly
from llmprune.statistics.gradient_taps import PER_WEIGHT
from llmprune.stream.stream import Stream
from llmprune.types import Pattern, Pruned, Stats

SPARSE = 0.01  # share of zeros from which a matrix counts as sparse


def prune_matrix(stream: Stream, index: int, block: nn.Module, matrix: Matrix, stats: Stats, plan: Plan, sparsity: float) -> Row:
    """Score, mask and repair one matrix in float32, rounded to the dtype it is stored in."""
    view_RC = matrix.view(block)
    name = f"{stream.path_of(index)}.{matrix.name}"
    pruned = solve_at(view_RC.float(), stats, plan, sparsity, name)
    stored_RC = pruned.weight_RC.to(stream.stored_dtype(index, matrix.parameter))
    if not all_finite(stored_RC):
        raise StoppedError(f"{name}: pruned weights are not finite", "calibrate with other text, or report this")
    lost_zeros = filled(view_RC, stored_RC)
    view_RC.copy_(stored_RC)
    zeros = int((stored_RC == 0).sum())
    notes = pruned.notes + notes_on_filled(lost_zeros, stored_RC.numel())
    row = Row(name, matrix.rows, matrix.columns, sparsity, zeros, pruned.lost, stats.tokens, notes)
    if plan.structure is not None:
        return plan.structure.with_units(row, pruned.keep_RC)
    return replace(row, kept_zeros=runs_of((stored_RC == 0) & pruned.keep_RC))


def correct(stream: Stream, index: int, block: nn.Module, matrix: Matrix, stats: Stats) -> int:
    """Correct a matrix that is not pruned towards the dense path's outputs; how many of its zeros were filled."""
    if not stats.tokens:
        return 0
    view_RC = matrix.view(block)
    corrected_RC = asymmetric_target(view_RC.float(), stats).to(stream.stored_dtype(index, matrix.parameter))
    lost_zeros = filled(view_RC, corrected_RC)
    view_RC.copy_(corrected_RC)
    return lost_zeros


def filled(before_RC: Tensor, after_RC: Tensor) -> int:
    """Zeros that are none any more, in rows that were not all zeros: those are dropped channels, which are masked again."""
    zeros_RC = (before_RC == 0) & (after_RC != 0)
    return int((zeros_RC & (before_RC != 0).any(1, keepdim=True)).sum())


def notes_on_filled(zeros: int, weights: int) -> tuple[str, ...]:
    """Of a source that was sparse: that it is less so. weights: of which the zeros were a part; a few in dense matrices are chance."""
    said = f"{zeros:,} zeros were filled by the repair; --target symmetric, with --solver mask_only where there is a solver, keeps them"
    return (said,) if zeros > SPARSE * weights else ()


def with_notes(rows: Sequence[Row], notes: tuple[str, ...]) -> list[Row]:
    """Rows of a block whose first has further notes, about matrices that have no row."""
    return [replace(row, notes=row.notes + notes * (place == 0)) for place, row in enumerate(rows)]


def solve_at(weight_RC: Tensor, stats: Stats, plan: Plan, ratio: float, name: str) -> Pruned:
    """Apply the plan's method to one matrix, by its full name, at a ratio."""
    rows, columns = weight_RC.shape
    pattern = plan.pattern_of(name, ratio)
    return solve(weight_RC, stats, plan, pattern, pattern.dropped(rows, columns, ratio))


def solve(weight_RC: Tensor, stats: Stats, plan: Plan, pattern: Pattern, drop: int) -> Pruned:
    """Drop ``drop`` weights of one matrix by the plan's method. One that few tokens reached (an expert, perhaps) is ranked and repaired with less
    trust in them; one that none reached by magnitude. Both are noted.
    """
    if drop == 0:
        return Pruned(weight_RC, torch.ones_like(weight_RC, dtype=torch.bool), 0.0)
    if unreached(plan, stats):
        score_RC = Magnitude().score(weight_RC, stats)
        pruned = MaskOnly().solve(weight_RC, score_RC, stats, pattern, drop)
        return Pruned(pruned.weight_RC, pruned.keep_RC, None, ("no calibration token reached it: ranked by magnitude",))
    if plan.asymmetric:
        weight_RC = asymmetric_target(weight_RC, stats)
    dead, few = dead_inputs(stats), few_tokens(weight_RC.shape[1], stats.tokens, plan.ours)
    stats = trusted(stats, few)
    pruned = plan.solver.solve(weight_RC, scored(weight_RC, stats, plan), stats, pattern, drop)
    lost = pruned.lost
    if lost is not None and stats.shrunk:  # the solver's own figure includes the enlarged diagonal
        lost = squared_error(pruned.weight_RC - weight_RC, stats)
    notes = pruned.notes + notes_of(stats) + dead + notes_on_trust(weight_RC.shape[1], stats, plan, few)
    return Pruned(pruned.weight_RC, pruned.keep_RC, lost, notes)


def unreached(plan: Plan, stats: Stats) -> bool:
    """Whether no token reached the matrix, so that the plan's statistics are missing."""
    return bool(plan.needs and stats.tokens == 0) or bool(plan.needs & PER_WEIGHT and stats.grad_tokens == 0)


def trusted(stats: Stats, few: bool) -> Stats:
    """Norms of few tokens, shrunk towards their mean."""
    if stats.input_sq_C is None or not few:
        return stats
    return replace(stats, input_sq_C=drawn_to_mean(stats.input_sq_C, stats.tokens))


def scored(weight_RC: Tensor, stats: Stats, plan: Plan) -> Tensor | None:
    """[R, C] by the criterion, plus the scores of the writers of each column; None where the solver ranks by itself."""
    score_RC = plan.criterion.score(weight_RC, stats) if plan.criterion else None
    if score_RC is not None and stats.beside_C is not None:
        score_RC = score_RC + stats.beside_C / len(score_RC)
    return score_RC


def dead_inputs(stats: Stats) -> tuple[str, ...]:
    squares_C = stats.input_sq_C if stats.input_sq_C is not None else stats.gram_CC.diagonal() if stats.gram_CC is not None else None
    dead = 0 if squares_C is None else int((squares_C == 0).sum())
    return (f"{dead} dead inputs",) if dead else ()


def notes_on_trust(columns: int, stats: Stats, plan: Plan, few: bool) -> tuple[str, ...]:
    notes: tuple[str, ...] = ()
    if few and plan.needs & {"gram", "input_sq"}:
        so = f"correlations divided by {1 + stats.shrunk:.3g}" if "gram" in plan.needs else "norms shrunk to their mean"
        notes += (f"{stats.tokens} calibration tokens for {columns} inputs: {so}",)
    if plan.asymmetric and stats.several:
        notes += ("it has several inputs in one forward: repaired towards its own outputs, not the dense path's",)
    if "norm_scale" in plan.needs and stats.norm_scale_C is None:
        notes += ("no norm of its block feeds it: ranked by magnitude",)
    return notes
