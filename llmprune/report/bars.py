"""Progress bars of calls from Python, on a terminal or in a notebook: tqdm's, as transformers and datasets show theirs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm
from transformers.utils.logging import is_progress_bar_enabled

from llmprune.types import SILENT, Listener


@contextmanager
def bars() -> Iterator[Listener]:
    """A bar for each phase. None where nobody looks (a log, a pipe), and where transformers' bars are switched off."""
    if not (is_progress_bar_enabled() and (sys.stderr.isatty() or "ipykernel" in sys.modules)):
        yield SILENT
        return
    shown: list[tqdm] = []

    def progress(phase: str, done: int, total: int) -> None:
        if not shown or shown[-1].desc.removesuffix(": ") != phase or done < shown[-1].n:
            for bar in shown:
                bar.close()
            shown[:] = [tqdm(desc=phase, total=total)]
        shown[-1].update(done - shown[-1].n)

    try:
        yield Listener(progress=progress)
    finally:
        for bar in shown:
            bar.close()
