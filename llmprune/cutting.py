"""What a structured run does with a block besides pruning the matrices that read its units."""

from __future__ import annotations

from torch import Tensor, nn

from llmprune.model.matrices import LEFT_ALONE, Matrix, block_matrices
from llmprune.stream import Flow, Stream
from llmprune.structured.refit import mean_bias
from llmprune.structured.structure import Structure
from llmprune.target import asymmetric_target
from llmprune.types import Plan, Row, Stats


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


def make_up(stream: Stream, index: int, block: nn.Module, matrix: Matrix, before_RC: Tensor, stats: Stats) -> str:
    """Add to a matrix's bias what its outputs have lost on average; the bias's name."""
    bias_R = block.get_parameter(matrix.bias)
    own_R = bias_R.data if matrix.expert is None else bias_R.data[matrix.expert]
    added_R = mean_bias(before_RC.float(), matrix.view(block).float(), stats)
    own_R.copy_((own_R + added_R).to(stream.stored_dtype(index, matrix.bias)))
    return matrix.bias
