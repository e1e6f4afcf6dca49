"""Memory of this process: what is resident now, and the peak since the mark was last reset."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def resident() -> int:
    """Bytes resident now, mapped files included."""
    return psutil.Process().memory_info().rss


def forget_peak() -> bool:
    """Reset the high-water mark to what is resident now; False where the system does not allow it."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_resident() -> int | None:
    """Bytes of the high-water mark; None where the system keeps none per process."""
    if sys.platform == "linux":
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
