"""Processes that are forks of the test's own: everything is imported in them from the start, which else takes most of a command's time.

For tests that need another process (one that is killed, measured, or asked for figures), but do not ask whether a fresh interpreter finds everything.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch


class Fork:
    """What ``subprocess.Popen`` is to a fresh process, with text in its three pipes. Nothing runs in it after ``work``."""

    def __init__(self, work: Callable[[], object]) -> None:
        pipes = [os.pipe() for _ in range(3)]
        (to_read, to_write), (out_read, out_write), (err_read, err_write) = pipes
        self.returncode: int | None = None
        self._said: tuple[str, str] | None = None
        self.pid = os.fork()
        if self.pid == 0:
            for target, pipe in enumerate((to_read, out_write, err_write)):
                os.dup2(pipe, target)
            for pipe in (handle for pair in pipes for handle in pair):
                os.close(pipe)
            _end_by(work)
        for pipe in (to_read, out_write, err_write):
            os.close(pipe)
        self.stdin, self.stdout, self.stderr = os.fdopen(to_write, "w"), os.fdopen(out_read), os.fdopen(err_read)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """(rest of its output, of its errors) once it has ended, then and whenever asked again."""
        if self._said is not None:
            return self._said
        found: dict[str, str] = {}
        reader = threading.Thread(target=lambda: found.update(err=self.stderr.read()))
        reader.start()
        out = self.stdout.read()
        reader.join()
        self.wait()
        with suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()
        self.stderr.close()
        self._said = (out, found["err"])
        return self._said


def _end_by(work: Callable[[], object]) -> None:
    """Never returns: nothing of the parent's is to run a second time in the child. pytest's stand-ins for the three streams stay behind."""
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    code = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def running(work: Callable[[], object]) -> Iterator[Fork]:
    """A fork that is killed at the end of the ``with`` block, if it has not ended."""
    assert torch.get_num_threads() == 1, "a fork takes no threads along"
    fork = Fork(work)
    try:
        yield fork
    finally:
        fork.kill()
        fork.communicate()
