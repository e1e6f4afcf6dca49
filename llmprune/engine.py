"""The whole of one-shot pruning: blocks in order, each watched, pruned, kept, and run again so that the next sees pruned inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from llmprune.clock import Clock
from llmprune.criteria.magnitude import Magnitude
from llmprune.cutting import beside, correct, counts_what_goes, make_up, mask_units, touched_matrices, trained_matrices
from llmprune.errors import StoppedError
from llmprune.gradients import GRADIENTS, LossGradients
from llmprune.linalg import all_finite, drawn_to_mean, few_tokens, notes_of, shrink, squared_error
from llmprune.model.matrices import LEFT_ALONE, Matrix, Selection, block_matrices
from llmprune.model.norms import norm_scales
from llmprune.patterns.nm import NM
from llmprune.polish import distill
from llmprune.solvers.mask_only import MaskOnly
from llmprune.statistics import at_head, inner_channels, part_by_part, stage_by_stage
from llmprune.stream import FileHidden, Flow, MemoryHidden, Stream
from llmprune.structured.reorder import Channels, best_order, in_order
from llmprune.structured.structure import Structure
from llmprune.target import asymmetric_target
from llmprune.training import vectors
from llmprune.types import BlockReport, BlockSolver, Plan, Polished, Pruned, Row, Stats

Progress = Callable[[int, int], None]
SCORED = GRADIENTS - {"grad_out_sq"}  # gradients that a score is made of
BLOWN_UP = 1.0  # relative squared output error above which a run stops unless told to accept it


def selected(stream: Stream, selection: Selection) -> dict[int, list[Matrix]]:
    """The matrices that are pruned, block by block; the head comes after the last block, if ``only`` names it."""
    blocks = enumerate(zip(stream.names, stream.walk.blocks, strict=True))
    found = {i: [m for m in block_matrices(block) if selection.takes(f"{name}.{m.name}")] for i, (name, block) in blocks}
    if stream.walk.head_free and selection.names(f"{stream.walk.head_path}.weight"):
        found[len(stream.names)] = block_matrices(stream.walk.head)
    return found


@torch.no_grad()
def prune(
    stream: Stream,
    windows_NL: Tensor,
    plan: Plan,
    matrices: dict[int, list[Matrix]],
    gradients: LossGradients | None = None,
    asked: dict[str, float] | None = None,
    variants: Variants | None = None,
    finished: Mapping[int, BlockReport] | None = None,
    on_block: Callable[[int, BlockReport, dict[str, str]], None] = lambda index, report, hashes: None,
    on_polish: Callable[[Polished, dict[str, str]], None] = lambda polished, hashes: None,
    progress: Progress = lambda done, total: None,
) -> list[BlockReport]:
    """Prune every block of a model on the outputs of the pruned blocks before it.

    windows_NL: calibration token ids. gradients: what ``dense_gradients`` found before anything was pruned. asked: the ratio of every matrix, the
    same for all if it is left out. variants: what else each matrix is pruned to, on the way. ``finished`` blocks (of an interrupted run) are only
    run through. ``on_block`` is told of each newly pruned block once its tensors are kept, ``on_polish`` of what the distillation at the end has
    done, if the plan has one; ``progress`` is that one's.
    Raises StoppedError when statistics or outputs are not finite, or a block's output is destroyed.
    """
    finished = finished or {}
    asked = asked or {f"{stream.path_of(i)}.{m.name}": plan.sparsity for i, ms in matrices.items() for m in ms}
    flow = Flow(stream, windows_NL)
    teacher = flow.twin() if plan.asymmetric or plan.polish_steps else None
    dense = teacher if plan.asymmetric else None
    reports = []
    for index in matrices:
        name = stream.path_of(index)
        if index in finished:
            run_finished(flow, teacher, index)
            reports.append(finished[index])
            continue
        with stream.block(index) as block:
            clock = Clock()
            if teacher is not None and dense is None:
                teacher.through(index, block)
            head = index == len(stream.names)
            unpruned_VD = block.get_parameter("weight").clone() if head else None
            touched = touched_matrices(index, block, matrices[index], plan, asked)
            rows, changed = prune_block(flow, dense, index, block, touched, plan, asked, gradients, clock, variants)
            if isinstance(plan.pattern, Structure):
                changed += mask_units(flow, dense, index, block, rows, plan.pattern)
            if plan.reconstruct is not None and not head:
                rows, trained = reconstruct_block(flow, dense, index, block, trained_matrices(block, matrices[index], plan), rows, plan.reconstruct)
                pruned = {m.parameter for m in matrices[index]}
                changed = [c for c in dict.fromkeys(changed + trained) if c not in pruned]
                clock.lap("solve")
            hashes = stream.keep(index, dict.fromkeys([m.parameter for m in matrices[index]] + changed))
            clock.lap("write")
            if unpruned_VD is None:
                pairs = run_again(flow, dense, index, block)
            else:
                pairs = run_head_again(flow, dense or flow, block, unpruned_VD)
            error = output_error(pairs, name, plan)
            clock.lap("forward")
        reports.append(BlockReport(name, error, tuple(rows), tuple(f"{name}.{c}" for c in changed), clock.seconds))
        on_block(index, reports[-1], hashes)
    if teacher is not None and plan.polish_steps:
        del flow, dense  # their hidden states have done their work
        on_polish(*polish(stream, teacher, matrices, plan, progress))
    return reports


def polish(stream: Stream, teacher: Flow, matrices: dict[int, list[Matrix]], plan: Plan, progress: Progress) -> tuple[Polished, dict[str, str]]:
    """Distill the teacher, which has come through the last block, into the pruned model; hashes of the tensors that were written."""
    hashes: dict[str, str] = {}
    with stream.whole():
        matrices = {i: trained_matrices(stream.walk.blocks[i], ms, plan) for i, ms in matrices.items()}
        blocks = {i: stream.walk.blocks[i] for i, ms in matrices.items() if whole_parameters(stream.walk.blocks[i], ms)}
        masked = {i: whole_parameters(block, matrices[i]) for i, block in blocks.items()}
        free = {i: trained_vectors(block) for i, block in blocks.items()}

        def settle() -> None:
            for i, block in blocks.items():
                store(stream, i, block, [*masked[i], *free[i]])

        if not masked:  # some experts of a stack alone: nothing can be trained without the others
            return Polished(0, 0.0, 0.0, {}), {}
        polished = distill(stream, teacher, masked, free, plan.polish_steps, settle, progress)
        for index, names in polished.changed.items():
            hashes |= stream.keep(index, names, again=True)
    return polished, hashes


def store(stream: Stream, index: int, block: nn.Module, names: Iterable[str]) -> None:
    """Round trained parameters to the dtype that they are stored in."""
    for name in names:
        parameter = block.get_parameter(name)
        parameter.data.copy_(parameter.data.to(stream.stored_dtype(index, name)))


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
                if isinstance(plan.pattern, Structure) and plan.criterion is not None and counts_what_goes(plan.criterion):
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
    return in_order(stats, order_C), (held[0], held[1]), order_C, changed


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


def reconstruct_block(
    flow: Flow, dense: Flow | None, index: int, block: nn.Module, matrices: list[Matrix], rows: list[Row], solver: BlockSolver
) -> tuple[list[Row], list[str]]:
    """Train what survives in a block, and its vectors, towards what the unpruned block gave; (the rows as they are then, names of the vectors that
    have changed).
    """
    device = flow.stream.device_of(index)
    wanted = (dense or flow).outputs
    masked, free = whole_parameters(block, matrices), trained_vectors(block)
    settle = partial(store, flow.stream, index, block, [*masked, *free])
    outputs = lambda batch: (flow.run(index, block, batch), wanted[batch].to(device))  # noqa: E731
    if not masked or not solver.fit(list(masked.values()), list(free.values()), outputs, len(flow), settle):
        return rows, []
    if dense is not None:
        for batch in range(len(flow)):
            flow.outputs[batch] = flow.run(index, block, batch)
    path = flow.stream.path_of(index)
    trained = {f"{path}.{m.name}": m for m in matrices if m.parameter in masked}
    now = [replace(r, zeros=int((trained[r.matrix].view(block) == 0).sum()), lost=None) if r.matrix in trained else r for r in rows]
    return now, [*masked, *free]


def trained_vectors(block: nn.Module) -> dict[str, nn.Parameter]:
    """Norm scales and biases, but for those of what is left alone by default (routers)."""
    return {name: p for name, p in vectors(block).items() if not LEFT_ALONE.search(name)}


def whole_parameters(block: nn.Module, matrices: list[Matrix]) -> dict[str, nn.Parameter]:
    """The parameters of which every part is pruned, not only some experts."""
    selected = {m.name for m in matrices}
    partly = {m.parameter for m in block_matrices(block) if m.name not in selected}
    return {m.parameter: block.get_parameter(m.parameter) for m in matrices if m.parameter not in partly}


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
    if (plan.needs and stats.tokens == 0) or (plan.needs & SCORED and stats.grad_tokens == 0):
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


def run_finished(flow: Flow, dense: Flow | None, index: int) -> None:
    """Take the hidden states through a block that an interrupted run has pruned already; nothing comes after the head."""
    if index == len(flow.stream.names):
        return
    if dense is not None:
        with flow.stream.block(index, dense=True) as block:
            dense.through(index, block)
    with flow.stream.block(index) as block:
        flow.through(index, block)


def output_error(pairs: Iterable[tuple[Tensor, Tensor]], name: str, plan: Plan) -> float:
    """Relative squared error over (unpruned, pruned) outputs. Raises StoppedError when it is not finite, or destroys what goes on."""
    wrong = total = 0.0
    for dense, pruned in pairs:
        total += float(dense.float().square().sum(dtype=torch.float64))
        wrong += float((dense.float() - pruned.float()).square().sum(dtype=torch.float64))
    error = wrong / total if total else 0.0
    if not math.isfinite(error):
        raise StoppedError(f"{name}: its output is not finite", "compute in --dtype float32")
    if error > BLOWN_UP and not plan.accept_damage:
        raise StoppedError(
            f"{name}: relative output error {error:.3g} after pruning, above {BLOWN_UP:g}",
            "ask for less sparsity or a better method; --accept-damage goes on",
        )
    return error


def run_again(flow: Flow, dense: Flow | None, index: int, block: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(unpruned, pruned) outputs of every micro-batch, on the pruned path's inputs or of the two paths; then on to the next block."""
    for batch in range(len(flow)):
        if dense is None:
            dense_NLD, flow.outputs[batch] = flow.outputs[batch], flow.run(index, block, batch)
            yield dense_NLD, flow.outputs[batch]
        else:  # the pruned block has run already, stage by stage
            yield dense.outputs[batch], flow.outputs[batch]
    flow.advance()
    if dense is not None:
        dense.advance()


def run_head_again(flow: Flow, reference: Flow, head: nn.Module, dense_VD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(unpruned, pruned) logits of every window."""
    weight = head.get_parameter("weight")
    pruned_VD = weight.data
    for (ids_1L, ours_1LD), (_, theirs_1LD) in zip(flow.windows(), reference.windows(), strict=True):
        pruned_1LV = flow.stream.walk.logits(ids_1L, ours_1LD)
        weight.data = dense_VD
        dense_1LV = flow.stream.walk.logits(ids_1L, theirs_1LD)
        weight.data = pruned_VD
        yield dense_1LV, pruned_1LV
