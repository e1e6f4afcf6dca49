"""Train the kept weights of a block towards the outputs of the unpruned block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from llmprune.maths.coupled_rows import felt
from llmprune.maths.masked_adam import vectors
from llmprune.maths.mixed_precision import mixed_precision
from llmprune.model.matrices import LEFT_ALONE, Matrix
from llmprune.pruners.plan import Plan
from llmprune.results import Row
from llmprune.statistics.gradients import LossGradients
from llmprune.stream.flow import Flow
from llmprune.stream.stream import Stream


def store(stream: Stream, index: int, block: nn.Module, names: Iterable[str]) -> None:
    """Round trained parameters to their stored dtype."""
    for name in names:
        parameter = block.get_parameter(name)
        parameter.data.copy_(parameter.data.to(stream.stored_dtype(index, name)))


def reconstruct_block(
    flow: Flow,
    dense: Flow | None,
    index: int,
    block: nn.Module,
    matrices: list[Matrix],
    rows: list[Row],
    plan: Plan,
    gradients: LossGradients | None,
) -> tuple[list[Row], list[str]]:
    """Train the kept weights of a block, and its vectors, towards the outputs of the unpruned block, by the plan's solver for blocks; (the updated
    rows, names of the changed vectors). Errors count as the loss feels them, where the gradients are known.
    """
    assert plan.reconstruct is not None
    device = flow.stream.device_of(index)
    wanted = (dense or flow).outputs
    masked, free = whole_parameters(block, matrices), trained_vectors(block)
    root_BQQ = gradients.metric(index) if gradients is not None else None
    settle = partial(store, flow.stream, index, block, [*masked, *free])

    def outputs(batch: int) -> tuple[Tensor, Tensor]:
        aim = wanted[batch].to(device)
        with mixed_precision(device, aim.dtype, plan.mixed_precision and torch.is_grad_enabled()):  # errors are measured in float32
            found = flow.run(index, block, batch)
        return (found, aim) if root_BQQ is None else (felt(found, root_BQQ), felt(aim, root_BQQ))

    if not masked or not plan.reconstruct.fit(list(masked.values()), list(free.values()), outputs, len(flow), settle):
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
