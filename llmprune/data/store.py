"""The windows of a run, kept beside its journal so that a resumed run does not tokenise again."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from llmprune.checkpoint.files import write_whole
from llmprune.data.windows import RunData, Windows

NAME = "windows.safetensors"


def save_windows(folder: Path, data: RunData) -> None:
    """Write all windows of a run, unless they are there already."""
    if load_windows(folder) is None:
        every = data.all()
        named = {"names": [[w.dataset, w.split] for w in every], "held": data.held is not None}
        write_whole(folder / NAME, save({str(i): w.ids_NL.contiguous() for i, w in enumerate(every)}, {"windows": json.dumps(named)}))


def load_windows(folder: Path) -> RunData | None:
    """What save_windows wrote, or None when it is absent or damaged."""
    try:
        with safe_open(folder / NAME, "pt") as file:
            named = json.loads(file.metadata()["windows"])
            every = [Windows(file.get_tensor(str(i)).clone(), *name) for i, name in enumerate(named["names"])]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    held = every.pop() if named["held"] else None
    return RunData(every[0], tuple(every[1:]), held)
