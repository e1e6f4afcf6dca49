"""Experts that no token is routed to, and experts that run one by one: what the proof of a mixture rests on.

Shapes: T = tokens, P = experts of a token, D = hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmprune.model.skeleton import UNBUILDABLE
from llmprune.structured.slicing import Keeps, dropped_units
from llmprune.structured.spaces import Axis, Space, tensors_of

NEVER = -1e4  # a logit or a score that no token chooses, and that no softmax gives weight to
PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}


@contextmanager
def unrouted(block: nn.Module, spaces: Sequence[Space], keeps: Keeps) -> Iterator[None]:
    """While active, tokens are routed to the kept experts of each space only. Vectors beside a router, such as biases of the choice, are changed in
    place and stay so.
    """
    tensors, logits = tensors_of(block), {}
    for space in spaces:
        for axis in (axis for axis in space.axes if not in_stack(space, axis)):  # of the router's matrix, and of vectors beside it
            tensor, places = tensors[axis.parameter], axis.index_UK[dropped_units(space, keeps[space.name])].flatten()
            if is_router(tensor):
                logits[tensor.data_ptr()] = places
            else:
                tensor.data.index_fill_(axis.dim, places, NEVER)
    with _Never(logits):
        yield


def in_stack(space: Space, axis: Axis) -> bool:
    """Whether an axis of a space of experts lies in their stack."""
    return axis.parameter.startswith(f"{space.name}.")


def is_router(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and min(tensor.shape) > 1


class _Never(TorchFunctionMode):
    """The products with some routers' matrices, by address, get a logit for some experts."""

    def __init__(self, experts: dict[int, Tensor]) -> None:
        super().__init__()
        self.experts = experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            never = self.experts.get(weight.data_ptr()) if isinstance(weight, Tensor) else None
            return out if never is None else out.index_fill(-1, never, NEVER)
        return out


class Calls:
    """While active, notes how a module is called, and what it returns."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.seen: list[tuple[tuple[Any, ...], Any]] = []

    def __enter__(self) -> Calls:
        self.handle = self.module.register_forward_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.seen.append(((*args, *kwargs.values()), out))

    def wrong(self, least: int) -> str:
        """Why the experts cannot be scored one by one; nothing where their outputs, times their gates, add up to that of the module.

        least: experts that are kept, and so the most that a token may choose.
        """
        if len(self.seen) != 1:
            return f"its experts are called {len(self.seen)} times"
        given, out = self.seen[0]
        if len(given) != 3 or not _chosen(*given):
            return "its experts are not called with hidden states, the chosen experts and their gates"
        hidden, index_TP, gate = given
        hidden_TD = hidden.reshape(len(index_TP), -1)
        if index_TP.shape[1] > least:
            return f"a token chooses {index_TP.shape[1]} experts, which no field of its config says"
        gate_TP = gate if gate.shape == index_TP.shape else gate.gather(1, index_TP)
        total_TD = torch.zeros_like(hidden_TD)
        try:
            for index_T1, gate_T1 in zip(index_TP.split(1, 1), gate_TP.split(1, 1), strict=True):
                total_TD += gate_T1 * self.module(hidden_TD, index_T1, torch.ones_like(gate_T1)).reshape(hidden_TD.shape)
        except UNBUILDABLE as error:
            return f"its experts do not run one by one ({error})"
        wanted_TD = out.reshape(hidden_TD.shape)
        alike = torch.allclose(total_TD, wanted_TD, atol=1e-5 * float(wanted_TD.abs().max()))
        return "" if alike else "its experts' outputs are not multiplied by their gates"


def _chosen(hidden: Any, index: Any, gate: Any) -> bool:
    tensors = all(isinstance(given, Tensor) for given in (hidden, index, gate))
    if not tensors or not index.dim() == gate.dim() == 2 or index.is_floating_point():
        return False
    return len(index) == len(gate) == hidden.numel() // hidden.shape[-1]
