"""The ratio of each matrix: the plan's allocation, measured on the dense model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn

from llmprune.maths.budget import on_levels
from llmprune.maths.linalg import shrink
from llmprune.methods import build, trait
from llmprune.model.matrices import Matrix
from llmprune.pruners.coarse import COARSE
from llmprune.pruners.matrix import solve_at
from llmprune.pruners.plan import Plan, Work
from llmprune.ratios.dropped_experts import expert_errors
from llmprune.results import Trial
from llmprune.statistics.gradient_taps import PER_WEIGHT
from llmprune.statistics.gradients import GRADIENTS, LossGradients, loss_gradients
from llmprune.statistics.stages import at_head, at_once
from llmprune.statistics.sums import COLUMN_SUMS
from llmprune.stream.clock import Clock
from llmprune.stream.flow import Flow
from llmprune.stream.stream import Stream
from llmprune.types import Allocation, Listener, Seen, Stat, Stats, TriedAllocation

Measured = dict[str, dict[str, Tensor]]  # allocation -> matrix -> its measures
SURVEY_WINDOWS = 64  # of the dense model, for measures of allocations that the gradients' forward does not give
MOST_LEVELS = 9  # at which a matrix with its own levels is pruned to be measured
MOST_COUNTS = 17  # of experts without which a block is run to be measured
GRADIENT_TOKENS = 16384  # of the calibration, for sums over outputs; those of weights take all


@dataclass(frozen=True)
class Ratios:
    """The ratio of each matrix, by full name, and the number that it is based on; where several allocations were tried, the figures of all."""

    asked: dict[str, float]
    reasons: dict[str, float]
    tried: tuple[Trial, ...] = ()


def is_tried(allocation: Allocation | TriedAllocation) -> TypeGuard[TriedAllocation]:
    return bool(trait(allocation, "tried"))


def allocations(plan: Plan) -> dict[str, Allocation]:
    """The closed-form allocations that a plan needs, by name; its own is "", those that it tries have their names."""
    if is_tried(plan.allocation):
        return {name: build("allocation", name) for name in plan.allocation.starts}
    return {"": plan.allocation}  # type: ignore[dict-item]


def needs_of(plan: Plan) -> frozenset[Stat]:
    """All statistics that a plan's pruning and its allocation need."""
    return plan.needs.union(*(a.needs for a in allocations(plan).values()))


def dense_gradients(
    stream: Stream, windows_NL: Tensor, matrices: dict[int, list[Matrix]], plans: list[Plan], listen: Listener
) -> LossGradients | None:
    """The loss gradients that plans need, of the model before it is pruned; None where there are none."""
    needs, inputs = (frozenset[Stat]().union(*map(of, plans)) for of in (needs_of, seen_with_gradients))
    outputs = any(plan.output_metric for plan in plans)
    needs &= GRADIENTS
    if not needs or not any(matrices.values()):
        return None
    return loss_gradients(stream, windows_NL[: windows_graded(windows_NL, needs)], matrices, needs, listen, outputs, inputs)


def windows_graded(windows_NL: Tensor, needs: frozenset[Stat]) -> int:
    """How many windows the gradients are taken over."""
    windows, length = windows_NL.shape
    return windows if needs & PER_WEIGHT else min(windows, math.ceil(GRADIENT_TOKENS / length))


@torch.no_grad()
def measure(work: Work, listen: Listener) -> Measured:
    """The measures of the plan's allocations on the dense model, all in one pass; call it before anything is pruned."""
    looking = {name: a for name, a in allocations(work.plan).items() if a.looks_at != "nothing"}
    measured: Measured = {name: {} for name in looking}
    structure = work.plan.structure
    if looking and structure is not None and structure.name in COARSE:
        levels = {name: thinned(cut.levels, MOST_COUNTS) for name, cut in structure.cut.items()}
        return dict.fromkeys(looking, expert_errors(work.stream, structure, work.windows_NL, levels, listen))
    needs = survey_needs(work.plan, list(looking.values()))
    inputs = work.gradients.inputs if work.gradients is not None and seen_with_gradients(work.plan) else None
    forward = inputs is None and any(a.looks_at != "weights" for a in looking.values())
    flow = Flow(work.stream, work.windows_NL[:SURVEY_WINDOWS]) if forward else None
    for index, matrices in work.matrices.items() if looking else ():
        with work.stream.block(index) as block:
            if flow is not None:
                statistics = survey(flow, index, block, matrices, needs)
            else:
                statistics = {m.name: replace(inputs[index][m.name], factors={}) if inputs else Stats() for m in matrices}
            shrink(statistics.values(), work.plan.ours)  # as before a pruning
            if work.gradients is not None:
                work.gradients.add_to(index, statistics)
            for m in matrices:
                seen = seen_of(work, index, m, m.view(block).float(), statistics.pop(m.name), needs, list(looking.values()))
                for name, allocation in looking.items():
                    measured[name][work.name_of(index, m)] = allocation.measure(seen).cpu()  # blocks may be on several devices
        listen.progress("allocation", index + 1, len(work.matrices))
    return measured


def seen_of(work: Work, index: int, matrix: Matrix, weight_RC: Tensor, stats: Stats, needs: frozenset[Stat], looking: list[Allocation]) -> Seen:
    """What the allocations may look at of one matrix."""
    plan, full = work.plan, work.name_of(index, matrix)
    unreached = (needs and stats.tokens == 0) or (needs & PER_WEIGHT and stats.grad_tokens == 0)
    scored = plan.criterion is not None and any(a.scored for a in looking) and not unreached
    score_RC = plan.criterion.score(weight_RC, stats) if scored and plan.criterion else None
    cut = plan.structure.cut[full] if plan.structure is not None else None
    levels, units_UK = (thinned(cut.levels), cut.space.readers[0].columns_UK) if cut else ((), None)
    own = replace(plan, asymmetric=False)  # the dense path is the only one
    return Seen(weight_RC, stats, score_RC, partial(_pruned_at, weight_RC, stats, own, full), levels, units_UK)


def seen_with_gradients(plan: Plan) -> frozenset[Stat]:
    """The sums of inputs that the plan's allocations look at, where the gradients' forward gives them; none where they need one of their own."""
    wanted = survey_needs(plan, [a for a in allocations(plan).values() if a.looks_at != "nothing"]) - GRADIENTS
    graded = needs_of(plan) & GRADIENTS - {"first_grad"}  # that one's are of one window
    return wanted if graded and wanted <= COLUMN_SUMS.keys() else frozenset()


def survey_needs(plan: Plan, looking: list[Allocation]) -> frozenset[Stat]:
    needs: frozenset[Stat] = frozenset().union(*(a.needs for a in looking))
    if plan.criterion is not None and any(a.scored for a in looking):
        needs |= plan.criterion.needs
    return needs | plan.needs if any(a.looks_at == "prunings" for a in looking) else needs


def _pruned_at(weight_RC: Tensor, stats: Stats, plan: Plan, name: str, ratio: float) -> Tensor:
    return solve_at(weight_RC, stats, plan, ratio, name).weight_RC


def thinned(levels: tuple[float, ...], most: int = MOST_LEVELS) -> tuple[float, ...]:
    """At most so many of the levels, evenly, both ends among them."""
    if len(levels) <= most:
        return levels
    return tuple(levels[round(k * (len(levels) - 1) / (most - 1))] for k in range(most))


def survey(flow: Flow, index: int, block: nn.Module, matrices: list[Matrix], needs: frozenset[Stat]) -> dict[str, Stats]:
    """What enters the matrices of a block, or the head, of the dense model."""
    if index == len(flow.stream.names):
        return at_head(flow, None, block, matrices, needs)
    statistics = at_once(flow, index, block, matrices, needs, Clock())
    flow.advance()
    return statistics


def share(work: Work, measured: Measured, name: str = "") -> Ratios:
    """The ratios of one of the plan's allocations for the plan's budget, on the levels of its pattern. Raises RequestError if it cannot be met."""
    plan, sizes = work.plan, work.sizes
    blocks = {work.name_of(i, m): work.stream.path_of(i) for i, ms in work.matrices.items() for m in ms}
    asked, reasons = allocations(plan)[name].share(measured.get(name, {}), sizes, blocks, plan.sparsity)
    if plan.structure is not None:
        asked = plan.structure.legal(asked, plan.sparsity)
    elif plan.pattern is not None and plan.pattern.levels:
        asked = on_levels(asked, sizes, dict.fromkeys(sizes, plan.pattern.levels), plan.sparsity)
    return Ratios(asked, reasons)
