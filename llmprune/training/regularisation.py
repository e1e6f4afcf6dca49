"""Penalties that make weights and norm scales small while a model is trained, so that less is lost when they are pruned.

    dL/dw += l1 sign(w)                  of the weights of the blocks' matrices
    dL/dg += norm_scale sign(1 + g)      or sign(g): of the effective scale of every channel of the blocks' norms

Liu et al., Learning Efficient Convolutional Networks through Network Slimming, https://arxiv.org/abs/1708.06519; a penalty of norm scales is what
``--criterion norm_scale`` prunes channels by. Zeros have the subgradient 0, so masked weights feel nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmprune.errors import RequestError
from llmprune.model.blocks import Walk
from llmprune.statistics.norms import effective_scale, is_norm
from llmprune.training.holding import Handle, local, plain
from llmprune.training.masks import matrices_by_parameter, parameters_of


class RegularisationCallback(TrainerCallback):
    """Adds the subgradients to the gradients right before each step of a Trainer's optimizer, after clipping."""

    def __init__(self, *, l1: float = 0.0, norm_scale: float = 0.0) -> None:
        """l1, norm_scale: factors of the two penalties, at least one of them. Raises RequestError for what is no penalty."""
        if min(l1, norm_scale) < 0 or not l1 + norm_scale < torch.inf or l1 + norm_scale == 0:
            raise RequestError(f"l1 {l1}, norm_scale {norm_scale}", "give a positive factor to one of them, such as l1=1e-5")
        self.l1, self.norm_scale = l1, norm_scale
        self._hook: Handle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Raises RequestError for a model whose blocks have no norms, if those were asked for."""
        self._let_go()
        weights = parameters_of(model, matrices_by_parameter(model)).values() if self.l1 else ()
        scales = norm_scales_of(model) if self.norm_scale else {}
        if self.norm_scale and not scales:
            raise RequestError(f"{type(model).__name__}: its blocks have no norms with a scale", "omit norm_scale")

        @torch.no_grad()
        def add(*_: Any) -> None:
            for weight in weights:
                penalise(weight, 0.0, self.l1)
            for scale, offset in scales.items():
                penalise(scale, offset, self.norm_scale)

        self._hook = plain(optimizer).register_step_pre_hook(add)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None


def penalise(parameter: Tensor, offset: float, factor: float) -> None:
    """Add the subgradient of ``factor`` times the sum of |offset + value| to a parameter's gradient, if it has one."""
    if parameter.grad is not None:
        local(parameter.grad).add_((local(parameter.detach()) + offset).sign(), alpha=factor)


def norm_scales_of(model: PreTrainedModel) -> dict[nn.Parameter, float]:
    """The scales of the blocks' norms, each with what its norm adds to it: 1 in Gemma, 0 in most. Raises RequestError for a sharded model."""
    norms = [module for block in Walk(model).blocks for module in block.modules() if is_norm(module)]
    if any(isinstance(norm.get_parameter("weight"), DTensor) for norm in norms):
        raise RequestError("norm_scale with sharded parameters", "train in one process or by DDP")
    return {norm.get_parameter("weight"): offset_of(norm) for norm in norms}


@torch.no_grad()
def offset_of(norm: nn.Module) -> float:
    """Effective scale minus weight, measured: a whole number."""
    weight = norm.get_parameter("weight")
    return float(round(float((effective_scale(norm) - weight.float()).mean())))
