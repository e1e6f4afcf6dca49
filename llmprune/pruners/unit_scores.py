"""Scores of units over all their weights: the columns that read a unit, and the rows that write it.

Shapes: C = input columns of a reader, U = its units, K = columns, or rows, of a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmprune.methods import trait
from llmprune.model.matrices import Matrix, block_matrices
from llmprune.pruners.plan import Plan
from llmprune.statistics.gradients import LossGradients
from llmprune.stream.stream import Stream
from llmprune.structured.structure import Structure
from llmprune.types import Criterion, Stats, statistics_of


def writers(structure: Structure, index: int, block: nn.Module, name: str) -> list[tuple[Matrix, Tensor]]:
    """The matrices that write the units of a reader (by its full name), with the rows [U, K] of each unit."""
    found, matrices = [], block_matrices(block)
    for axis in structure.cut[name].space.axes:
        for m in matrices:
            if (m.parameter, m.expert) == (axis.parameter, axis.expert) and axis.dim == int(m.transposed):
                found.append((m, axis.index_UK))
    return found


def counts_writers(criterion: Criterion | None) -> bool:
    """Whether a criterion is summed over all weights of a unit. One that looks at inputs, or at whole columns, already measures the loss of the
    reader's output, which is complete.
    """
    return criterion is not None and not criterion.needs & statistics_of("inputs") and not trait(criterion, "units_only")


def beside(structure: Structure, index: int, block: nn.Module, name: str, criterion: Criterion, gradients: LossGradients | None) -> Tensor:
    """[C] of a reader: the criterion's scores of the writers of each of its inputs, a unit's sum spread over its columns."""
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
    """The matrices whose gradients are asked for: those that are pruned, and the writers of their units."""
    structure = plan.structure
    if structure is None or structure.outer is not None or not counts_writers(plan.criterion):
        return matrices
    found = {}
    for index, readers in matrices.items():
        block, path = stream.walk.blocks[index], stream.path_of(index)
        names = [f"{path}.{m.name}" for m in readers]
        both = readers + [m for name in names if name in structure.cut for m, _ in writers(structure, index, block, name)]
        found[index] = list({m.name: m for m in both}.values())
    return found
