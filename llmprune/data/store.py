"""The windows of a run, kept beside its journal so that a resumed run does not tokenise again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from llmprune.checkpoint.files import write_whole
from llmprune.data.windows import Documents, RunData, Windows
from llmprune.model.pictures import Seen

NAME = "windows.safetensors"
STANDS_IN = "stands in"  # no argument of a forward is called so


def save_windows(folder: Path, data: RunData, asked: str) -> None:
    """Write all windows of a run, unless they are there already. asked: identifies the request that they are for."""
    if load_windows(folder, asked, data.identities) is None:
        every = data.all()
        names = [[about(w), w.sha256] for w in every]
        said = {"names": names, "held": data.held is not None, "asked": asked, "identities": data.identities}
        write_whole(folder / NAME, save(tensors_of(every), {"windows": json.dumps(said)}))


def load_windows(folder: Path, asked: str, identities: dict[str, str | None]) -> RunData | None:
    """The windows that save_windows wrote for the same request, files and data sets, or None when they are absent or damaged. A data set whose
    identity is unknown now (the Hub is out of reach) counts as unchanged.
    """
    try:
        with safe_open(folder / NAME, "pt") as file:
            said = json.loads(file.metadata()["windows"])
            every = [restored(file, i, **name[0]) for i, name in enumerate(said["names"])]
        sound = said["asked"] == asked and [w.sha256 for w in every] == [name[-1] for name in said["names"]]
        then = said["identities"]
        sound = sound and then.keys() == identities.keys() and all(then[name] == now or None in (then[name], now) for name, now in identities.items())
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not sound:
        return None
    held = every.pop() if said["held"] else None
    return RunData(every[0], tuple(every[1:]), held, then)


def about(windows: Windows) -> dict[str, Any]:
    """What is known of windows besides their tokens and what is seen with them, as JSON."""
    names = ("dataset", "split", "drawn_from", "left_out", "bos", "skipped")
    return {name: getattr(windows, name) for name in names} | {"documents": windows.documents and asdict(windows.documents)}


def tensors_of(every: Sequence[Windows]) -> dict[str, Tensor]:
    """Token ids by the number of the windows, and what is seen by that, the window and the name of an argument."""
    found = {str(i): w.ids_NL.contiguous() for i, w in enumerate(every)}
    for i, windows in enumerate(every):
        for n, seen in enumerate(windows.seen):
            if seen:
                found[f"{i}/{n}/{STANDS_IN}/{seen.count}"] = seen.stands_in_L.contiguous()
                found |= {f"{i}/{n}/{name}": tensor.contiguous() for name, tensor in seen.inputs.items()}
    return found


def restored(file: Any, number: int, documents: dict[str, Any] | None, **about: Any) -> Windows:
    """The windows of one number, from an opened file of ``tensors_of``."""
    ids_NL = file.get_tensor(str(number)).clone()
    inputs: dict[int, dict[str, Tensor]] = {}
    for key in file.keys():  # noqa: SIM118  it is no dict
        at, *place = key.split("/", 2)
        if place and int(at) == number:
            inputs.setdefault(int(place[0]), {})[place[1]] = file.get_tensor(key).clone()
    seen = tuple(_seen(inputs[n]) if n in inputs else None for n in range(len(ids_NL)))
    packed = documents and Documents(documents["form"], tuple(documents["begun"]), tuple(documents["cut"]))
    return Windows(ids_NL, seen=seen if inputs else (), documents=packed or None, **about)


def _seen(tensors: dict[str, Tensor]) -> Seen:
    (marked,) = [name for name in tensors if name.startswith(f"{STANDS_IN}/")]
    stands_in_L = tensors.pop(marked)
    return Seen(tensors, stands_in_L, int(marked.rpartition("/")[2]))
