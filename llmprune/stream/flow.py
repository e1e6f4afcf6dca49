"""Calibration windows on their way through the blocks.

Shapes: N = windows, L = tokens of a window, D = hidden width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from llmprune.model.blocks import Interned
from llmprune.model.carried import Call, Carried
from llmprune.stream.hidden_states import FileHidden, MemoryHidden, place_hidden
from llmprune.stream.stream import Stream

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}


def moved_to(device: torch.device, value: Any) -> Any:
    """An argument of a block on ``device``. A mapping is not copied: blocks of some models fill it for later blocks."""
    if type(value) is tuple:
        return tuple(moved_to(device, v) for v in value)
    if isinstance(value, MutableMapping):
        for key in list(value):
            value[key] = moved_to(device, value[key])
        return value
    return send_to_device(value, device)


def with_mappings(call: Call, own: dict[int, Any]) -> Call:
    """A call with copies of its mappings; ``own`` holds the copies by the id of the original."""

    def replaced(value: Any) -> Any:
        if isinstance(value, Carried):
            return replace(value, handed=replaced(value.handed))
        return own.setdefault(id(value), copy(value)) if isinstance(value, MutableMapping) else value

    return replace(call.with_values(replaced), handed=replaced(call.handed))


class Flow:
    """Windows on their way through the blocks: ``hidden`` are the inputs of the next block, ``outputs`` its outputs."""

    def __init__(self, stream: Stream, windows_NL: Tensor, size: int | None = None, dense: bool = False) -> None:
        """size: windows of a micro-batch, else as many as are fast on the device. dense: with all residual channels, whatever the stream drops."""
        device = stream.device_of(0)
        pictures = stream.walk.pictures.with_any(windows_NL)  # such windows come one at a time, since their inputs differ in shape
        size = 1 if pictures else size or max(1, TOKENS_PER_BATCH.get(device.type, 2048) // windows_NL.shape[1])
        self.stream = stream
        self.ids = list(windows_NL.split(size))
        self.calls: list[list[Call]] = []
        interned = Interned()
        stores: list[MemoryHidden | FileHidden] = []
        with stream.outer(towers=pictures):
            for j, ids_NL in enumerate(self.ids):
                hidden_NLD, calls = stream.walk.record(ids_NL.to(device))
                if stream.width is not None and not dense:
                    places = stream.width.to(device)
                    hidden_NLD = torch.zeros_like(hidden_NLD).index_copy_(-1, places, hidden_NLD[..., places])
                if not stores:
                    self.size = hidden_NLD.nbytes * len(self.ids)
                    stores = [place_hidden(self.size, device, stream.scratch) for _ in range(2)]
                stores[0][j] = hidden_NLD
                self.calls.append(interned.batch(calls))
        self.hidden, self.outputs = stores

    def __len__(self) -> int:
        return len(self.ids)

    def dense_twin(self) -> Flow:
        """A second flow of the same windows for the dense model."""
        if self.stream.width is None:
            return self.twin()
        return Flow(self.stream, torch.cat(self.ids), len(self.ids[0]), dense=True)

    def twin(self) -> Flow:
        """A second flow of the same windows, with separate hidden states, and separate mappings that blocks fill for later blocks."""
        other = copy(self)
        other.calls = []
        for calls in self.calls:
            own: dict[int, Any] = {}
            other.calls.append([with_mappings(call, own) for call in calls])
        device = self.stream.device_of(0)
        other.hidden, other.outputs = (place_hidden(self.size, device, self.stream.scratch) for _ in range(2))
        for batch in range(len(self)):
            other.hidden[batch] = self.hidden[batch]
        return other

    def entering(self, index: int, batch: int, hidden_NLD: Tensor | None = None) -> tuple[Tensor, Call]:
        """The arguments of a block for one micro-batch, on its device: ``hidden_NLD`` or else the stored hidden states, and the others."""
        device = self.stream.device_of(index)
        moved = self.calls[batch][index].arguments().with_values(partial(moved_to, device))
        return (self.hidden[batch] if hidden_NLD is None else hidden_NLD).to(device), moved

    def run(self, index: int, block: nn.Module, batch: int, hidden_NLD: Tensor | None = None) -> Tensor:
        """The block's output for one micro-batch."""
        return self.stream.walk.replay(block, *self.entering(index, batch, hidden_NLD))

    def advance(self) -> None:
        """The outputs become the inputs of the next block."""
        self.hidden, self.outputs = self.outputs, self.hidden

    def through(self, index: int, block: nn.Module) -> None:
        """Run the block on every micro-batch and advance to the next block."""
        for batch in range(len(self)):
            self.outputs[batch] = self.run(index, block, batch)
        self.advance()

    def rest(self) -> None:
        """After the last block, for a flow that is kept while others run: free everything but the hidden states, and the device's memory."""
        if isinstance(self.hidden, MemoryHidden):
            waiting = place_hidden(4 * self.size, torch.device("cpu"), self.stream.scratch)  # so that they take a small part of the free memory
            for batch in range(len(self)):
                waiting[batch] = self.hidden[batch]
            self.hidden = waiting
        self.calls, self.outputs = [], self.hidden

    def windows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids [1, L], hidden states [1, L, D]) of every window, on the head's device."""
        device = self.stream.device_of(len(self.stream.names))
        for batch, ids_NL in enumerate(self.ids):
            yield from zip(ids_NL.to(device).split(1), self.hidden[batch].to(device).split(1), strict=True)

    def logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids [1, L], logits [1, L, V]) of every window, after the last block; logits are large, so one window at a time."""
        with self.stream.outer():
            for ids_1L, hidden_1LD in self.windows():
                yield ids_1L, self.stream.walk.logits(ids_1L, hidden_1LD)
