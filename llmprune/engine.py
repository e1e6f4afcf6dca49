"""The whole of one-shot pruning: blocks in order, each watched, pruned, kept, and run again so that the next sees pruned inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llmprune.model.matrices import Matrix
from llmprune.pruners.distillation import distill
from llmprune.pruners.errors import output_error, run_again, run_finished, run_head_again
from llmprune.pruners.reconstruction import reconstruct_block, store, trained_vectors, whole_parameters
from llmprune.pruners.units import mask_units, touched_matrices, trained_matrices
from llmprune.pruners.weights import Variants, prune_block
from llmprune.results import BlockReport, Polished
from llmprune.statistics.gradients import LossGradients
from llmprune.stream.clock import Clock
from llmprune.stream.flow import Flow
from llmprune.stream.stream import Stream
from llmprune.structured.structure import Structure
from llmprune.types import Plan

Progress = Callable[[int, int], None]


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
            return Polished(0, 0.0, 0.0, ()), {}
        polished = distill(stream, teacher, masked, free, plan.polish_steps, settle, progress)
        for index in blocks if polished.changed else ():
            hashes |= stream.keep(index, [*masked[index], *free[index]], again=True)
    return polished, hashes
