"""Low-rank adapters that keep the zeros: W + s (B A) . keep, merged exactly, so that the merged matrix has the zeros of W.

Zimmer et al., PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs, https://arxiv.org/abs/2312.15230

A plain adapter's product has no zeros, and merging it fills those of W. Here the product is masked in every forward, so what is trained is what is
merged. By torch's own parametrizations: the parameter ``weight`` of a module becomes a function of the old one and the two factors.

Shapes: R, C = rows and columns as the parameter is stored, r = rank, with the experts of a stack in front.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

RANK, ALPHA = 16, 32.0


class Adapter(nn.Module):
    """W -> W + s (B A) . keep. keep: None where the matrix has no mask."""

    def __init__(self, weight: Tensor, keep: Tensor | None, rank: int, alpha: float, draw: torch.Generator) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        right = (torch.rand(*stack, rank, columns, generator=draw) * 2 - 1) / math.sqrt(columns)
        self.right = nn.Parameter(right.to(weight))
        self.left = nn.Parameter(torch.zeros(*stack, rows, rank).to(weight))
        self.scale = alpha / rank
        self.keep: Tensor | None
        self.register_buffer("keep", None if keep is None else keep.to(weight.device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        product = self.scale * (self.left @ self.right)
        return weight + (product if self.keep is None else product * self.keep)


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model, by the name that each parameter had."""

    model: nn.Module
    names: tuple[str, ...]

    @classmethod
    def attach(cls, model: nn.Module, keep: Mapping[str, Tensor | None], rank: int = RANK, alpha: float = ALPHA, seed: int = 0) -> Adapters:
        """Adapt these parameters, which are frozen from then on. The model computes what it did: B is zero."""
        draw = torch.Generator().manual_seed(seed)
        for name, mask in keep.items():
            weight = model.get_parameter(name).requires_grad_(False)
            module, leaf = _place(model, name)
            parametrize.register_parametrization(module, leaf, Adapter(weight, mask, rank, alpha, draw).to(weight.device))
        return cls(model, tuple(keep))

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """The parameters with their adapters merged."""
        return {name: getattr(*_place(self.model, name)).detach().clone() for name in self.names}

    @contextmanager
    def showing(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the model computes with these values of the parameters instead."""
        found = {name: _parts(self.model, name) for name in self.names}
        before = {name: (original.data, adapter.left.data) for name, (original, adapter) in found.items()}
        for name, (original, adapter) in found.items():
            original.data, adapter.left.data = values[name].to(original), torch.zeros_like(adapter.left.data)
        try:
            yield
        finally:
            for name, (original, adapter) in found.items():
                original.data, adapter.left.data = before[name]

    def detach(self, merge: bool = True) -> None:
        """Put the merged parameters in the places of the adapted ones, or the adapted ones as they were; repeating it changes nothing."""
        for module, leaf in (_place(self.model, name) for name in self.names):
            if parametrize.is_parametrized(module, leaf):
                parametrize.remove_parametrizations(module, leaf, leave_parametrized=merge)

    def trained(self) -> list[nn.Parameter]:
        return [factor for name in self.names for factor in _parts(self.model, name)[1].parameters()]


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _parts(model: nn.Module, name: str) -> tuple[nn.Parameter, Adapter]:
    """(the frozen parameter, its adapter)."""
    module, leaf = _place(model, name)
    held: Any = module.parametrizations[leaf]  # type: ignore[index]
    return held.original, held[0]
