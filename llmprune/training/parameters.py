"""Which parameters a recovery trains, and what they would be saved as.

all     every parameter of the model, under its masks
norms   norm scales and biases alone
lora    low-rank adapters of the block matrices (training/lora.py), norm scales and biases
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.errors import RequestError
from llmprune.maths.masked_adam import vectors
from llmprune.training.lora import ALPHA, RANK, Adapters
from llmprune.training.masks import Masks, matrices_by_parameter

PARAMETERS = ("all", "norms", "lora")


class Trained:
    """The parameters of a model that are trained, by name; the others are frozen. masks: what has to be held while they are.

    stored: name -> the dtype that a parameter is saved in.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        masks: Masks,
        kind: str,
        stored: Callable[[str], torch.dtype],
        rank: int = RANK,
        alpha: float = ALPHA,
        seed: int = 0,
    ) -> None:
        self.model, self.kind, self._stored = model, kind, stored
        model.requires_grad_(False)
        self.adapters: Adapters | None = None
        plain = {name: p for name, p in model.named_parameters() if p.is_floating_point()} if kind == "all" else vectors(model)
        if not plain and kind == "norms":
            raise RequestError(f"parameters norms: {type(model).__name__} has neither norm scales nor biases", "--parameters all, or lora")
        if kind == "lora":
            adapted = matrices_by_parameter(model)
            self.adapters = Adapters.attach(model, {name: masks.keep.get(name) for name in adapted}, rank, alpha, seed)
        for parameter in plain.values():
            parameter.requires_grad_(True)
        self._plain = plain
        self.masks = Masks({name: mask for name, mask in masks.keep.items() if name in plain}, masks.unrecorded)

    @property
    def count(self) -> int:
        """Numbers that are trained; masked weights are not."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad) - self.masks.masked

    @torch.no_grad()
    def values(self) -> dict[str, Tensor]:
        """Each parameter as it would be saved now, on the CPU; adapters merged."""
        merged = self.adapters.merged() if self.adapters else {}
        return {name: value.detach().to("cpu", self._stored(name), copy=True) for name, value in (self._plain | merged).items()}

    @contextmanager
    def showing(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the model computes with these values, which ``values`` has given."""
        before = {name: parameter.data for name, parameter in self._plain.items()}
        for name, parameter in self._plain.items():
            parameter.data = values[name].to(parameter)
        try:
            if self.adapters:
                with self.adapters.showing(values):
                    yield
            else:
                yield
        finally:
            for name, parameter in self._plain.items():
                parameter.data = before[name]

    @torch.no_grad()
    def settle(self, values: Mapping[str, Tensor]) -> None:
        """Give the model these values for good; adapters are merged and gone."""
        if self.adapters:
            self.adapters.detach()
        for name, value in values.items():
            self.model.get_parameter(name).copy_(value)

    def release(self) -> None:
        """Give the model its own parameters back, whatever has interrupted the training; nothing of a settled one changes."""
        if self.adapters:
            self.adapters.detach(merge=False)

    def state(self) -> dict[str, Tensor]:
        """All that is trained, by the names that the model has for it now: what a checkpoint of the training holds."""
        return {name: p.detach().cpu().contiguous() for name, p in self.model.named_parameters() if p.requires_grad}
