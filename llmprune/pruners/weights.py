"""Zeros in the matrices of a block, and in the head after the last one: unstructured, N:M, blocks, rows, columns.

Shapes: R = output rows, C = input columns.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from llmprune.maths.linalg import shrink
from llmprune.maths.order import best_order
from llmprune.model.channels import Channels
from llmprune.model.matrices import Matrix
from llmprune.patterns.nm import NM
from llmprune.pruners.block_pruner import InPlacePruner, PrunedBlock, run_again, run_head_again
from llmprune.pruners.distillation import polish
from llmprune.pruners.matrix import prune_matrix, solve_at
from llmprune.pruners.plan import Plan
from llmprune.pruners.reconstruction import reconstruct_block
from llmprune.results import Row
from llmprune.statistics.gradients import LossGradients
from llmprune.statistics.norms import norm_scales
from llmprune.statistics.stages import at_head, inner_channels, part_by_part, stage_by_stage
from llmprune.stream.clock import Clock
from llmprune.stream.flow import Flow
from llmprune.stream.hidden_states import FileHidden, MemoryHidden
from llmprune.stream.stream import Stream
from llmprune.types import Listener, Stats

Stages = Generator[tuple[list[Matrix], dict[str, Stats]], None, None]


@dataclass(frozen=True)
class Variants:
    """Matrices as the plan's method prunes them at further ratios; ``found`` holds (matrix, step) -> weights, in the stored dtype."""

    ratios: dict[str, dict[int, float]]  # matrix -> step -> ratio
    found: MemoryHidden | FileHidden


@dataclass(frozen=True)
class WeightPruner(InPlacePruner):
    """Drops single weights or groups of them.

    matrices: of each block, and of the head, that are pruned. asked: the ratio of each, by full name. gradients: of the dense model, where the plan
    asks for some. variants: further ratios at which each matrix is pruned on the side.
    """

    plan: Plan
    matrices: dict[int, list[Matrix]]
    asked: dict[str, float]
    gradients: LossGradients | None = None
    variants: Variants | None = None

    def prune(self, flow: Flow, dense: Flow | None, index: int, block: nn.Module, clock: Clock) -> PrunedBlock:
        matrices, head = self.matrices[index], index == len(flow.stream.names)
        aim = aim_of(self.plan, dense, index, block)
        unpruned_VD = block.get_parameter("weight").clone() if head else None
        rows, changed = self._by_stages(flow, aim, index, block, clock)
        if self.plan.reconstruct is not None and not head:
            rows, trained = reconstruct_block(flow, aim, index, block, matrices, rows, self.plan, self.gradients)
            changed += trained
            clock.lap("solve")
        stored = list(dict.fromkeys([m.parameter for m in matrices] + changed))
        others = stored[len({m.parameter for m in matrices}) :]
        outputs = run_again(flow, aim, index, block) if unpruned_VD is None else run_head_again(flow, aim or flow, block, unpruned_VD)
        return PrunedBlock(rows, stored, others, outputs)

    def finish(self, dense: Flow | None, listen: Listener) -> None:
        if dense is not None and self.plan.polish_steps:
            polish(dense, self.matrices, self.plan, listen)

    def _by_stages(self, flow: Flow, aim: Flow | None, index: int, block: nn.Module, clock: Clock) -> tuple[list[Row], list[str]]:
        """(a row for each matrix, names of other changed parameters)."""
        matrices, inner = self.matrices[index], index < len(flow.stream.names)
        rows: dict[str, Row] = {}
        changed: list[str] = []
        reordered: dict[str, Tensor] = {}
        channels = inner_channels(flow, index, block, matrices) if self.plan.permute and inner else {}
        with closing(stages_of(flow, aim, index, block, matrices, self.plan, clock, reordered)) as stages:
            for stage, statistics in stages:
                if self.gradients is not None:
                    self.gradients.add_to(index, statistics)
                for m in sorted(stage, key=lambda m: m.name in channels):  # after those of the stage that may write their channels
                    stats, saliency = statistics.pop(m.name), None
                    if m.name in channels:
                        stats, saliency, reordered[m.name], moved = reorder(block, channels[m.name], stats, self.plan)
                        changed += moved
                        rows |= {w.name: where_unknown(rows[w.name]) for w in matrices if w.parameter in moved and w.name in rows}
                    row = self._prune_matrix(flow.stream, index, block, m, stats)
                    rows[m.name] = replace(row, saliency=saliency)
                clock.lap("solve")
        return [rows[m.name] for m in matrices], changed

    def _prune_matrix(self, stream: Stream, index: int, block: nn.Module, matrix: Matrix, stats: Stats) -> Row:
        name = f"{stream.path_of(index)}.{matrix.name}"
        if self.variants is not None:
            weight_RC, dtype = matrix.view(block).float(), stream.stored_dtype(index, matrix.parameter)
            for step, ratio in self.variants.ratios.get(name, {}).items():
                self.variants.found[name, step] = solve_at(weight_RC, stats, self.plan, ratio, name).weight_RC.to(dtype, copy=True)
        return prune_matrix(stream, index, block, matrix, stats, self.plan, self.asked[name])


def where_unknown(row: Row) -> Row:
    """Of a matrix whose rows have moved since: the places of its kept zeros are no longer the recorded ones."""
    return replace(row, kept_zeros=None) if row.kept_zeros else row


def aim_of(plan: Plan, dense: Flow | None, index: int, block: nn.Module) -> Flow | None:
    """The flow whose outputs the block is pruned towards. Where the dense path is only needed at the end, it runs through the block at once."""
    if dense is None or plan.asymmetric:
        return dense
    dense.through(index, block)
    return None


def stages_of(
    flow: Flow,
    aim: Flow | None,
    index: int,
    block: nn.Module,
    matrices: list[Matrix],
    plan: Plan,
    clock: Clock,
    reordered: dict[str, Tensor],
) -> Stages:
    """(matrices, their statistics) of a block, all at once or stage by stage towards the dense path's outputs. Close it: paused forwards must
    end with the block, whatever happens.
    """
    found: Stages
    head = index == len(flow.stream.names)
    scales = norm_scales(block, matrices, partial(flow.run, index, block, 0)) if "norm_scale" in plan.needs and not head else {}
    if head:
        found = (stage for stage in [(matrices, at_head(flow, aim, block, matrices, plan.needs))])
    elif aim is None:
        found = part_by_part(flow, index, block, matrices, plan.needs, clock)
    else:
        found = stage_by_stage(flow, aim, index, block, matrices, plan.needs, clock, reordered)
    with closing(found):
        for stage, statistics in found:
            clock.lap("forward")
            shrink(statistics.values(), plan.ours)
            for name in scales.keys() & statistics.keys():
                statistics[name] = replace(statistics[name], norm_scale_C=scales[name])
            yield stage, statistics


def reorder(block: nn.Module, channels: Channels, stats: Stats, plan: Plan) -> tuple[Stats, tuple[float, float], Tensor, list[str]]:
    """Reorder the input channels of a matrix so that N:M holds more of w^2 ||x||^2; (its sums in that order, the share held before and after, the
    order, names of other changed parameters).
    """
    pattern = plan.pattern
    assert isinstance(pattern, NM)
    weight_RC = channels.reader.view(block).float()
    squares_C = stats.gram_CC.diagonal() if stats.gram_CC is not None else stats.input_sq_C
    score_RC = weight_RC.square() * (1 if squares_C is None or stats.tokens == 0 else squares_C)
    order_SW = best_order(score_RC, channels.columns_SKW, pattern.n, pattern.m, seed=plan.seed)
    order_C = channels.order_C(order_SW)
    held: list[float] = [float((s * pattern.project(s, 0)).sum() / s.sum()) for s in (score_RC, score_RC[:, order_C])]
    if held[1] <= held[0]:  # a sample of the rows may have been misleading
        return stats, (held[0], held[0]), torch.arange(len(order_C)), []
    changed = channels.apply(block, order_SW)
    return stats.permuted(order_C), (held[0], held[1]), order_C, changed
