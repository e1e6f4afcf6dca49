"""docs/architecture.md follows ``--sparsity 0.5`` from the command line to the mask: as the code does."""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import llmprune
from llmprune.patterns.unstructured import Unstructured
from llmprune.recipe.reading import read_recipe

PAGE = Path(__file__).parent.parent.parent / "docs" / "architecture.md"
STEP = re.compile(r"^\d+\. `(llmprune/[\w/]+\.py)`, ((?:`\w+`(?: and )?)+)", re.MULTILINE)


def stack() -> list[tuple[str, str]]:
    """(file, function) of the package's calls that are running, the outermost first."""
    frame, calls = sys._getframe(1), []
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(Path(llmprune.__file__).parent):
            calls.append((path.relative_to(Path(llmprune.__file__).parent.parent).as_posix(), frame.f_code.co_name))
        frame = frame.f_back
    return calls[::-1]


def test_the_walk_is_the_call_stack(cli, small, monkeypatch) -> None:
    section = PAGE.read_text().partition("## A walk")[2].partition("\n## ")[0]
    walk = [(file, re.findall(r"`(\w+)`", functions)) for file, functions in STEP.findall(section)]
    assert len({file for file, _ in walk}) == len(walk) <= 9
    seen: list[tuple[list[tuple[str, str]], float]] = []
    project = Unstructured.project

    def watched(self: Unstructured, score_RC: Any, drop: int) -> Any:
        keep_RC = project(self, score_RC, drop)
        file = ("llmprune/patterns/unstructured.py", "project")
        seen.append(([*stack(), file], 1 - float(keep_RC.float().mean())))
        return keep_RC

    monkeypatch.setattr(Unstructured, "project", watched)
    assert cli("--model", "llama", "--sparsity", 0.5, "--method", "wanda", *small).code == 0
    calls, dropped = seen[0]
    assert dropped == 0.5
    begin = next(i for i, (file, _) in enumerate(calls) if file == walk[0][0])
    assert [file for file, _ in groupby(file for file, _ in calls[begin:])] == [file for file, _ in walk if file != "llmprune/recipe/recipe.py"]
    assert [(file, name) for file, names in walk for name in names if (file, name) not in calls] == [("llmprune/recipe/recipe.py", "plan")]
    assert read_recipe(None, {"model": "llama", "sparsity": "0.5", "method": "wanda"}).plan().sparsity == 0.5
