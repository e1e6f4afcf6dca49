"""Where hidden states are kept between blocks: the device, RAM, or a file."""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Hashable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from llmprune.checkpoint.files import read_range, write_range


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
    """Hidden states of each micro-batch, in an unnamed file: read and written, never mapped, deleted with the process."""

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)
        self._places: dict[Hashable, tuple[int, torch.Size, torch.dtype]] = {}
        self._end = 0

    def __getitem__(self, batch: Hashable) -> Tensor:
        start, shape, dtype = self._places[batch]
        return torch.frombuffer(read_range(self._file.fileno(), start, shape.numel() * dtype.itemsize, "hidden states"), dtype=dtype).view(shape)

    def __delitem__(self, batch: Hashable) -> None:
        """Nothing: no one else needs its memory."""

    def __setitem__(self, batch: Hashable, hidden_NLD: Tensor) -> None:
        if self._places.get(batch, (0,))[1:] != (hidden_NLD.shape, hidden_NLD.dtype):  # some models continue in float32 after the first block
            self._places[batch] = (self._end, hidden_NLD.shape, hidden_NLD.dtype)
            self._end += hidden_NLD.nbytes
        data = hidden_NLD.cpu().contiguous().view(-1).view(torch.uint8).numpy()
        write_range(self._file.fileno(), self._places[batch][0], data)


def memory_limit() -> int:
    """Bytes this process may still allocate: free RAM, or the rest of its control group's or address space's limit."""
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
    """Where to keep one generation of hidden states of ``size`` bytes: the compute device, RAM, or a file; two generations must fit in half."""
    for place in (device, torch.device("cpu")):
        if 4 * size < memory_of(place):
            return MemoryHidden(place)
    return FileHidden(folder)
