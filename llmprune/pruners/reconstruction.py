"""Train the kept weights of a block towards the outputs of the unpruned block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from torch import nn

from llmprune.maths.masked_adam import vectors
from llmprune.model.matrices import LEFT_ALONE, Matrix
from llmprune.results import Row
from llmprune.stream.flow import Flow
from llmprune.stream.stream import Stream
from llmprune.types import BlockSolver


def store(stream: Stream, index: int, block: nn.Module, names: Iterable[str]) -> None:
    """Round trained parameters to their stored dtype."""
    for name in names:
        parameter = block.get_parameter(name)
        parameter.data.copy_(parameter.data.to(stream.stored_dtype(index, name)))


def reconstruct_block(
    flow: Flow, dense: Flow | None, index: int, block: nn.Module, matrices: list[Matrix], rows: list[Row], solver: BlockSolver
) -> tuple[list[Row], list[str]]:
    """Train the kept weights of a block, and its vectors, towards the outputs of the unpruned block; (the updated rows, names of the changed
    vectors).
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
    """Norm scales and biases, except those of modules that are never pruned by default (routers)."""
    return {name: p for name, p in vectors(block).items() if not LEFT_ALONE.search(name)}


def whole_parameters(block: nn.Module, matrices: list[Matrix]) -> dict[str, nn.Parameter]:
    """The parameters of which every part is pruned, not only some experts."""
    weights: Counter[str] = Counter()
    for m in matrices:
        weights[m.parameter] += m.rows * m.columns
    held = {name: block.get_parameter(name) for name in weights}
    return {name: parameter for name, parameter in held.items() if weights[name] == parameter.numel()}
