"""Damaged state of a stopped run: the same command ends byte-identical, or says in one line why not."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.runs import TINY, contents, small_text

import llmprune
from llmprune.recipe.reading import read_recipe
from llmprune.run.job import run
from llmprune.run.prepare import prepare
from llmprune.types import Listener

UNSTRUCTURED = TINY | {"method": "wanda", "sparsity": 0.5}
GROUPS = TINY | {"method": "sparsegpt", "pattern": "2:4"}
CHANNELS = TINY | {"quality": "balanced", "pattern": "channels", "sparsity": 0.25}
LAYERS = TINY | {"pattern": "layers", "sparsity": 0.25}
EVERY = {"unstructured": UNSTRUCTURED, "2:4": GROUPS, "channels": CHANNELS, "layers": LAYERS}


class Stop(Exception):
    pass


def flipped(share: float) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(share * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return flip


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped at 0.1": flipped(0.1),
    "flipped at 0.5": flipped(0.5),
    "flipped at 0.9": flipped(0.9),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "grown": grown,
    "gone": Path.unlink,
}


def stopped(root: Path, ask: dict[str, Any]) -> tuple[list[str], dict[str, object]]:
    """(the state files of a run that was stopped after its sixth block, in ``root``/stopped; what it would have become)."""
    small_text(root)
    llmprune.prune(**ask | {"output": "whole"})

    def progress(step: str, done: int, total: int) -> None:
        if (step, done) == ("prune", 6):
            raise Stop

    with pytest.raises(Stop):
        run(prepare(read_recipe(None, ask)), Listener(progress=progress))
    shutil.move("out.partial", "stopped")
    files = sorted(p.relative_to("stopped").as_posix() for p in Path("stopped").rglob("*") if p.is_file())
    return files, contents(Path("whole"))


State = tuple[list[str], dict[str, object]]


@pytest.fixture(scope="module")
def unstructured(tmp_path_factory) -> tuple[Path, State]:
    """(folder, stopped run in it) that the tests of this file share; each leaves ``stopped`` as it was."""
    root = tmp_path_factory.mktemp("unstructured")
    with pytest.MonkeyPatch.context() as before:
        before.chdir(root)
        return root, stopped(root, UNSTRUCTURED)


def begun_again() -> Path:
    """The stopped run in its place, ready to be damaged."""
    for folder in ("out", "out.partial"):
        shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree("stopped", "out.partial"))


def gone_on(file: str, damage: str, ask: dict[str, Any]) -> dict[str, object] | str:
    """The result of the same command after damage to one file, or its one line of refusal."""
    DAMAGES[damage](begun_again() / file)
    try:
        llmprune.prune(**ask)
    except llmprune.LlmpruneError as error:
        return error.message
    return contents(Path("out"))


def cases(files: list[str], most: int | None) -> list[tuple[str, str]]:
    """(file, damage): all, or one damage a file, each kind in turn, for the first files; of the blocks the first and the last."""
    if most is None:
        return [(file, damage) for file in files for damage in DAMAGES]
    files = [file for file in files if not re.fullmatch(r"block-0000[1-4].json", file)]
    return [(file, list(DAMAGES)[number % len(DAMAGES)]) for number, file in enumerate(files)][:most]


@pytest.mark.parametrize(
    ("pattern", "most"),
    [("unstructured", 14), ("2:4", 1), ("channels", 1), *(pytest.param(pattern, None, marks=pytest.mark.slow) for pattern in EVERY)],
)
def test_any_damage_is_noticed(tmp_path, monkeypatch, unstructured, pattern, most):
    root, state = unstructured if pattern == "unstructured" else (tmp_path, None)
    monkeypatch.chdir(root)
    files, wanted = state or stopped(root, EVERY[pattern])
    assert {"block-00005.json", "identity.json", "ratios.json", "windows.safetensors", "output/model.safetensors"} <= set(files)
    for file, damage in cases(files, most):
        assert gone_on(file, damage, EVERY[pattern]) == wanted, (file, damage)


def test_a_record_of_another_run_is_not_believed(monkeypatch, unstructured):
    """Nothing but its hashes says that a stopped run without its identity had another sparsity: names, tensors and windows are the same."""
    monkeypatch.chdir(unstructured[0])
    (begun_again() / "identity.json").unlink()
    report = llmprune.prune(**UNSTRUCTURED | {"sparsity": 0.25})
    assert report.timings.resumed_blocks == 0
    assert report.sparsity == pytest.approx(0.25, abs=1e-3)


def test_only_what_rests_on_the_damage_is_repeated(monkeypatch, unstructured):
    monkeypatch.chdir(unstructured[0])
    for file, kept in (("block-00004.json", 4), ("identity.json", 6), ("windows.safetensors", 6)):
        DAMAGES["flipped at 0.5"](begun_again() / file)
        assert llmprune.prune(**UNSTRUCTURED).timings.resumed_blocks == kept, file


def test_given_token_ids_are_those_that_are_used(tmp_path, monkeypatch):
    """A stopped run's stored windows do not stand in for token ids that are given anew."""
    monkeypatch.chdir(tmp_path)
    small_text(tmp_path)
    ids_NL = torch.arange(64).view(4, 16)
    ask = {k: v for k, v in UNSTRUCTURED.items() if k not in ("samples", "sequence_length")}

    def progress(step: str, done: int, total: int) -> None:
        if (step, done) == ("prune", 2):
            raise Stop

    with pytest.raises(Stop):
        run(prepare(read_recipe(None, ask), ids_NL), Listener(progress=progress))
    with pytest.raises(llmprune.LlmpruneError, match="started with another calibration"):
        llmprune.prune(**ask, calibration=ids_NL + 1)
