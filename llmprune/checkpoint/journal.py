"""What a run has finished: small files in ``OUT.partial`` that let the same command resume after any interruption.

OUT.partial/ lock  identity.json  windows.safetensors  dense.json  block-00000.json ...  output/ (the checkpoint in the making)
    rounds/ (results of rounds)  polished/ (finished tensors after distillation)  smaller/ (the checkpoint without what structured pruning has masked)
    checkpoints/  best-000040.safetensors (of a recovery: transformers' own checkpoints, the best candidate)

Every record carries the sha256 of itself together with the run's identity, so that neither a damaged record nor one of another run is trusted. A
block's tensors are on disk before its record is, and the record has their hashes. Finished tensors are not overwritten before the end, so a run
with a damaged block resumes at that block and computes it again with all later ones, which depend on it.
Without its identity a run still recognises its records by their hashes.

Hidden states are not kept: they are recomputed through the finished blocks, which is deterministic and needs one forward instead of a file of their
size for every block.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmprune.checkpoint.files import lock_folder, remove, remove_locked, settle_swap, swap_in, to_json, write_whole
from llmprune.errors import RequestError

RECORDS = r"(identity|published|dense|replay|frontier|ratios|polished|choice|rotated|start|best|saved|trained|measured|(block|row|round)-\d+)\.json"
FIRST = ("recipe", "text")  # of an identity: what was asked for, before what follows from it
UNBOUND = ("identity", "published")  # read before the run's identity is known
OWN = re.compile(
    rf"lock|output|polished|smaller|rotated|rounds|modules|replaced|checkpoints|({RECORDS}|windows\.safetensors|best-\d+\.safetensors)(\.tmp)?"
)


class Journal:
    """The partial folder of one output, held by this process until ``close`` or ``publish``."""

    def __init__(self, output: Path, identity: dict[str, Any], restart: bool) -> None:
        """Open or create ``OUT.partial``. Raises RequestError when another run holds it, or it belongs to another request."""
        self.output = output
        self.folder = partial_folder(output)
        self.weights = self.folder / "output"
        self._run = hashlib.sha256(to_json(identity)).hexdigest()
        self._lock = lock_folder(self.folder)
        settle_swap(self.folder, output)
        if restart:
            self._clear()
        known = self._stored("identity")
        if known is not None:
            self._compare(known, identity)
        self.resumed = known is not None or any(self.read(path.stem) for path in self.folder.glob("*.json"))
        if not self.resumed:
            self._clear()
        if known is None:
            self.write("identity", identity)

    def _clear(self) -> None:
        strange = [p.name for p in self.folder.iterdir() if not OWN.fullmatch(p.name)]
        if strange:
            self.close()
            raise RequestError(f"{self.folder.name}: holds {strange[0]!r}, which is not the state of a run", "move it, or choose another --output")
        for path in self.folder.iterdir():
            if path.name != "lock":
                remove(path)

    def _compare(self, known: dict[str, Any], identity: dict[str, Any]) -> None:
        changed = _difference(known, json.loads(to_json(identity)))
        if changed:
            self.close()
            name, was, now = changed
            raise RequestError(
                f"{self.folder.name}: started with another {name} (then {_short(was)}, now {_short(now)})",
                "repeat the first command to resume it, or add --restart to discard it",
            )

    def read(self, name: str) -> dict[str, Any] | None:
        """A record of this run, or None when it is absent or damaged."""
        return self._stored(name, self._run)

    def write(self, name: str, value: dict[str, Any]) -> None:
        run = "" if name in UNBOUND else self._run
        value = json.loads(to_json(value))  # as it will be read back: keys are strings
        write_whole(self.folder / f"{name}.json", to_json({"sha256": _sealed(value, run), "value": value}))

    def _stored(self, name: str, run: str = "") -> dict[str, Any] | None:
        return _record(self.folder / f"{name}.json", run)

    @property
    def polished(self) -> Path:
        return self.folder / "polished"

    @property
    def smaller(self) -> Path:
        return self.folder / "smaller"

    def publish(self, folder: Path | None = None) -> None:
        """Give the finished checkpoint (or ``folder``, inside this one) its name and drop the state."""
        folder = folder or self.weights
        self.write("published", {"folder": folder.name})
        swap_in(folder, self.output)
        remove_locked(self.folder)

    def discard(self) -> None:
        """Drop a state in which nothing has been done yet."""
        remove_locked(self.folder)

    def close(self) -> None:
        os.close(self._lock)


def partial_folder(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def drop_leftover(output: Path) -> None:
    """Remove what a run that has published ``output`` and crashed in its last clean-up has left beside it; everything else is kept."""
    folder = partial_folder(output)
    with suppress(RequestError, OSError):  # belongs to another run, or may not be removed
        if _left_over(folder):
            lock = lock_folder(folder)
            try:
                if _left_over(folder):
                    remove_locked(folder)
            finally:
                os.close(lock)


def _left_over(folder: Path) -> bool:
    """Its output has been published out of it, or it holds nothing but its lock."""
    names = {path.name for path in folder.iterdir()}
    published = _record(folder / "published.json")
    return names <= {"lock"} or (published is not None and published["folder"] not in names and all(map(OWN.fullmatch, names)))


def _record(path: Path, run: str = "") -> dict[str, Any] | None:
    """The content of a record, or None when it is absent, damaged, or of another run."""
    try:
        record = json.loads(path.read_bytes())
        value, sha256 = record["value"], record["sha256"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return value if isinstance(value, dict) and sha256 == _sealed(value, run) else None


def laid_out(output: Path) -> int:
    """Bytes on the disk of the weights that an interrupted run has laid out."""
    had = 0
    for name in ("output", "polished", "smaller"):
        for path in (partial_folder(output) / name).glob("*.safetensors"):
            with suppress(FileNotFoundError):  # another run has just finished
                had += path.stat().st_blocks * 512
    return had


def _sealed(value: dict[str, Any], run: str) -> str:
    return hashlib.sha256(run.encode() + to_json(value)).hexdigest()


def _difference(known: dict[str, Any], ours: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """(name, value then, value now) of the first field that differs, the request's own fields before those derived from them."""
    for key in sorted(known.keys() | ours.keys(), key=lambda key: (key not in FIRST, key)):
        was, now = known.get(key), ours.get(key)
        if was != now and isinstance(was, dict) and isinstance(now, dict):
            name, was, now = _difference(was, now) or ("", was, now)
            return f"{key}: {name}", was, now
        if was != now:
            return key, was, now
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
