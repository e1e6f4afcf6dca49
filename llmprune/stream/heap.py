"""What glibc's allocator needs to be told so that memory neither grows with the number of blocks nor is fetched anew all the time.

Elsewhere (musl, macOS) nothing is done.
"""

from __future__ import annotations

import ctypes
import platform

import psutil

GLIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of mallopt(3)
LARGE = 8 << 20  # tensors from here on have memory of their own, which goes back when they are freed; smaller ones come and go too often
FIRST = 2  # blocks that show how much memory a block leaves resident
GROWTH = 1.05  # of that, until what is free goes back


def steady() -> None:
    """One heap for all threads, without the large tensors; it shrinks only when trimmed. By itself glibc would come to put tensors of up to 32 MiB
    among small objects that outlive them, give every thread a heap of its own, and give back the end of a heap at every chance.

    It holds for the process until its end, so it is for the command line, never for a library's caller.
    """
    if GLIBC is not None:
        GLIBC.mallopt(M_MMAP_THRESHOLD, LARGE)
        GLIBC.mallopt(M_TRIM_THRESHOLD, 1 << 30)
        GLIBC.mallopt(M_ARENA_MAX, 1)


class Heap:
    """Told after every block of a pass, it returns freed memory to the system when more is resident than after the first blocks.

    glibc hardly finds the holes again that aligned tensors leave, so a run would grow from block to block; what the next block will take
    again is better left.
    """

    def __init__(self) -> None:
        self._blocks = self._level = 0

    def after_block(self) -> None:
        if GLIBC is None:
            return
        resident = psutil.Process().memory_info().rss
        if self._blocks < FIRST:
            self._level = max(self._level, resident)
        elif resident > GROWTH * self._level:
            GLIBC.malloc_trim(0)
        self._blocks += 1
