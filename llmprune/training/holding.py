"""An optimizer that cannot touch masked weights: gradients are zeroed where they arise, weights and moments right after each step.

Gradients are masked as they accumulate, so that clipping, decay and several processes see masked ones alone; a masked weight then has neither a
gradient nor a moment, and decay does nothing to a zero. The weight is set to zero once more after the step, since some optimizers (Muon) move
weights that have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from llmprune.errors import RequestError

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a value
PIECE = 1 << 20


class Handle(Protocol):
    """Of a hook."""

    def remove(self) -> None: ...


class Held:
    """Masks in force. ``remove`` lets go of them; ``change`` puts others in their place."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], keep: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        """parameters: by the names that ``keep`` has. Raises RequestError for an optimizer that is none of torch's."""
        self.optimizer = plain(optimizer)
        self.before: Callable[[str, nn.Parameter], None] | None = None  # sees each gradient before it is masked
        self._parameters = dict(parameters)
        self._bits: dict[str, Tensor | None] = {}  # int8: all bits of what is kept, none of what is masked; None: nothing is masked
        self._handles: list[Handle] = [self.optimizer.register_step_post_hook(self._after_step)]
        self._handles += [p.register_post_accumulate_grad_hook(self._on_gradient(name)) for name, p in self._parameters.items() if p.requires_grad]
        self.change(keep)

    def change(self, keep: Mapping[str, Tensor]) -> None:
        """Other masks for some of the parameters, from now on: weights, gradients and moments are zero there when this returns."""
        for name, mask in keep.items():
            parameter = self._parameters[name]
            self._bits[name] = None if bool(mask.all()) else -local(like(mask, parameter)).to(torch.int8)
            self._zero(name, parameter)
            self._mask_gradient(name, parameter)

    def dropped(self, name: str) -> Tensor:
        """bool: True where a weight of this process's part of a parameter is masked."""
        bits = self._bits[name]
        return torch.zeros_like(local(self._parameters[name]), dtype=torch.bool) if bits is None else bits == 0

    def remove(self) -> None:
        """Train on without masks."""
        for handle in self._handles:
            handle.remove()

    def _on_gradient(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if self.before is not None:
                self.before(name, parameter)  # type: ignore[arg-type]
            self._mask_gradient(name, parameter)

        return hook

    def _mask_gradient(self, name: str, parameter: Tensor) -> None:
        bits = self._bits[name]
        if bits is not None and parameter.grad is not None:
            erase(local(parameter.grad), bits)

    def _after_step(self, *_: Any) -> None:
        for name, parameter in self._parameters.items():
            self._zero(name, parameter)

    @torch.no_grad()
    def _zero(self, name: str, parameter: nn.Parameter) -> None:
        """The weight, and what the optimizer keeps for each weight; what it keeps in another form (factored, quantised) is its own affair."""
        bits = self._bits[name]
        if bits is None:
            return
        for value in (parameter, *self.optimizer.state.get(parameter, {}).values()):
            if is_of_weights(value, parameter):
                erase(local(value), bits)


@torch.no_grad()
def erase(values: Tensor, bits: Tensor) -> None:
    """Set values to +0 where ``bits`` is 0, infinities and NaN too; where it is -1 they stay. On a CPU a tenth of masked_fill_'s time."""
    integers = values.detach().view(INTEGERS[values.element_size()])
    if values.is_cpu and values.is_contiguous() and bits.is_contiguous():  # piece by piece: torch widens the bits first, all that it is given
        for piece, of_piece in zip(integers.view(-1).split(PIECE), bits.view(-1).split(PIECE), strict=True):
            piece.bitwise_and_(of_piece)
    else:
        integers.bitwise_and_(bits)


def is_of_weights(value: Any, parameter: nn.Parameter) -> bool:
    """Whether it has a float for every weight."""
    return type(value) in (Tensor, DTensor, nn.Parameter) and value.is_floating_point() and value.shape == parameter.shape


def plain(optimizer: Optimizer) -> Optimizer:
    """The optimizer that accelerate may have wrapped. Raises RequestError where there is none of torch's."""
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if not isinstance(inner, Optimizer):
        raise RequestError(f"masks under {type(inner).__name__}, which keeps weights of its own", "train in one process, by DDP or by FSDP 2")
    return inner


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A mask, or other values of a parameter, where that is: on its device; of a sharded one, sharded the same way (every process has the whole)."""
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None) if isinstance(parameter, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
