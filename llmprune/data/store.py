"""The windows of a run, kept beside its journal so that a resumed run does not tokenise again."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from llmprune.checkpoint.files import write_whole
from llmprune.data.windows import RunData, Windows

NAME = "windows.safetensors"


def save_windows(folder: Path, data: RunData, asked: str) -> None:
    """Write all windows of a run, unless they are there already. asked: identifies the request that they are for."""
    if load_windows(folder, asked, data.identities) is None:
        every = data.all()
        names = [[w.dataset, w.split, w.drawn_from, w.sha256] for w in every]
        said = {"names": names, "held": data.held is not None, "asked": asked, "identities": data.identities}
        write_whole(folder / NAME, save({str(i): w.ids_NL.contiguous() for i, w in enumerate(every)}, {"windows": json.dumps(said)}))


def load_windows(folder: Path, asked: str, identities: dict[str, str | None]) -> RunData | None:
    """The windows that save_windows wrote for the same request, files and data sets, or None when they are absent or damaged. A data set whose
    identity is unknown now (the Hub is out of reach) counts as unchanged.
    """
    try:
        with safe_open(folder / NAME, "pt") as file:
            said = json.loads(file.metadata()["windows"])
            every = [Windows(file.get_tensor(str(i)).clone(), *name[:-1]) for i, name in enumerate(said["names"])]
        sound = said["asked"] == asked and [w.sha256 for w in every] == [name[-1] for name in said["names"]]
        then = said["identities"]
        sound = sound and then.keys() == identities.keys() and all(then[name] == now or None in (then[name], now) for name, now in identities.items())
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not sound:
        return None
    held = every.pop() if said["held"] else None
    return RunData(every[0], tuple(every[1:]), held, then)
