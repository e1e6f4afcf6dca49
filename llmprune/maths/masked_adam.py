"""Adam on the kept weights: zeros of a masked parameter stay zero.

Kingma and Ba, Adam: A Method for Stochastic Optimization, https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

WARM_UP = 0.2  # of the steps; then the rate falls to zero by a cosine


class SurvivorAdam:
    """Steps on float32 copies of parameters of any dtype; each parameter's rate is relative to the root mean square of its values.

    masked: parameters whose zeros stay. free: vectors (norm scales, biases) that may take any value.
    """

    def __init__(self, masked: Iterable[nn.Parameter], free: Iterable[nn.Parameter], steps: int, rate: float) -> None:
        self._parameters = [(p, p.data != 0) for p in masked] + [(p, torch.ones_like(p, dtype=torch.bool)) for p in free]
        self._before = [p.data.clone() for p, _ in self._parameters]
        self._copies = [p.data.float().clone() for p, _ in self._parameters]
        self._rates = [rate * _root_mean_square(copy[keep]) for copy, (_, keep) in zip(self._copies, self._parameters, strict=True)]
        self._adam = torch.optim.Adam([{"params": [copy]} for copy in self._copies], lr=rate, betas=(0.9, 0.95))
        self.keep = False
        self._steps = steps
        self._done = 0
        self._trained = [p.requires_grad for p, _ in self._parameters]
        for p, _ in self._parameters:
            p.requires_grad_(True)

    def add(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to the next step's."""
        gradients = torch.autograd.grad(loss, [p for p, _ in self._parameters], allow_unused=True)
        for copy, gradient in zip(self._copies, gradients, strict=True):
            if gradient is not None:
                copy.grad = gradient.float() if copy.grad is None else copy.grad.add_(gradient)

    def step(self) -> None:
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._schedule()
        self._adam.step()
        self._adam.zero_grad()
        self._done += 1
        for copy, (p, keep) in zip(self._copies, self._parameters, strict=True):
            copy.mul_(keep)
            p.data.copy_(copy)

    def _schedule(self) -> float:
        warm = min(1.0, (self._done + 1) / max(1.0, WARM_UP * self._steps))
        return warm * 0.5 * (1 + math.cos(math.pi * self._done / self._steps))

    def __enter__(self) -> SurvivorAdam:
        return self

    def __exit__(self, *error: object) -> None:
        """Restores the previous values at the end, unless ``keep`` was set."""
        for before, trained, (p, _) in zip(self._before, self._trained, self._parameters, strict=True):
            p.requires_grad_(trained)
            if not self.keep:
                p.data.copy_(before)


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def vectors(module: nn.Module) -> dict[str, nn.Parameter]:
    """Norm scales and biases of a module, by name."""
    found = dict(module.named_parameters())
    return {name: p for name, p in found.items() if p.dim() == 1 and p.is_floating_point() and name.rpartition(".")[2] in ("weight", "bias")}
