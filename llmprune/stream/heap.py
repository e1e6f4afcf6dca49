"""Settings of glibc's allocator, so that memory neither grows with the number of blocks nor is returned and fetched again all the time.

Elsewhere (musl, macOS) nothing is done.
"""

from __future__ import annotations

import ctypes
import platform

import psutil

GLIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of mallopt(3)
LARGE = 8 << 20  # tensors from this size on are mapped separately, and returned when they are freed; smaller ones are allocated too often
FIRST = 2  # blocks that show how much memory a block leaves resident
GROWTH = 1.05  # of that, until free memory is returned


def steady() -> None:
    """One heap for all threads, without the large tensors; it shrinks only when trimmed. By default glibc ends up placing tensors of up to 32 MiB
    among small objects that outlive them, gives every thread a separate heap, and returns the end of a heap at every chance.

    It holds for the process until its end, so it is for the command line, never for a library's caller.
    """
    if GLIBC is not None:
        GLIBC.mallopt(M_MMAP_THRESHOLD, LARGE)
        GLIBC.mallopt(M_TRIM_THRESHOLD, 1 << 30)
        GLIBC.mallopt(M_ARENA_MAX, 1)


class Heap:
    """Called after every block of a pass; returns freed memory to the system when more is resident than after the first blocks.

    glibc rarely reuses the holes that aligned tensors leave, so a run would grow from block to block; memory that the next block needs
    again is better kept.
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
