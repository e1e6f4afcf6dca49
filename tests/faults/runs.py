"""Small runs for tests of crashes, and what has to hold of the folder that one has left."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults.disk import LOSSES, Crash, Recorder, Tree, key_of, recorded, write_out

import llmprune
from llmprune.checkpoint.resolve import BUNDLED

TINY: dict[str, Any] = {"model": "llama", "samples": 2, "sequence_length": 16, "eval": ["small.txt"], "output": "out"}


def small_text(folder: Path, characters: int = 800) -> None:
    (folder / "small.txt").write_text((BUNDLED / "evaluation.txt").read_text()[:characters])


def contents(folder: Path) -> dict[str, object]:
    """Every file's bytes; the one field that may differ, timings, is taken out, and so is what the page makes of it."""
    found: dict[str, object] = {p.name: p.read_bytes() for p in folder.iterdir()}
    report = json.loads((folder / "llmprune.json").read_text())
    del report["timings"]
    page, sections = re.subn(r'<section id="timings">.*?</section>', "", (folder / "report.html").read_text(), flags=re.DOTALL)
    assert sections == 1
    return found | {"llmprune.json": report, "report.html": page}


def whole(folder: Path, wanted: dict[str, object]) -> bool:
    """The folder is just the wanted output; a file that cannot even be read is no such output."""
    try:
        return contents(folder) == wanted
    except (OSError, ValueError, AssertionError):
        return False


def record(root: Path, ask: dict[str, Any], overwrite: bool = False, synced: bool = True) -> tuple[Recorder, dict[str, object]]:
    """(what each file operation of a run in ``root`` would have left, the finished output)."""
    os.chdir(root)
    with recorded(root, synced) as recorder:
        llmprune.prune(**ask, overwrite=overwrite)
    return recorder, contents(root / ask["output"])


def distinct(crashes: list[Crash]) -> Iterator[tuple[str, Tree]]:
    """(what happened, what is left) of all crashes that leave something else than one before."""
    seen = set()
    for crash in crashes:
        for loss in LOSSES:
            key = key_of(crash.left[loss])
            if key not in seen:
                seen.add(key)
                yield f"operation {crash.number} ({crash.operation}), {loss}", crash.left[loss]


def fault(tree: Tree, root: Path, ask: dict[str, Any], new: dict[str, object], old: dict[str, object] | None = None) -> str:
    """What is wrong after the same command has run on what a crash has left; "" when nothing is. old: the output that was to be replaced."""
    write_out(tree, root)
    os.chdir(root)
    output = root / ask["output"]
    finished = output.exists() and whole(output, new)
    if output.exists() and not finished and not (old is not None and whole(output, old)):
        return "the output is neither the old one nor the new one"
    try:
        llmprune.prune(**ask, overwrite=old is not None)
    except llmprune.LlmpruneError as error:
        if not (finished and "exists already" in error.message):
            return f"refused: {error.message}"
        if not whole(output, new):
            return "the finished output has changed"
    if not whole(output, new):
        return "the result differs from an uninterrupted run's"
    beside = sorted(path.name for path in root.iterdir() if path.name != "small.txt")
    return "" if beside == [ask["output"]] else f"left behind: {beside}"


def full_at(number: int, root: Path, ask: dict[str, Any]) -> Exception:
    """How a run ends whose disk is full from this file operation on."""
    os.chdir(root)
    try:
        with recorded(root) as recorder:
            recorder.full_at = number
            llmprune.prune(**ask)
    except (OSError, llmprune.LlmpruneError) as error:
        return error
    raise AssertionError("a run that needs no space")
