"""The windows of a run, kept beside its journal so that a resumed run does not tokenise again."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from llmprune.checkpoint.files import write_whole
from llmprune.data.windows import Windows

NAME = "windows.safetensors"


def save_windows(folder: Path, calibration: Windows, evaluation: list[Windows]) -> None:
    """Write all windows of a run, unless they are there already."""
    if load_windows(folder) is None:
        every = [calibration, *evaluation]
        names = json.dumps([[w.dataset, w.split] for w in every])
        write_whole(folder / NAME, save({str(i): w.ids_NL.contiguous() for i, w in enumerate(every)}, {"names": names}))


def load_windows(folder: Path) -> tuple[Windows, list[Windows]] | None:
    """What save_windows wrote, or None when it is absent or damaged."""
    try:
        with safe_open(folder / NAME, "pt") as file:
            names = json.loads(file.metadata()["names"])
            every = [Windows(file.get_tensor(str(i)).clone(), *name) for i, name in enumerate(names)]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    return every[0], every[1:]
