"""What a structured run does with a block besides pruning the matrices that read its units."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmprune.maths.asymmetric_target import asymmetric_target
from llmprune.maths.refit import mean_bias
from llmprune.methods import trait
from llmprune.model.matrices import LEFT_ALONE, Matrix, block_matrices
from llmprune.results import Row
from llmprune.statistics.gradients import LossGradients
from llmprune.stream.flow import Flow
from llmprune.stream.stream import Stream
from llmprune.structured.structure import Structure
from llmprune.types import Criterion, Plan, Stats, statistics_of


def touched_matrices(index: int, block: nn.Module, matrices: list[Matrix], plan: Plan, asked: dict[str, float]) -> list[Matrix]:
    """The matrices that are pruned; towards the dense path's outputs a structured run repairs the others too, once anything has gone."""
    if isinstance(plan.pattern, Structure) and plan.asymmetric and any(asked.values()):
        return plan.pattern.repaired(index, block)
    return matrices


def trained_matrices(block: nn.Module, matrices: list[Matrix], plan: Plan) -> list[Matrix]:
    """What a training goes over: the pruned matrices; of a block that has lost units all but routers and the like."""
    if not matrices or not isinstance(plan.pattern, Structure):
        return matrices
    return [m for m in block_matrices(block) if not LEFT_ALONE.search(m.name)]


def mask_units(flow: Flow, dense: Flow | None, index: int, block: nn.Module, rows: list[Row], structure: Structure) -> list[str]:
    """Zero all that goes with the dropped units of a block; names of what has changed."""
    keeps = structure.keeps(rows)[index]
    changed = structure.mask(index, block, keeps)
    if dense is not None and structure.rescales(index, keeps):  # what has left the block was computed before
        for batch in range(len(flow)):
            flow.outputs[batch] = flow.run(index, block, batch)
    return changed


def correct(stream: Stream, index: int, block: nn.Module, matrix: Matrix, stats: Stats) -> str:
    """Bring a matrix that loses nothing nearer to the dense path's outputs; the name of its parameter."""
    if stats.tokens:
        view_RC = matrix.view(block)
        view_RC.copy_(asymmetric_target(view_RC.float(), stats).to(stream.stored_dtype(index, matrix.parameter)))
    return matrix.parameter


def writers(structure: Structure, index: int, block: nn.Module, name: str) -> list[tuple[Matrix, Tensor]]:
    """The matrices that write the units of a reader (by its full name), with the rows [U, K] of each unit."""
    found, matrices = [], block_matrices(block)
    for axis in structure.cut[name].space.axes:
        for m in matrices:
            if (m.parameter, m.expert) == (axis.parameter, axis.expert) and axis.dim == int(m.transposed):
                found.append((m, axis.index_UK))
    return found


def counts_writers(criterion: Criterion | None) -> bool:
    """Whether a criterion is summed over all weights that a unit takes away. One that looks at inputs, or at whole columns, says what the reader's
    output loses, and that is all of it.
    """
    return criterion is not None and not criterion.needs & statistics_of("inputs") and not trait(criterion, "units_only")


def beside(structure: Structure, index: int, block: nn.Module, name: str, criterion: Criterion, gradients: LossGradients | None) -> Tensor:
    """[C] of a reader: the criterion's scores of what writes each of its inputs, a unit's sum spread over its columns."""
    space = structure.cut[name].space
    columns_UK = space.readers[0].columns_UK
    reader = next(m for m in block_matrices(block) if m.name == space.readers[0].matrix)
    device = reader.view(block).device
    total_U = torch.zeros(space.units, dtype=torch.float64, device=device)
    for m, rows_UK in writers(structure, index, block, name):
        stats = Stats(**gradients.fields(index, m.name)) if gradients is not None else Stats()
        total_U += criterion.score(m.view(block).float(), stats).sum(1, dtype=torch.float64)[rows_UK.to(device)].sum(1)
    beside_C = torch.zeros(reader.columns, dtype=torch.float64, device=device)
    beside_C[columns_UK.to(device)] = (total_U / columns_UK.shape[1]).unsqueeze(1).expand(columns_UK.shape)
    return beside_C


def graded(stream: Stream, matrices: dict[int, list[Matrix]], plan: Plan) -> dict[int, list[Matrix]]:
    """The matrices whose gradients are asked for: those that are pruned, and what writes their units."""
    structure = plan.pattern
    if not isinstance(structure, Structure) or structure.outer is not None or not counts_writers(plan.criterion):
        return matrices
    found = {}
    for index, readers in matrices.items():
        block, path = stream.walk.blocks[index], stream.path_of(index)
        names = [f"{path}.{m.name}" for m in readers]
        both = readers + [m for name in names if name in structure.cut for m, _ in writers(structure, index, block, name)]
        found[index] = list({m.name: m for m in both}.values())
    return found


def make_up(stream: Stream, index: int, block: nn.Module, matrix: Matrix, before_RC: Tensor, stats: Stats) -> str:
    """Add to a matrix's bias what its outputs have lost on average; the bias's name."""
    bias_R = block.get_parameter(matrix.bias)
    own_R = bias_R.data if matrix.expert is None else bias_R.data[matrix.expert]
    added_R = mean_bias(before_RC.float(), matrix.view(block).float(), stats)
    own_R.copy_((own_R + added_R).to(stream.stored_dtype(index, matrix.bias)))
    return matrix.bias
