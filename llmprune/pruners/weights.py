"""Prune the matrices of a block: score, mask, repair."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from llmprune.criteria.magnitude import Magnitude
from llmprune.errors import StoppedError
from llmprune.maths.asymmetric_target import asymmetric_target
from llmprune.maths.linalg import all_finite, drawn_to_mean, few_tokens, notes_of, shrink, squared_error
from llmprune.maths.order import best_order
from llmprune.model.channels import Channels
from llmprune.model.matrices import Matrix
from llmprune.patterns.nm import NM
from llmprune.pruners.units import beside, correct, counts_writers, make_up
from llmprune.results import Row
from llmprune.solvers.mask_only import MaskOnly
from llmprune.statistics.gradient_taps import PER_WEIGHT
from llmprune.statistics.gradients import LossGradients
from llmprune.statistics.norms import norm_scales
from llmprune.statistics.stages import at_head, inner_channels, part_by_part, stage_by_stage
from llmprune.stream.clock import Clock
from llmprune.stream.flow import Flow
from llmprune.stream.hidden import FileHidden, MemoryHidden
from llmprune.stream.stream import Stream
from llmprune.structured.structure import Structure
from llmprune.types import Plan, Pruned, Stats


def prune_block(
    flow: Flow,
    dense: Flow | None,
    index: int,
    block: nn.Module,
    matrices: list[Matrix],
    plan: Plan,
    asked: dict[str, float],
    gradients: LossGradients | None,
    clock: Clock,
    variants: Variants | None = None,
) -> tuple[list[Row], list[str]]:
    """Prune the matrices of a block, all at once or stage by stage towards the dense path's outputs; (rows, names of what else has changed)."""
    name = flow.stream.path_of(index)
    rows = {}
    changed: list[str] = []
    reordered: dict[str, Tensor] = {}
    head = index == len(flow.stream.names)
    channels = inner_channels(flow, index, block, matrices) if plan.permute and not head else {}
    scales = norm_scales(block, matrices, partial(flow.run, index, block, 0)) if "norm_scale" in plan.needs and not head else {}
    found: Generator[tuple[list[Matrix], dict[str, Stats]], None, None]
    if head:
        found = (stage for stage in [(matrices, at_head(flow, dense, block, matrices, plan.needs))])
    elif dense is None:
        found = part_by_part(flow, index, block, matrices, plan.needs, clock)
    else:
        found = stage_by_stage(flow, dense, index, block, matrices, plan, clock, reordered)
    with closing(found):  # forwards that wait end with the block, whatever happens
        for stage, statistics in found:
            clock.lap("forward")
            shrink(statistics.values(), plan.ours)
            others = [m for m in stage if f"{name}.{m.name}" not in asked]
            changed += [correct(flow.stream, index, block, m, statistics.pop(m.name)) for m in others]
            if gradients is not None:
                gradients.add_to(index, statistics)
            for m in sorted(stage, key=lambda m: m.name in channels):  # after those of the stage that may write its channels
                if m in others:
                    continue
                stats, saliency = replace(statistics.pop(m.name), norm_scale_C=scales.get(m.name)), None
                if m.name in channels:
                    stats, saliency, reordered[m.name], moved = reorder(block, channels[m.name], stats, plan)
                    changed += moved
                if variants is not None:
                    store_variants(variants, flow.stream, index, block, m, stats, plan)
                full = f"{name}.{m.name}"
                if isinstance(plan.pattern, Structure) and plan.criterion is not None and counts_writers(plan.criterion):
                    stats = replace(stats, beside_C=beside(plan.pattern, index, block, full, plan.criterion, gradients))
                before_RC = m.view(block).clone() if plan.mean_bias else None
                rows[m.name] = replace(prune_matrix(flow.stream, index, block, m, stats, plan, asked[full]), saliency=saliency)
                if before_RC is not None and rows[m.name].gone:
                    changed.append(make_up(flow.stream, index, block, m, before_RC, stats))
            clock.lap("solve")
    pruned = {m.parameter for m in matrices if m.name in rows}
    return [rows[m.name] for m in matrices if m.name in rows], [c for c in dict.fromkeys(changed) if c not in pruned]


def reorder(block: nn.Module, channels: Channels, stats: Stats, plan: Plan) -> tuple[Stats, tuple[float, float], Tensor, list[str]]:
    """Reorder the input channels of a matrix so that N:M holds more of w^2 ||x||^2; (its sums in that order, the share held before and after, the
    order, what else has changed).
    """
    pattern = plan.pattern
    assert isinstance(pattern, NM)
    weight_RC = channels.reader.view(block).float()
    squares_C = stats.gram_CC.diagonal() if stats.gram_CC is not None else stats.input_sq_C
    score_RC = weight_RC.square() * (1 if squares_C is None or stats.tokens == 0 else squares_C)
    order_SW = best_order(score_RC, channels.columns_SKW, pattern.n, pattern.m)
    order_C = channels.order_C(order_SW)
    held: list[float] = [float((s * pattern.project(s, 0)).sum() / s.sum()) for s in (score_RC, score_RC[:, order_C])]
    if held[1] <= held[0]:  # a sample of the rows may have misled
        return stats, (held[0], held[0]), torch.arange(len(order_C)), []
    changed = channels.apply(block, order_SW)
    return stats.permuted(order_C), (held[0], held[1]), order_C, changed


def prune_matrix(stream: Stream, index: int, block: nn.Module, matrix: Matrix, stats: Stats, plan: Plan, sparsity: float) -> Row:
    """Score, mask and repair one matrix in float32, rounded to the dtype it is stored in."""
    view_RC = matrix.view(block)
    name = f"{stream.path_of(index)}.{matrix.name}"
    pruned = solve_at(view_RC.float(), stats, plan, sparsity, name)
    stored_RC = pruned.weight_RC.to(stream.stored_dtype(index, matrix.parameter))
    if not all_finite(stored_RC):
        raise StoppedError(f"{name}: pruned weights are not finite", "calibrate with other text, or report this")
    view_RC.copy_(stored_RC)
    zeros = int((stored_RC == 0).sum())
    row = Row(name, matrix.rows, matrix.columns, sparsity, zeros, pruned.lost, stats.tokens, pruned.notes)
    return plan.pattern.told(row, pruned.keep_RC) if isinstance(plan.pattern, Structure) else row


def solve_at(weight_RC: Tensor, stats: Stats, plan: Plan, ratio: float, name: str) -> Pruned:
    """Apply the plan's method to one matrix that gives up ``ratio``."""
    plan = replace(plan, pattern=plan.pattern.at(ratio, name))
    rows, columns = weight_RC.shape
    return solve(weight_RC, stats, plan, plan.pattern.dropped(rows, columns, ratio))


@dataclass(frozen=True)
class Variants:
    """Matrices as the plan's method leaves them at some more ratios; ``found`` holds (matrix, step) -> weights, in the stored dtype."""

    ratios: dict[str, dict[int, float]]  # matrix -> step -> ratio
    found: MemoryHidden | FileHidden


def store_variants(variants: Variants, stream: Stream, index: int, block: nn.Module, matrix: Matrix, stats: Stats, plan: Plan) -> None:
    name = f"{stream.path_of(index)}.{matrix.name}"
    weight_RC, dtype = matrix.view(block).float(), stream.stored_dtype(index, matrix.parameter)
    for step, ratio in variants.ratios.get(name, {}).items():
        variants.found[name, step] = solve_at(weight_RC, stats, plan, ratio, name).weight_RC.to(dtype, copy=True)


def weighed(stats: Stats, plan: Plan) -> Stats:
    """With the weights of the rows, sqrt(E g_r^2) of their outputs, if the plan asks for them and any gradient reached the matrix."""
    if not plan.fisher_rows or stats.grad_out_sq_R is None or not bool(stats.grad_out_sq_R.any()):
        return stats
    return replace(stats, row_weight_R=(stats.grad_out_sq_R / stats.grad_tokens).sqrt())


def solve(weight_RC: Tensor, stats: Stats, plan: Plan, drop: int) -> Pruned:
    """Apply the plan's method to one matrix. One that few tokens reached (an expert, perhaps) is ranked and repaired with less trust in them; one
    that none reached by magnitude. Both are noted.
    """
    if drop == 0:
        return Pruned(weight_RC, torch.ones_like(weight_RC, dtype=torch.bool), 0.0)
    if (plan.needs and stats.tokens == 0) or (plan.needs & PER_WEIGHT and stats.grad_tokens == 0):
        score_RC = Magnitude().score(weight_RC, stats)
        pruned = MaskOnly().solve(weight_RC, score_RC, stats, plan.pattern, drop)
        return Pruned(pruned.weight_RC, pruned.keep_RC, None, ("no calibration token reached it: ranked by magnitude",))
    if plan.asymmetric:
        weight_RC = asymmetric_target(weight_RC, stats)
    stats, dead, columns = weighed(stats, plan), dead_inputs(stats), weight_RC.shape[1]
    few = few_tokens(columns, stats.tokens, plan.ours)
    if stats.input_sq_C is not None and few:
        stats = replace(stats, input_sq_C=drawn_to_mean(stats.input_sq_C, stats.tokens))
    score = plan.criterion.score(weight_RC, stats) if plan.criterion else None
    if score is not None and stats.beside_C is not None:
        score = score + stats.beside_C / len(score)
    pruned = plan.solver.solve(weight_RC, score, stats, plan.pattern, drop)
    notes = pruned.notes + notes_of(stats) + dead
    if few and plan.needs & {"gram", "input_sq"}:
        so = f"correlations divided by {1 + stats.shrunk:.3g}" if "gram" in plan.needs else "norms drawn to their mean"
        notes += (f"{stats.tokens} calibration tokens for {columns} inputs: {so}",)
    lost = pruned.lost
    if lost is not None and stats.shrunk:  # what the solver counted has the larger diagonal
        lost = squared_error(pruned.weight_RC - weight_RC, stats)
    if "norm_scale" in plan.needs and stats.norm_scale_C is None:
        notes += ("no norm of its block feeds it: ranked by magnitude",)
    return Pruned(pruned.weight_RC, pruned.keep_RC, lost, notes)


def dead_inputs(stats: Stats) -> tuple[str, ...]:
    squares_C = stats.input_sq_C if stats.input_sq_C is not None else stats.gram_CC.diagonal() if stats.gram_CC is not None else None
    dead = 0 if squares_C is None else int((squares_C == 0).sum())
    return (f"{dead} dead inputs",) if dead else ()
