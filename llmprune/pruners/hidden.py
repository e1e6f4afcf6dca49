"""The width of the residual stream: channels that go from every block, the embeddings, the last norm and the head at once.

They are chosen on the dense model, by the criterion's scores of all matrices that read or write them; then every matrix is brought nearer to what
it gave before, on what is left of the stream, as maths/asymmetric_target.py has it.

Shapes: D = residual channels, R, C = rows and columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.maths.linalg import drop_smallest, shrink
from llmprune.model.matrices import Matrix, block_matrices
from llmprune.pruners.errors import output_error, run_again, run_finished
from llmprune.pruners.units import correct
from llmprune.results import BlockReport, Row
from llmprune.statistics.gradients import LossGradients
from llmprune.statistics.stages import at_head, at_once, stage_by_stage
from llmprune.stream.clock import Clock
from llmprune.stream.flow import Flow
from llmprune.stream.reshaped import Reshaped
from llmprune.structured.slicing import mask_block
from llmprune.structured.spaces import Space
from llmprune.structured.structure import Structure
from llmprune.types import Plan, Stats

SURVEY_WINDOWS = 64
OnBlock = Callable[[int, BlockReport, dict[str, str]], None]
Progress = Callable[[int, int], None]


@torch.no_grad()
def choose_width(
    stream: Reshaped,
    windows_NL: Tensor,
    plan: Plan,
    matrices: dict[int, list[Matrix]],
    count: int,
    gradients: LossGradients | None,
    progress: Progress,
) -> dict[str, Any]:
    """``kept``: the ``count`` channels that stay, sorted; ``lost``: the share of all scores that goes with the others.

    A channel's score in one parameter is the sum over its column where it is read, over its row where it is written, as a share of all that
    parameter's scores: matrices of different sizes and units count alike.
    """
    assert plan.criterion is not None
    needs = plan.criterion.needs
    flow = Flow(stream, windows_NL[:SURVEY_WINDOWS])
    shares: list[Tensor] = []
    for index in range(len(stream.names) + 1):
        head = index == len(stream.names)
        with stream.block(index) as block:
            space = None if head else space_of(stream.structure, index)
            found = at_head(flow, None, block, matrices[index], needs) if head else at_once(flow, index, block, matrices[index], needs, Clock())
            if gradients is not None:
                gradients.add_to(index, found)
            scores: dict[str, Tensor] = {}
            for m in matrices[index]:
                if space is not None and all(axis.parameter != m.parameter for axis in space.axes):  # neither reads nor writes the stream
                    continue
                if needs and found[m.name].tokens == 0:  # an expert that no token reached
                    continue
                score_RC = plan.criterion.score(m.view(block).float(), found[m.name])
                score_D = score_RC.sum(0 if space is None or reads(space, m) else 1, dtype=torch.float64).cpu()
                scores[m.parameter] = scores.get(m.parameter, 0) + score_D
        shares += [score_D / score_D.sum() for score_D in scores.values() if float(score_D.sum()) > 0]
        if not head:
            flow.advance()
        progress(index + 1, len(stream.names) + 1)
    total_D = torch.stack(shares).sum(0)
    keep_D = drop_smallest(total_D, len(total_D) - count)
    return {"kept": keep_D.nonzero().flatten().tolist(), "lost": float(total_D[~keep_D].sum() / total_D.sum())}


def space_of(structure: Structure, index: int) -> Space:
    """The residual channels of a block."""
    return next(space for space in structure.spaces[index] if space.pattern == "hidden")


def reads(space: Space, matrix: Matrix) -> bool:
    """Whether a matrix's columns are residual channels, rather than its rows."""
    columns = (0 if matrix.transposed else 1) + (matrix.expert is not None)
    return any(axis.parameter == matrix.parameter and axis.dim == columns for axis in space.axes)


@torch.no_grad()
def narrow(
    stream: Reshaped,
    windows_NL: Tensor,
    plan: Plan,
    matrices: dict[int, list[Matrix]],
    asked: dict[str, float],
    choice: Mapping[str, Any],
    finished: Mapping[int, BlockReport],
    on_block: OnBlock = lambda index, report, hashes: None,
) -> list[BlockReport]:
    """Zero the channels that go in every block, and repair what is left of it; tell ``stream``, which zeroes those outside the blocks.

    matrices: what is repaired, block by block, and the head if it is a matrix of its own.
    """
    stream.width = torch.tensor(choice["kept"])
    flow, dense = Flow(stream, windows_NL), Flow(stream.stream, windows_NL)
    reports = []
    for index in matrices:
        if index in finished:
            run_finished(flow, dense, index)
            reports.append(finished[index])
            continue
        clock = Clock()
        with stream.block(index) as block:
            if index == len(stream.names):
                found = at_head(flow, dense, block, matrices[index], plan.needs) if plan.asymmetric else {}
                shrink(found.values(), plan.ours)
                changed = [correct(stream, index, block, m, found[m.name]) for m in matrices[index] if found]
                error = 0.0
            else:
                changed = narrow_block(flow, dense, index, block, matrices[index], plan, clock)
                error = output_error(run_again(flow, dense, index, block), stream.path_of(index), plan)
            clock.lap("forward")
            hashes = stream.keep(index, changed)
            clock.lap("write")
        path = stream.path_of(index)
        row = row_of(stream.structure, path, asked, choice, windows_NL.numel())
        reports.append(BlockReport(path, error, (row,), tuple(f"{path}.{name}" for name in changed), clock.seconds))
        on_block(index, reports[-1], hashes)
    return reports


def narrow_block(flow: Flow, dense: Flow, index: int, block: nn.Module, matrices: list[Matrix], plan: Plan, clock: Clock) -> list[str]:
    """Take both paths through a block; what leaves it waits in their ``outputs``. Names of the parameters that have changed."""
    structure, width = plan.pattern, flow.stream.width
    assert isinstance(structure, Structure)
    assert width is not None, "it is chosen before any block is narrowed"
    keeps = {"hidden": width}
    changed: list[str] = []
    if plan.asymmetric:
        space = space_of(structure, index)
        readers = {m.parameter for m in block_matrices(block) if reads(space, m)}
        written = replace(space, axes=tuple(axis for axis in space.axes if axis.parameter not in readers))
        for stage, statistics in stage_by_stage(flow, dense, index, block, matrices, plan, clock):
            clock.lap("forward")
            shrink(statistics.values(), plan.ours)
            changed += [correct(flow.stream, index, block, m, statistics.pop(m.name, Stats())) for m in stage]
            # the dense path is through; the pruned one has not come to what writes the stream. What reads it is still to be corrected, as a whole
            mask_block(block, [written], keeps)
            clock.lap("solve")
        changed += structure.mask(index, block, keeps)
        return list(dict.fromkeys(changed))
    for batch in range(len(dense)):
        dense.outputs[batch] = dense.run(index, block, batch)
    changed += structure.mask(index, block, keeps)
    for batch in range(len(flow)):
        flow.outputs[batch] = flow.run(index, block, batch)
    return changed


def row_of(structure: Structure, path: str, asked: dict[str, float], choice: Mapping[str, Any], tokens: int) -> Row:
    """The same channels for all blocks and for what lies outside them, which the row after the last block stands for."""
    name, units, kept = f"{path}.hidden", structure.outer_units, tuple(choice["kept"])
    size = structure.cut[name].size if name in structure.cut else structure.outside
    return Row(name, units, size // units, next(iter(asked.values())), 0, choice["lost"], tokens, (), None, "hidden", units, kept, size)
