"""Blocks from a checkpoint's files: loaded, run, freed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.checkpoint.loader import Loader
from llmprune.checkpoint.sink import Sink
from llmprune.checkpoint.source import Source
from llmprune.model.blocks import Walk
from llmprune.model.skeleton import build_skeleton
from llmprune.model.wrappers import is_wrapper_type, outermost, towers
from llmprune.stream.heap import Heap
from llmprune.stream.hidden_states import FileHidden, MemoryHidden, place_hidden


class CheckpointStream:
    """Blocks come from safetensors and leave memory after use."""

    resumable = True
    width: Tensor | None = None

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        self.source = source
        self.device = device
        self.dtype = dtype
        self.skeleton: PreTrainedModel = build_skeleton(source.config, dtype, source.blocks)
        self.walk = Walk(self.skeleton)
        self.names = [f"{self.walk.path}.{i}" for i in range(len(self.walk.blocks))]
        self.loader = Loader(source, self.skeleton, self.walk.path, len(self.names), towers(self.skeleton))
        self.scratch: Path | None = None
        self._heap = Heap()
        self._outside: bool | None = None  # what is outside of the blocks is in place; True: with the towers
        for module in self.skeleton.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[leaf] = buffer.to(device)

    @property
    def towers(self) -> dict[str, int]:
        """As ``towers``; where transformers takes the text decoder out of a wrapper, the checkpoint's tensors that it leaves behind."""
        placed, kind = self.loader.parameter_of, str(self.source.config.get("model_type"))
        if not is_wrapper_type(kind) or self.skeleton.config.model_type == kind:
            return towers(self.skeleton)
        return outermost({key: math.prod(e.shape) for key, e in self.source.tensors.items() if key not in placed}, placed)

    def write_to(self, sink: Sink) -> None:
        self.loader.sink = sink

    def finish(self) -> None:
        """Nothing: every block has been written when it was done."""

    def path_of(self, index: int) -> str:
        return [*self.names, self.walk.head_path][index]

    @contextmanager
    def block(self, index: int, dense: bool = False) -> Iterator[nn.Module]:
        if index == len(self.names):
            with self.outer():
                yield self.walk.head
            return
        try:
            yield self.loader.load_block(index, self.device, dense)
        finally:
            self.loader.free_block(index)
            self._heap.after_block()

    @contextmanager
    def outer(self, towers: bool = False) -> Iterator[None]:
        if self._outside is not None and self._outside >= towers:  # in place already
            yield
            return
        self._heap = Heap()  # a pass starts with the embeddings and ends with the head
        try:
            self.loader.load_outer(self.device, towers)
            before, self._outside = self._outside, towers
            yield
        finally:
            self._outside = before
            self.loader.free_outer()

    @contextmanager
    def whole(self) -> Iterator[None]:
        with ExitStack() as places:
            for index in range(len(self.names) + 1):
                places.enter_context(self.block(index))
            yield

    def stored_dtype(self, index: int, parameter: str) -> torch.dtype:
        return self.loader.stored_dtype(f"{self.path_of(index)}.{parameter}")

    def stored_rows(self, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.loader.stored_rows(numbers)

    def keep(self, index: int, parameters: Iterable[str], again: bool = False) -> dict[str, str]:
        assert self.loader.sink is not None
        write = self.loader.sink.write_again if again else self.loader.sink.write
        return write(self.loader.checkpoint_tensors(f"{self.path_of(index)}.{p}" for p in parameters))

    def draft(self) -> Draft:
        return Draft(place_hidden(self.source.bytes, torch.device("cpu"), self.scratch))

    @contextmanager
    def trial(self, draft: Draft | None = None) -> Iterator[None]:
        """Inside, changed tensors are kept in the draft, and are loaded from it when it is passed again."""
        before = self.loader.sink
        self.loader.sink = draft or self.draft()
        try:
            yield
        finally:
            self.loader.sink = before

    def device_of(self, index: int) -> torch.device:
        return self.device


class Draft:
    """Stands in for a sink during a trial: checkpoint tensors, in memory or an unnamed file."""

    def __init__(self, store: MemoryHidden | FileHidden) -> None:
        self.written: set[str] = set()
        self._store = store

    def write(self, tensors: dict[str, Tensor]) -> dict[str, str]:
        for key, tensor in tensors.items():
            self._store[key] = tensor.clone()
            self.written.add(key)
        return {}

    write_again = write

    def read_many(self, keys: list[str]) -> dict[str, Tensor]:
        return {key: self._store[key].clone() for key in keys}
