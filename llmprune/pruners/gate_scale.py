"""The scale of the gates of a stack that has lost experts, by least squares: its outputs come as near as they can to the whole stack's.

A softmax over fewer experts gives each of them a larger gate; where gates are renormalised, those that take over from dropped experts are too sure.

    s = argmin sum_t ||y_t - s y'_t||^2 = sum_t <y_t, y'_t> / sum_t ||y'_t||^2

y are the outputs of all experts, y' those of the kept ones, for the same tokens t. Configs have no such factor, so it is folded into the matrix that
writes the experts' outputs, and the bias beside it.

Shapes: T = tokens, D = hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmprune.errors import RequestError
from llmprune.stream.flow import Flow

PROBES = 8  # random tokens that show which parameter the outputs are proportional to


def gate_scale(flow: Flow, index: int, block: nn.Module, smaller: nn.Module, stack: str) -> float:
    """The least-squares scale of the outputs of the experts ``stack`` in ``smaller``, the block without some of them; 1 where there are none."""
    both = own = 0.0
    for batch in range(len(flow)):
        with _outputs(block, stack) as whole, _outputs(smaller, stack) as kept:
            flow.run(index, block, batch)
            flow.run(index, smaller, batch)
        both += float((whole[0] * kept[0]).sum(dtype=torch.float64))
        own += float(kept[0].square().sum(dtype=torch.float64))
    return both / own if own else 1.0


def writers_of(experts: nn.Module, name: str, width: int) -> list[str]:
    """The parameters, by their names in ``experts``, whose doubling doubles the outputs: a matrix and the bias beside it.

    Raises RequestError where none is found.
    """
    parameters = dict(experts.named_parameters())
    some = next(iter(parameters.values()))
    hidden_TD = torch.randn(PROBES, width, generator=torch.Generator().manual_seed(0)).to(some)
    before_TD = _alone(experts, hidden_TD)
    for matrix in reversed([own for own, parameter in parameters.items() if parameter.dim() == 3]):
        found = [own for own in (matrix, f"{matrix}_bias") if own in parameters]
        with _scaled([parameters[own] for own in found], 2):
            if torch.equal(_alone(experts, hidden_TD), 2 * before_TD):
                return found
    raise RequestError(f"solver refit: no matrix of {name} is proportional to its outputs", "leave solver out")


def _alone(experts: nn.Module, hidden_TD: Tensor) -> Tensor:
    index_T1 = torch.zeros(len(hidden_TD), 1, dtype=torch.long, device=hidden_TD.device)
    out: Tensor = experts(hidden_TD, index_T1, torch.ones_like(index_T1, dtype=hidden_TD.dtype))
    return out


@contextmanager
def _scaled(parameters: list[nn.Parameter], factor: float) -> Iterator[None]:
    """Inside, the parameters are multiplied by a power of two, which rounds nothing."""
    for parameter in parameters:
        parameter.data.mul_(factor)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.data.div_(factor)


@contextmanager
def _outputs(block: nn.Module, stack: str) -> Iterator[list[Tensor]]:
    """Inside, the outputs of a stack of experts are collected, in float32."""
    found: list[Tensor] = []
    hook = block.get_submodule(stack).register_forward_hook(lambda experts, args, out: found.append(out.float()))
    try:
        yield found
    finally:
        hook.remove()
