"""Methods that other packages offer by entry points: listed without loading them, found, refused in a line, part of what a run is known by."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmprune import methods
from llmprune.cli.commands import methods as list_methods
from llmprune.errors import RequestError
from llmprune.recipe.files import schema
from llmprune.recipe.reading import read_recipe

CODE = '''"""Keeps all that it can.

Nobody, A made-up paper.
"""

from dataclasses import dataclass

import torch

from llmprune.types import Pruned


@dataclass(frozen=True)
class Theirs:
    power: float = 1.0
    needs = frozenset()
    own_score = False

    def solve(self, weight_RC, score_RC, stats, pattern, drop):
        keep_RC = pattern.project(score_RC**self.power, drop)
        return Pruned(weight_RC.masked_fill(~keep_RC, 0), keep_RC)


@dataclass(frozen=True)
class Stripes:
    """Every k-th column first."""

    k: int = 2
    softly: bool = False
    unit = 1
    tall = 1
    local = False
    levels = ()

    @classmethod
    def parse(cls, text):
        return {"k": int(text.split(":")[1])}

    def at(self, ratio):
        return self

    def dropped(self, rows, columns, sparsity):
        return round(sparsity * rows * columns)

    def project(self, score_RC, drop):
        order = (score_RC + score_RC.max() * (torch.arange(score_RC.shape[1]) % self.k > 0)).flatten().argsort(stable=True)
        keep = torch.ones(score_RC.numel(), dtype=torch.bool)
        keep[order[:drop]] = False
        return keep.view(score_RC.shape)


class Plain: ...
'''
POINTS = """[llmprune.solvers]
theirs = theirs_package:Theirs
plain = theirs_package:Plain
broken = no_such_package:Theirs
admm = theirs_package:Theirs
twice = theirs_package:Theirs

[llmprune.patterns]
stripes:K = theirs_package:Stripes
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A distribution with entry points, on the path."""
    (tmp_path / "theirs_package.py").write_text(CODE)
    for name, points in (("theirs", POINTS), ("others", "[llmprune.solvers]\ntwice = theirs_package:Theirs\n")):
        info = tmp_path / f"{name}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    methods.offered.cache_clear()
    yield
    monkeypatch.undo()
    methods.offered.cache_clear()


def recipe(**values):
    return read_recipe(None, {"model": "llama", "criterion": "wanda"} | values)


def test_they_are_listed_with_their_package_and_not_loaded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.EntryPoint.load", lambda self: pytest.fail(f"{self.name} is loaded"))
    list_methods()
    shown = capsys.readouterr().out
    assert "solvers/theirs: from theirs 1.5" in shown
    assert "patterns/stripes:K: from theirs 1.5" in shown
    assert "solvers/broken: from theirs 1.5" in shown


def test_one_is_shown_with_its_source_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    list_methods("theirs")
    shown = capsys.readouterr().out
    assert "from theirs 1.5\nKeeps all that it can." in shown
    assert "--option power: float = 1.0" in shown


def test_a_name_of_ours_stays_ours() -> None:
    assert recipe(sparsity=0.5, quality="balanced", criterion=None).resolved()["packages"] == {}
    assert methods.find("solvers", "admm").__module__ == "llmprune.solvers.admm"


def test_a_run_by_one_is_known_by_its_package() -> None:
    asked = recipe(sparsity=0.5, solver="theirs", options={"power": 2})
    assert asked.made()["solver"].power == 2.0
    assert asked.resolved()["packages"] == {"theirs": "1.5"}
    assert recipe(sparsity=0.5, solver="refit").resolved()["packages"] == {}


def test_a_pattern_is_spelled_as_its_entry_point_is_named() -> None:
    asked = recipe(sparsity=0.5, pattern="stripes:3", options={"softly": True})
    made = asked.plan().pattern
    assert (made.k, made.softly) == (3, True)
    assert asked.default_output == "llama-stripes-3-0.5"
    assert asked.resolved()["packages"] == {"theirs": "1.5"}
    allowed = schema()["properties"]
    assert "theirs" in allowed["solver"]["enum"]
    assert "stripes:" in allowed["pattern"]["anyOf"][1]["pattern"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"solver": "broken"}, "solver 'broken' of theirs: does not import (ModuleNotFoundError"),
        ({"solver": "plain"}, "solver 'plain' of theirs: theirs_package:Plain is not a dataclass"),
        ({"solver": "twice"}, "solver 'twice' is in several packages: others, theirs"),
        ({"solver": "thiers"}, "solver 'thiers' is unknown"),
        ({"pattern": "stripes"}, "pattern 'stripes' is unknown"),
        ({"solver": "theirs", "options": {"powr": 1}}, "option 'powr' is unknown"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line(values: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError) as refused:
        recipe(**{"sparsity": 0.5} | values)
    assert says in refused.value.message
    assert "\n" not in refused.value.message
    assert refused.value.hint
