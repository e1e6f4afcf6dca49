"""Something done in a child of this process, with a limit of time: what it gave, or how it ended."""

from __future__ import annotations

import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable

MEMORY = 12 << 30  # of addresses: an absurd size fails in the child instead of taking the machine's memory


def forked(work: Callable[[], str], seconds: float) -> tuple[str, str]:
    """("ended", what ``work`` gave), ("traceback", its last lines), ("hang", ""), or ("killed", the signal)."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        _work(work, theirs)
    os.close(theirs)
    said = _read(ours, time.monotonic() + seconds)
    os.close(ours)
    if said is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if said is None:
        return "hang", ""
    if os.WIFSIGNALED(status):
        return "killed", signal.Signals(os.WTERMSIG(status)).name
    return ("ended" if os.WEXITSTATUS(status) == 0 else "traceback"), said


def _work(work: Callable[[], str], pipe: int) -> None:
    """Never returns: nothing of the parent's is to run a second time in the child."""
    code, said = 1, ""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        said, code = work(), 0
    except BaseException:
        said = "".join(traceback.format_exc().strip().splitlines(keepends=True)[-6:])
    finally:
        data = said.encode(errors="replace")
        while data:
            data = data[os.write(pipe, data) :]
        os._exit(code)


def _read(pipe: int, deadline: float) -> str | None:
    """All that comes through the pipe until its end; None when that takes too long."""
    parts = []
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(pipe, 1 << 16)
        if not part:
            return b"".join(parts).decode(errors="replace")
        parts.append(part)
