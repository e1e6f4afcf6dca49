"""The norms that feed a block's matrices, and their effective scales: measured, not read (Gemma's multiply by 1 + weight, others by the weight).

C = channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmprune.model.matrices import Matrix
from llmprune.statistics.dataflow import tensors
from llmprune.statistics.products import Products

NORM = "_llmprune_norm"  # on a tensor: the norm whose output it is
SAME_CHANNELS = {"__getitem__", "view", "reshape", "flatten", "squeeze", "unsqueeze", "expand", "to", "contiguous", "index_select", "clone", "float"}


class _Passing(TorchFunctionMode):
    """Notes which norm's output enters each matrix, through operations that only choose, cast or reshape tokens."""

    def __init__(self, block: nn.Module, matrices: list[Matrix]) -> None:
        super().__init__()
        self.found: dict[str, set[nn.Module | None]] = {}
        self._products = Products(block, matrices)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for use in self._products.uses(func, args, kwargs or {}):
            if use.value.numel():
                self.found.setdefault(use.matrix.name, set()).add(use.value.__dict__.get(NORM))
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in SAME_CHANNELS and isinstance(out, Tensor):
            source = next((t for t in tensors(args) if t.is_floating_point()), None)
            if source is not None and source.shape[-1:] == out.shape[-1:]:
                out.__dict__[NORM] = source.__dict__.get(NORM)
        return out


def norm_scales(block: nn.Module, matrices: list[Matrix], run: Callable[[], object]) -> dict[str, Tensor]:
    """[C] for each matrix that a norm alone feeds, in float32. run: runs the block once on some input."""
    passing = _Passing(block, matrices)
    handles = [m.register_forward_hook(_mark, with_kwargs=True) for m in block.modules() if is_norm(m)]
    try:
        with passing:
            run()
    finally:
        for handle in handles:
            handle.remove()
    fed = {name: next(iter(norms)) for name, norms in passing.found.items() if len(norms) == 1}
    return {name: effective_scale(norm) for name, norm in fed.items() if norm is not None}


def is_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and all(p.dim() == 1 for p in own.values())


def _mark(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
    """A norm of one tensor; with a gate, the output no longer has the norm's scale."""
    if isinstance(out, Tensor) and len(list(tensors((args, kwargs)))) == 1:
        out.__dict__[NORM] = module


def effective_scale(norm: nn.Module) -> Tensor:
    """[C]: the norm's factor of each channel, from its outputs for +x and -x of zero mean, so that a bias cancels."""
    weight = norm.get_parameter("weight")
    x_C = torch.linspace(0.5, 1.5, weight.numel(), device=weight.device)  # no channel is near zero; the signs are mixed, the mean is subtracted
    x_C[1::2] *= -1
    x_C -= x_C.mean()
    unit_C = (x_C / x_C.square().mean().sqrt()).to(weight.dtype)
    return ((norm(unit_C) - norm(-unit_C)).float() / (2 * unit_C.float())).detach()
