"""A CUDA device where there is none: tensors stay in RAM, but those that are said to be on a device may not meet others, as CUDA would have it.

The device is a property of a tensor's storage. A function mode answers ``.device``, ``.to``, ``torch.zeros(device=...)`` and the like; a dispatch
mode looks at every operation, those of backward passes too. Both are entered in every thread that is started meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llmprune.statistics.dataflow import tensors

CPU = torch.device("cpu")
COPIES = {"copy_", "_copy_from", "_foreach_copy_"}
INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_", "_unsafe_index_put"}  # a CPU's index may point into a device
WHOLE = {"cat", "stack"}  # which take no number from the CPU
READS_MEMORY = {Tensor.numpy, Tensor.__array__}
MOVES = {Tensor.cpu: CPU, Tensor.cuda: torch.device("cuda", 0)}
DEVICE, IS_CUDA, IS_CPU = Tensor.device.__get__, Tensor.is_cuda.__get__, Tensor.is_cpu.__get__  # type: ignore[attr-defined]


class Mixed(RuntimeError):
    """An operation that CUDA would refuse."""


class Places:
    """Where storages are said to be. A weak reference keeps a storage's address from being used again."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, torch.device]] = {}

    def of(self, tensor: Tensor) -> torch.device:
        with torch._C.DisableTorchFunction():
            return self._known[tensor.untyped_storage()._cdata][1] if tensor.untyped_storage()._cdata in self._known else tensor.device

    def put(self, tensor: Tensor, device: torch.device) -> None:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            self._known.pop(storage._cdata, None)
            if device.type == "cuda":
                self._known[storage._cdata] = (StorageWeakRef(storage), device)
        if len(self._known) > 100_000:
            self._known = {key: value for key, value in self._known.items() if not value[0].expired()}


class Operations(TorchDispatchMode):
    """Every operation's tensors are on one device, and what it makes is there too."""

    def __init__(self, places: Places, functions: Functions) -> None:
        super().__init__()
        self._places, self._functions = places, functions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = list(tensors((args, kwargs)))
        place = self._common(func.overloadpacket.__name__, args, operands) if operands else self._functions.here
        known = {id(t) for t in operands}
        out = func(*args, **(kwargs or {}))
        for made in tensors(out) if place is not None else ():
            if id(made) not in known:
                self._places.put(made, place)
        return out

    def _common(self, name: str, args: Any, operands: list[Tensor]) -> torch.device | None:
        where = {t: self._places.of(t) for t in operands}
        devices = {place for place in where.values() if place.type == "cuda"}
        if not devices or name in COPIES:
            return where[operands[0]] if devices else None
        free = {id(t) for t in tensors(args[1])} if name in INDEXED and where[args[0]].type == "cuda" else set()
        apart = [t for t, place in where.items() if place == CPU and id(t) not in free and (t.dim() or name in WHOLE)]
        if apart or len(devices) > 1:
            raise Mixed(f"{name}: " + ", ".join(f"{tuple(t.shape)} on {place}" for t, place in where.items()))
        return devices.pop()


class Functions(TorchFunctionMode):
    """What is asked of a device by name."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = places
        self.here: torch.device | None = None  # where a running function of given tensors makes others

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (DEVICE, IS_CUDA, IS_CPU):
            place = self._places.of(args[0])
            return place if func == DEVICE else place.type == ("cuda" if func == IS_CUDA else "cpu")
        if func in READS_MEMORY and self._places.of(args[0]).type == "cuda":
            raise Mixed(f"{func.__name__}: the memory of a device")
        if func is Tensor.to or func in MOVES:
            return self._moved(func, args, kwargs)
        place = None if kwargs.get("device") is None else indexed(kwargs["device"])
        if place is not None and place.type == "cuda":
            kwargs["device"] = CPU
        self.here = next((p for p in map(self._places.of, tensors((args, kwargs))) if p.type == "cuda"), None)
        try:
            out = func(*args, **kwargs)
        finally:
            self.here = None
        made = place or (self._places.of(args[0]) if func is Tensor.new_tensor else None)
        for tensor in tensors(out) if made is not None and made.type != "meta" else ():
            self._places.put(tensor, made)
        for tensor in tensors(out) if kwargs.get("generator") is not None else ():
            if self._places.of(tensor).type == "cuda":
                raise Mixed(f"{func.__name__}: a generator of the CPU for a device")
        return out

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Of ``to`` by device, dtype, or another tensor; in a new storage where the device is another one."""
        tensor, *rest = args
        asked = [*rest, kwargs.get("device"), kwargs.get("dtype"), kwargs.get("other"), MOVES.get(func)]
        other = next((a for a in asked if isinstance(a, Tensor)), None)
        asked += [self._places.of(other), other.dtype] if other is not None else []
        dtype = next((a for a in asked if isinstance(a, torch.dtype)), tensor.dtype)
        place = next((indexed(a) for a in asked if isinstance(a, torch.device | str)), None)
        if place is None or place.type == "meta" or tensor.is_meta:
            return func(*args, **kwargs)
        out = tensor.to(dtype, copy=kwargs.get("copy", False) or place != self._places.of(tensor))
        self._places.put(out, place)
        return out


def indexed(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device("cuda", 0) if device == torch.device("cuda") else device


@contextmanager
def device(free: Callable[[], int] = lambda: 1 << 40) -> Iterator[None]:
    """torch sees cuda:0 and cuda:1, with ``free()`` bytes left."""
    places, start = Places(), threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with Functions(places) as functions, Operations(places, functions):
            start(thread)

    with pytest.MonkeyPatch.context() as patch, Functions(places) as functions, Operations(places, functions):
        patch.setattr(threading.Thread, "run", run)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (free(), 1 << 40))
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        yield
