"""Blocks in order: load, run, free; and where the hidden states wait in between.

Shapes: N = windows, L = tokens of a window, D = hidden width, V = vocabulary.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Hashable, Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.checkpoint.files import read_range, write_range
from llmprune.checkpoint.loader import Loader
from llmprune.checkpoint.sink import Sink
from llmprune.checkpoint.source import Source
from llmprune.heap import Heap
from llmprune.model.blocks import Call, Interned, Walk
from llmprune.model.skeleton import build_skeleton

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}


class Stream(Protocol):
    """A model whose blocks come one at a time. Blocks keep what ``keep`` was told of when they are loaded again."""

    walk: Walk
    names: list[str]  # path of every block

    def path_of(self, index: int) -> str:
        """Path of a block; of the head, which comes after the last one."""
        ...

    def block(self, index: int, dense: bool = False) -> AbstractContextManager[nn.Module]:
        """A block in place (or the head, with all that ``outer`` has); as the source has it if ``dense``."""
        ...

    def outer(self) -> AbstractContextManager[None]:
        """Embeddings, final norm and head in place."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Every block, embeddings, final norm and head in place."""
        ...

    def stored_dtype(self, index: int, parameter: str) -> torch.dtype:
        """The dtype that a block's parameter has on disk (or in the live model)."""
        ...

    def keep(self, index: int, parameters: Iterable[str], again: bool = False) -> dict[str, str]:
        """Store these changed parameters of a loaded block; hashes of what was written. again: after the whole model has been pruned."""
        ...

    def trial(self) -> AbstractContextManager[None]:
        """What is kept inside is forgotten at the end."""
        ...

    def device_of(self, index: int) -> torch.device: ...

    scratch: Path | None  # folder for hidden states that do not fit in memory
    width: Tensor | None  # the residual channels that come from the embeddings, the others start as zeros; None: all


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
        self.loader = Loader(source, self.skeleton, self.walk.path, len(self.names))
        self.scratch: Path | None = None
        self._heap = Heap()
        for module in self.skeleton.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[leaf] = buffer.to(device)

    def write_to(self, sink: Sink) -> None:
        self.loader.sink = sink

    def finish(self) -> None:
        """Nothing is left to write: every block was kept as it was done."""

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
    def outer(self) -> Iterator[None]:
        self._heap = Heap()  # the embeddings begin a pass, the head ends one
        try:
            self.loader.load_outer(self.device)
            yield
        finally:
            self.loader.free_outer()

    @contextmanager
    def whole(self) -> Iterator[None]:
        with ExitStack() as places:
            for index in range(len(self.names) + 1):
                places.enter_context(self.block(index))
            yield

    def stored_dtype(self, index: int, parameter: str) -> torch.dtype:
        return self.loader.stored_dtype(f"{self.path_of(index)}.{parameter}")

    def keep(self, index: int, parameters: Iterable[str], again: bool = False) -> dict[str, str]:
        assert self.loader.sink is not None
        write = self.loader.sink.write_again if again else self.loader.sink.write
        return write(self.loader.checkpoint_tensors(f"{self.path_of(index)}.{p}" for p in parameters))

    def draft(self) -> Draft:
        return Draft(place_hidden(self.source.bytes, torch.device("cpu"), self.scratch))

    @contextmanager
    def trial(self, draft: Draft | None = None) -> Iterator[None]:
        """What is kept inside goes to the draft, and is in place whenever that is given again."""
        before = self.loader.sink
        self.loader.sink = draft or self.draft()
        try:
            yield
        finally:
            self.loader.sink = before

    def device_of(self, index: int) -> torch.device:
        return self.device


class Draft:
    """Stands in for a sink while something is tried out: checkpoint tensors, in memory or a nameless file."""

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


class LiveStream:
    """A model that is in memory already; its weights are changed in place."""

    width: Tensor | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.walk = Walk(model)
        self.names = [f"{self.walk.path}.{i}" for i in range(len(self.walk.blocks))]
        self.scratch: Path | None = None

    def path_of(self, index: int) -> str:
        return [*self.names, self.walk.head_path][index]

    @contextmanager
    def block(self, index: int, dense: bool = False) -> Iterator[nn.Module]:
        yield self.model.get_submodule(self.path_of(index))

    @contextmanager
    def outer(self) -> Iterator[None]:
        yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        yield

    def stored_dtype(self, index: int, parameter: str) -> torch.dtype:
        return self.model.get_submodule(self.path_of(index)).get_parameter(parameter).dtype

    def keep(self, index: int, parameters: Iterable[str], again: bool = False) -> dict[str, str]:
        return {}

    @contextmanager
    def trial(self) -> Iterator[None]:
        places = {path: self.model.get_submodule(path) for path in [*self.names, self.walk.head_path]}
        parameters = {f"{path}.{name}": p for path, place in places.items() for name, p in place.named_parameters()}
        before = place_hidden(sum(p.nbytes for p in parameters.values()), torch.device("cpu"), self.scratch)
        for name, parameter in parameters.items():
            before[name] = parameter.data.clone()
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data.copy_(before[name])

    def device_of(self, index: int) -> torch.device:
        return next(self.model.get_submodule(self.path_of(index)).parameters()).device


class MemoryHidden:
    """Hidden states of each micro-batch, in memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[Hashable, Tensor] = {}

    def __getitem__(self, batch: Hashable) -> Tensor:
        return self._kept[batch]

    def __setitem__(self, batch: Hashable, hidden_NLD: Tensor) -> None:
        self._kept[batch] = hidden_NLD.to(self.device)

    def __delitem__(self, batch: Hashable) -> None:
        del self._kept[batch]


class FileHidden:
    """Hidden states of each micro-batch, in a nameless file: read and written, never mapped, gone with the process."""

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)
        self._places: dict[Hashable, tuple[int, torch.Size, torch.dtype]] = {}
        self._end = 0

    def __getitem__(self, batch: Hashable) -> Tensor:
        start, shape, dtype = self._places[batch]
        return torch.frombuffer(read_range(self._file.fileno(), start, shape.numel() * dtype.itemsize, "hidden states"), dtype=dtype).view(shape)

    def __delitem__(self, batch: Hashable) -> None:
        """Nothing: its place is not needed by others."""

    def __setitem__(self, batch: Hashable, hidden_NLD: Tensor) -> None:
        if self._places.get(batch, (0,))[1:] != (hidden_NLD.shape, hidden_NLD.dtype):  # some models go on in float32 after the first block
            self._places[batch] = (self._end, hidden_NLD.shape, hidden_NLD.dtype)
            self._end += hidden_NLD.nbytes
        data = hidden_NLD.cpu().contiguous().view(-1).view(torch.uint8).numpy()
        write_range(self._file.fileno(), self._places[batch][0], data)


def memory_limit() -> int:
    """Bytes this process may still take: free RAM, or what its control group or its limit of address space leaves."""
    free = psutil.virtual_memory().available
    addresses = resource.getrlimit(resource.RLIMIT_AS)[0]
    if addresses != resource.RLIM_INFINITY:
        free = min(free, addresses - psutil.Process().memory_info().vms)
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            free = min(free, int(Path("/sys/fs/cgroup", limit).read_text()) - int(Path("/sys/fs/cgroup", used).read_text()))
        except (OSError, ValueError):
            continue
    return free


def memory_of(device: torch.device) -> int:
    """Bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_limit()


def place_hidden(size: int, device: torch.device, folder: Path | None) -> MemoryHidden | FileHidden:
    """Where one generation of hidden states of ``size`` bytes goes: the compute device, RAM, or a file; two generations must fit in half."""
    for place in (device, torch.device("cpu")):
        if 4 * size < memory_of(place):
            return MemoryHidden(place)
    return FileHidden(folder)


def moved_to(device: torch.device, value: Any) -> Any:
    """An argument of a block on ``device``. A mapping stays itself: blocks of some models fill it for the blocks after them."""
    if type(value) is tuple:
        return tuple(moved_to(device, v) for v in value)
    if isinstance(value, MutableMapping):
        for key in list(value):
            value[key] = moved_to(device, value[key])
        return value
    return send_to_device(value, device)


def with_mappings(call: Call, own: dict[int, Any]) -> Call:
    """A call with copies of its mappings in their places; ``own`` holds the copies by the id of what they are copies of."""

    def replaced(value: Any) -> Any:
        return own.setdefault(id(value), copy(value)) if isinstance(value, MutableMapping) else value

    return Call(tuple(replaced(a) for a in call.args), {k: replaced(v) for k, v in call.kwargs.items()}, call.keyword)


class Flow:
    """Windows on their way through the blocks: ``hidden`` enters the next block, ``outputs`` has left it."""

    def __init__(self, stream: Stream, windows_NL: Tensor, size: int | None = None) -> None:
        """size: windows of a micro-batch, else as many as are fast on the device."""
        device = stream.device_of(0)
        size = size or max(1, TOKENS_PER_BATCH.get(device.type, 2048) // windows_NL.shape[1])
        self.stream = stream
        self.ids = list(windows_NL.split(size))
        self.calls: list[list[Call]] = []
        interned = Interned()
        stores: list[MemoryHidden | FileHidden] = []
        with stream.outer():
            for j, ids_NL in enumerate(self.ids):
                hidden_NLD, calls = stream.walk.record(ids_NL.to(device))
                if stream.width is not None:
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

    def twin(self) -> Flow:
        """A second flow of the same windows, with hidden states of its own; so too what blocks leave in their calls for blocks behind them."""
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
        """What enters a block with one micro-batch, on its device: ``hidden_NLD`` or else what waits in ``hidden``, and the other arguments."""
        device = self.stream.device_of(index)
        call = self.calls[batch][index]
        moved = Call(moved_to(device, call.args), {k: moved_to(device, v) for k, v in call.kwargs.items()}, call.keyword)
        return (self.hidden[batch] if hidden_NLD is None else hidden_NLD).to(device), moved

    def run(self, index: int, block: nn.Module, batch: int, hidden_NLD: Tensor | None = None) -> Tensor:
        """Hidden states of one micro-batch that leave the block."""
        return self.stream.walk.replay(block, *self.entering(index, batch, hidden_NLD))

    def advance(self) -> None:
        """What left the block enters the next one."""
        self.hidden, self.outputs = self.outputs, self.hidden

    def through(self, index: int, block: nn.Module) -> None:
        """Run the block on every micro-batch and go on to the next block."""
        for batch in range(len(self)):
            self.outputs[batch] = self.run(index, block, batch)
        self.advance()

    def rest(self) -> None:
        """After the last block, for a flow that waits while others go: let go of all but the hidden states, and of the device."""
        if isinstance(self.hidden, MemoryHidden):
            waiting = place_hidden(4 * self.size, torch.device("cpu"), self.stream.scratch)  # a small part of what is free
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
