"""Soft top-k while a model is trained: the model's weights are w m [among the k largest], the optimizer's are the dense w behind them.

The forward sees exact zeros; the gradient goes back through the soft mask, so masked weights learn too and may return. The budget falls from all to
k in the first quarter of the schedule, the sharpness grows until its end, where the mask becomes hard.

Tai, Tian and Lim, Spartan, https://arxiv.org/abs/2205.14107 (sparse forward, soft backward); magnitudes are relative to the root mean square of their
matrix here, so that one sharpness suits all.

Shapes: R = output rows, C = input columns, G = groups of N:M (one for all weights if unstructured), W = weights of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmprune.maths.soft_top_k import soft_top_k, through_soft_top_k
from llmprune.model.matrices import Matrix
from llmprune.training.moves import masked_further
from llmprune.types import Mask, Pattern

SHARPNESS = (1.0, 20.0)  # at first, at the end
FALL = 0.25  # share of the schedule in which the budget falls


@dataclass
class Soft:
    """dense, soft: the weights behind the model's and their soft masks, by parameter name; empty before the schedule and after it."""

    parameters: Mapping[str, nn.Parameter]
    matrices: Mapping[str, list[Matrix]]
    pattern: Pattern
    goal: float
    dense: dict[str, Tensor] = field(default_factory=dict)
    soft: dict[str, Tensor] = field(default_factory=dict)
    sharpness: float = SHARPNESS[0]

    def begin(self) -> None:
        """From now on the optimizer has the dense weights, which are the model's as they are."""
        self.dense = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def end(self) -> None:
        """From now on the optimizer has the model's weights."""
        self.dense, self.soft = {}, {}

    @torch.no_grad()
    def before_step(self) -> None:
        """Give the optimizer the dense weights and their gradients."""
        for name, dense in self.dense.items():
            parameter = self.parameters[name]
            if parameter.grad is not None:
                for matrix in self.matrices[name]:
                    gradient_RC, weight_RC = matrix.view_of(parameter.grad), matrix.view_of(dense)
                    gradient_GW, weight_GW, mask_GW = (self.groups(t) for t in (gradient_RC, weight_RC, matrix.view_of(self.soft[name])))
                    back_GW = through_soft_top_k(gradient_GW, weight_GW, mask_GW, scale_of(weight_RC), self.sharpness)
                    gradient_RC.copy_(back_GW.view(weight_RC.shape))
            parameter.copy_(dense)

    @torch.no_grad()
    def after_step(self, keep: Mapping[str, Mask]) -> None:
        """Take over the dense weights that the optimizer has made; the model's are masked."""
        for name, dense in self.dense.items():
            dense.copy_(self.parameters[name])
            self.show(name, keep[name])

    def show(self, name: str, keep: Mask) -> None:
        self.parameters[name].data.copy_(self.dense[name] * self.soft[name] * keep)

    @torch.no_grad()
    def masks_at(self, progress: float) -> Iterator[tuple[str, Mask]]:
        """(parameter, hard mask) for the dense weights as they are; the model's weights are masked."""
        self.sharpness = SHARPNESS[0] + progress * (SHARPNESS[1] - SHARPNESS[0])
        for name, dense in self.dense.items():
            keep = torch.ones_like(dense, dtype=torch.bool)
            self.soft[name] = torch.ones_like(dense, dtype=torch.float32)
            for matrix in self.matrices[name]:
                self._mask(matrix.view_of(dense), matrix.view_of(keep), matrix.view_of(self.soft[name]), min(1.0, progress / FALL))
            self.show(name, keep)
            yield name, keep

    def _mask(self, weight_RC: Tensor, keep_RC: Mask, soft_RC: Tensor, fallen: float) -> None:
        """Fill in the hard and the soft mask of one matrix. fallen: share of the fall that is done."""
        rows, columns = weight_RC.shape
        size_RC = weight_RC.float().abs()
        drop = round(fallen * self.pattern.dropped(rows, columns, self.goal))
        keep_RC.copy_(masked_further(size_RC, torch.ones_like(keep_RC), self.pattern, drop))
        value_GW = self.groups(size_RC / scale_of(weight_RC))
        soft_RC.copy_(soft_top_k(value_GW, (1 - drop / weight_RC.numel()) * value_GW.shape[1], self.sharpness).view(size_RC.shape))

    def groups(self, view_RC: Tensor) -> Tensor:
        """[G, W]: what shares one budget."""
        return view_RC.reshape(-1, self.pattern.unit) if self.pattern.local else view_RC.reshape(1, -1)


def scale_of(weight_RC: Tensor) -> float:
    """The root mean square; 1 of zeros."""
    return float(weight_RC.float().square().mean().sqrt()) or 1.0
