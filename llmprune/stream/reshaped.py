"""A stream that shows blocks as structured pruning leaves them, where zeros cannot express it: without experts, or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.stream.stream import Stream
from llmprune.structured.slicing import Keeps, rebuild
from llmprune.structured.structure import Structure


class Passed(nn.Module):
    """Stands in for a dropped block."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class Reshaped:
    """Another stream's blocks, rebuilt with the units in ``keeps``; those that are ``dropped`` pass on their inputs.
    ``width``: the residual channels that come from the embeddings; the others start as zeros, and the blocks write nothing to them.
    """

    def __init__(self, stream: Stream, structure: Structure) -> None:
        self.stream = stream
        self.walk = stream.walk
        self.names = stream.names
        self.scratch = stream.scratch
        self.structure = structure
        self.keeps: dict[int, Keeps] = {}
        self.dropped: frozenset[int] = frozenset()
        self.width: Tensor | None = None
        self.towers = stream.towers

    def path_of(self, index: int) -> str:
        return self.stream.path_of(index)

    @contextmanager
    def block(self, index: int, dense: bool = False) -> Iterator[nn.Module]:
        if index in self.dropped and not dense:
            yield Passed()
            return
        with self.stream.block(index, dense) as block:
            if index in self.keeps and not dense:
                yield self.rebuilt(index, block)
            else:
                yield block

    def rebuilt(self, index: int, block: nn.Module) -> nn.Module:
        """A loaded block without its dropped units."""
        device = next(block.parameters()).device
        return rebuild(block, self.structure.config, index, self.structure.spaces[index], self.keeps[index]).to(device)

    def outer(self, towers: bool = False) -> AbstractContextManager[None]:
        return self.stream.outer(towers)

    def whole(self) -> AbstractContextManager[None]:
        return self.stream.whole()

    def stored_dtype(self, index: int, parameter: str) -> torch.dtype:
        return self.stream.stored_dtype(index, parameter)

    def stored_rows(self, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.stream.stored_rows(numbers)

    def keep(self, index: int, parameters: Iterable[str], again: bool = False) -> dict[str, str]:
        return self.stream.keep(index, parameters, again)

    def trial(self) -> AbstractContextManager[None]:
        return self.stream.trial()

    def device_of(self, index: int) -> torch.device:
        return self.stream.device_of(index)
