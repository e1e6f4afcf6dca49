"""What a run has finished: small files in ``OUT.partial`` that let the same command go on after any interruption.

OUT.partial/ lock  identity.json  windows.safetensors  dense.json  block-00000.json ...  output/ (the checkpoint in the making)
    smaller/ (the same without what structured pruning has masked, written at the end)

A block's tensors are on disk before its record is. Hidden states are not kept: they are recomputed through the finished blocks, which is
deterministic and needs one forward instead of a file of their size at every block.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from llmprune.checkpoint.files import lock_folder, swap_in, to_json, write_whole
from llmprune.errors import RequestError

RECORDS = r"(identity|dense|frontier|ratios|polished|choice|rotated|(block|row)-\d+)\.json"
OWN = re.compile(
    rf"lock|output|smaller|rotated|modules|replaced|hidden-\d+|{RECORDS}(\.tmp)?|(windows|reload-ids|reload-logits)\.safetensors(\.tmp)?"
)


class Journal:
    """The partial folder of one output, held by this process until ``close`` or ``publish``."""

    def __init__(self, output: Path, identity: dict[str, Any], restart: bool) -> None:
        """Open or create ``OUT.partial``. Raises RequestError when another run holds it, or it belongs to another request."""
        self.output = output
        self.folder = partial_folder(output)
        self.weights = self.folder / "output"
        self._lock = lock_folder(self.folder)
        replaced = self.folder / "replaced"
        if replaced.exists() and not output.exists():  # stopped between the two renames of the end
            os.rename(replaced, output)
        if restart:
            self._clear()
        known = self.read("identity")
        if known is None:
            self._clear()
            self.write("identity", identity)
        else:
            self._compare(known, identity)
        self.resumed = known is not None

    def _clear(self) -> None:
        strange = [p.name for p in self.folder.iterdir() if not OWN.fullmatch(p.name)]
        if strange:
            self.close()
            raise RequestError(f"{self.folder.name}: holds {strange[0]!r}, which is no run's state", "move it, or choose another --output")
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def _compare(self, known: dict[str, Any], identity: dict[str, Any]) -> None:
        ours = json.loads(to_json(identity))
        changed = sorted(k for k in known.keys() | ours.keys() if known.get(k) != ours.get(k))
        if changed:
            was, now = known.get(changed[0]), ours.get(changed[0])
            self.close()
            raise RequestError(
                f"{self.folder.name}: begun with another {changed[0]} (then {_short(was)}, now {_short(now)})",
                "repeat the first command to go on, or add --restart to begin anew",
            )

    def read(self, name: str) -> dict[str, Any] | None:
        """A record, or None when it is absent or damaged."""
        try:
            value = json.loads((self.folder / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def write(self, name: str, value: dict[str, Any]) -> None:
        write_whole(self.folder / f"{name}.json", to_json(value))

    @property
    def smaller(self) -> Path:
        return self.folder / "smaller"

    def publish(self, folder: Path | None = None) -> None:
        """Give the finished checkpoint (or ``folder``, inside this one) its name and drop the state."""
        swap_in(folder or self.weights, self.output)
        shutil.rmtree(self.folder)

    def close(self) -> None:
        os.close(self._lock)


def partial_folder(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
