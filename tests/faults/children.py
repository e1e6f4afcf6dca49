"""Commands in forks of this process, which has everything loaded: a run starts at once, and can be killed at any moment.

torch must have computed nothing yet, and be told to use one thread (OMP_NUM_THREADS=1) before it is imported: a fork takes no threads along.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from shortcuts import SKETCHES, load_here

from llmprune.cli.main import main
from llmprune.evaluation import sample
from llmprune.export.reload import Reloader
from llmprune.report import sections


@dataclass(frozen=True)
class Ended:
    """Exit code (minus the signal's number if one ended it), standard error, seconds."""

    pid: int
    code: int
    said: str
    seconds: float

    @property
    def one_line(self) -> bool:
        """An error is said in one line, with at most one hint and no traceback."""
        lines = self.said.splitlines()
        return sum(line.startswith("error: ") for line in lines) == 1 and "Traceback" not in self.said


def preload() -> None:
    """All that a run imports; its sample is short, and its pictures are sketches. Results are loaded in the run's own process."""
    import transformers.models.llama.modeling_llama
    import transformers.tokenization_utils_tokenizers

    transformers.utils.logging.disable_progress_bar()  # of loading the results
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # in threads of a fork OpenMP fails
    sample.TOKENS = 4  # forwards of the whole model: half the time of these runs
    for name, sketch in SKETCHES.items():
        setattr(sections, name, sketch)
    for name, here in {"start": lambda self: None, "load": load_here}.items():
        setattr(Reloader, name, here)
    assert threading.active_count() == 1, "a fork would lose threads"


def start(words: list[str], folder: Path) -> tuple[int, Path, float]:
    """(process, file of its standard error, time of its start) of one command in a folder."""
    said = folder.parent / f"said-{time.monotonic_ns()}"
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.chdir(folder)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY, 0o600), 2)
            main(words)
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        finally:
            os._exit(code)
    return pid, said, began


def finish(started: tuple[int, Path, float], kill_after: float | None = None) -> Ended:
    """Wait for its end; kill it after so many seconds from its start."""
    pid, said, began = started
    if kill_after is not None:
        time.sleep(max(0.0, began + kill_after - time.monotonic()))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    seconds = time.monotonic() - began
    text = said.read_text(errors="replace") if said.exists() else ""
    said.unlink(missing_ok=True)
    return Ended(pid, os.waitstatus_to_exitcode(status), text, seconds)


def run_child(words: list[str], folder: Path, kill_after: float | None = None) -> Ended:
    return finish(start(words, folder), kill_after)
