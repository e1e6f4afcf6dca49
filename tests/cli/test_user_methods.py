"""Methods of the user's own: --criterion my.py:score, --solver my.py:Mine, and in Python the function or the class itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from cli.runner import Cli
from families import tiny_model, tiny_windows
from huggingface_hub import ModelCard

import llmprune
from llmprune.errors import LlmpruneError, RequestError
from llmprune.recipe.reading import read_recipe
from llmprune.types import Pruned

WANDA = '''"""Magnitude times the norm of the input."""

import torch

needs = ("input_sq",)


def score(weight_RC, stats):
    norm_C = torch.sqrt(stats.input_sq_C)
    return weight_RC.abs() * norm_C
'''
HALF = ("--model", "llama", "--sparsity", 0.5)


def test_ten_lines_do_what_our_own_does(cli: Cli, small: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "my.py"
    file.write_text(WANDA)
    ran = cli(*HALF, "--criterion", f"{file}:score", "--output", "own", *small)
    assert ran.code == 0, ran.err
    assert cli(*HALF, "--criterion", "wanda", "--output", "ours", *small).code == 0
    assert Path("own/model.safetensors").read_bytes() == Path("ours/model.safetensors").read_bytes()
    own, ours = (json.loads(Path(folder, "llmprune.json").read_text()) for folder in ("own", "ours"))
    assert own["blocks"] == ours["blocks"]
    name = own["recipe"].pop("criterion")
    assert (name.startswith("my.py:score@"), ours["recipe"].pop("criterion")) == (True, "wanda")
    assert own["recipe"] == ours["recipe"]
    card = ModelCard.load("own/README.md")
    assert name in card.data.tags
    for text in (Path(path).read_text() for path in ("own/llmprune.json", "own/README.md", "own/report.html")):
        assert name in text
        assert "/mine" not in text


def test_a_run_knows_it_by_its_content(tmp_path: Path) -> None:
    names = []
    for place, text in (("a", WANDA), ("b", WANDA), ("c", WANDA.replace("abs()", "square()"))):
        (tmp_path / place).mkdir()
        (tmp_path / place / "my.py").write_text(text)
        flags = {"model": "llama", "sparsity": 0.5, "criterion": f"{tmp_path / place / 'my.py'}:score"}
        names.append(read_recipe(None, flags).resolved()["criterion"])
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def scor(weight_RC, stats): ...", "has no function 'score'"),
        ("score = 3", "has no function 'score'"),
        ("import no_such_package", "does not import (ModuleNotFoundError: No module named 'no_such_package')"),
        ("def score(:", "does not import (SyntaxError"),
        ("open('absent.txt')", "does not import (FileNotFoundError"),
        ("needs = 'inputs'\ndef score(weight_RC, stats): return weight_RC.abs()", "needs 'inputs' is unknown"),
        ("needs = 3\ndef score(weight_RC, stats): return weight_RC.abs()", "needs 3 is unknown"),
        ("def score(weight_RC): return weight_RC.abs()", "raises TypeError"),
        ("def score(weight_RC, stats): return weight_RC * stats.input_sq_C", "raises TypeError"),
        ("def score(weight_RC, stats): return 1.0", "gives float, not a tensor"),
        ("def score(weight_RC, stats): return weight_RC.abs().sum(1)", "gives scores [3] for weights [3, 8]"),
        ("def score(weight_RC, stats): return weight_RC > 0", "gives bool, not floating-point scores"),
        ("def score(weight_RC, stats): return weight_RC.log()", "gives scores that are NaN"),
        ("def score(weight_RC, stats): return weight_RC.abs_()", "changes its weights in place"),
        (
            "needs = ('input_sq',)\ndef score(weight_RC, stats): return weight_RC.abs() * stats.input_sq_C.sqrt_()",
            "changes input_sq_C in place",
        ),
    ],
)
def test_what_is_no_criterion_is_refused_before_any_work(cli: Cli, text: str, says: str) -> None:
    Path("my.py").write_text(text)
    ran = cli(*HALF, "--criterion", "my.py:score", "--output", "out")
    assert ran.code == 2
    assert f"error: criterion my.py{':score' if says.startswith(('needs', 'raises', 'gives', 'changes')) else ''}: {says}" in ran.err
    assert ran.err.count("error:") == ran.err.count("hint:") == 1
    assert "Traceback" not in ran.err
    assert {p.name for p in Path().iterdir()} == {"my.py"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--criterion", "absent.py:score"), "criterion absent.py: No such file"),
        (("--criterion", "my.py"), "names no function"),
        (("--criterion", ":score"), "names no function"),
        (("--criterion", "my.py:score", "--quality", "fast"), "quality together with criterion or solver"),
        (("--criterion", "my.py:score", "--solver", "sparsegpt"), "ranks by its own saliency, not by 'my.py:score@"),
        (("--criterion", "my.py:score", "--pattern", "layers"), "is unknown"),
        (("--recipe", "r.toml"), "recipe r.toml: criterion 'my.py:score' is user code, which no recipe may run"),
    ],
)
def test_where_it_does_not_go(cli: Cli, words: tuple[str, ...], says: str) -> None:
    Path("my.py").write_text(WANDA)
    Path("r.toml").write_text('criterion = "my.py:score"\n')
    ran = cli(*HALF, *words, "--output", "out")
    assert (ran.code, says in ran.err) == (2, True), ran.err
    assert not Path("out").exists()


def test_a_draft_of_a_recipe_names_no_code(cli: Cli) -> None:
    ran = cli("recipe", "new", "--criterion", "my.py:score")
    assert (ran.code, "which no recipe may run" in ran.err) == (2, True)


def test_scores_that_go_wrong_in_the_middle_stop_the_run(cli: Cli, small: tuple[object, ...]) -> None:
    Path("my.py").write_text("def score(weight_RC, stats): return weight_RC.abs() / (len(weight_RC) < 200) - 1 / (len(weight_RC) < 200)")
    ran = cli(*HALF, "--criterion", "my.py:score", "--output", "out", *small)
    assert ran.code == 3
    assert "error: criterion my.py:score: raises ZeroDivisionError" in ran.err
    assert not Path("out").exists()


def by_input_energy(weight_RC, stats):
    return weight_RC.square() * stats.input_sq_C


by_input_energy.needs = ("input_sq",)


def test_the_function_itself_in_python() -> None:
    """OBD's ranking is that of w^2 * sum x^2."""
    own, ours = tiny_model("llama"), tiny_model("llama")
    report = llmprune.prune(own, 0.5, criterion=by_input_energy, calibration=tiny_windows())
    llmprune.prune(ours, 0.5, criterion="obd", calibration=tiny_windows())
    assert report.recipe["criterion"].startswith("test_user_methods.py:by_input_energy@")
    for (name, value), other in zip(own.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_a_function_without_source_is_refused() -> None:
    space: dict[str, object] = {}
    exec("def score(weight_RC, stats): return weight_RC.abs()", space)
    with pytest.raises(RequestError, match="source cannot be read"):
        llmprune.prune(tiny_model("llama"), 0.5, criterion=space["score"], calibration=tiny_windows())
    with pytest.raises(LlmpruneError, match="criterion 3: is not a name"):
        llmprune.prune(tiny_model("llama"), 0.5, criterion=3, calibration=tiny_windows())


SOLVER = '''"""Drops by the score, and says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from llmprune.types import Pruned


@dataclass(frozen=True)
class Mine:
    needs: ClassVar = frozenset()
    own_score: ClassVar = False
    scale: Annotated[float, Field(gt=0)] = 1.0

    def solve(self, weight_RC, score_RC, stats, pattern, drop):
        keep_RC = pattern.project(score_RC * self.scale, drop)
        return Pruned(weight_RC.masked_fill(~keep_RC, 0), keep_RC)
'''


def test_a_solver_in_a_file_does_what_our_own_does(cli: Cli, small: tuple[object, ...]) -> None:
    Path("mine.py").write_text(SOLVER)
    ran = cli(*HALF, "--criterion", "wanda", "--solver", "mine.py:Mine", "--option", "scale=2.0", "--output", "own", *small)
    assert ran.code == 0, ran.err
    assert cli(*HALF, "--criterion", "wanda", "--solver", "mask_only", "--output", "ours", *small).code == 0
    assert Path("own/model.safetensors").read_bytes() == Path("ours/model.safetensors").read_bytes()
    recipe = json.loads(Path("own/llmprune.json").read_text())["recipe"]
    assert recipe["solver"].startswith("mine.py:Mine@")
    assert recipe["options"] == {"solver.scale": 2.0}
    assert not Path("__pycache__").exists()


def test_a_solver_in_a_file_can_be_followed_by_one_over_blocks_and_fits_other_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(SOLVER)
    values = {"model": "llama", "criterion": "wanda"}
    made = read_recipe(None, values | {"sparsity": 0.5, "solver": "mine.py:Mine+reconstruct"}).made()
    assert type(made["block_solver"]).__name__ == "Reconstruct"
    for pattern in ("2:4", "block:4x4", "row", "channels"):
        asked = {} if pattern == "2:4" else {"sparsity": 0.5}
        assert read_recipe(None, values | asked | {"solver": "mine.py:Mine", "pattern": pattern}).made()["solver"].name == "mine.py:Mine"
    first = read_recipe(None, values | {"sparsity": 0.5, "solver": "mine.py:Mine"}).resolved()["solver"]
    Path("mine.py").write_text(SOLVER + "\n")
    assert read_recipe(None, values | {"sparsity": 0.5, "solver": "mine.py:Mine"}).resolved()["solver"] != first


@pytest.mark.parametrize(
    ("was", "now", "says"),
    [
        ("class Mine", "class Other", "mine.py: has no dataclass 'Mine'"),
        ("@dataclass(frozen=True)\n", "", "mine.py: has no dataclass 'Mine'"),
        ("from llmprune.types import Pruned", "from llmprune.types import Prund", "mine.py: does not import (ImportError"),
        ("    own_score: ClassVar = False\n", "", "has no own_score"),
        ("frozenset()", "{'inputs'}", "needs 'inputs' is unknown"),
        ("own_score: ClassVar = False", "own_score: ClassVar = True", "ranks by its own saliency"),
        ("return Pruned(", "return (", "gives tuple, not an llmprune.types.Pruned"),
        ("* self.scale", "* self.scal", "raises AttributeError"),
        ("drop)\n        return", "drop - 1)\n        return", "drops 11 of 24 weights, not 12"),
        ("masked_fill(~keep_RC, 0)", "clone()", "gives weights that are not zero where keep_RC is False"),
        ("masked_fill(~keep_RC, 0)", "masked_fill_(~keep_RC, 0)", "changes its weights in place"),
        ("masked_fill(~keep_RC, 0)", "double()", "gives a weight_RC that is not a float32 tensor [3, 8] on cpu"),
        ("masked_fill(~keep_RC, 0)", "masked_fill(~keep_RC, 0) / 0", "gives weights that are not"),
    ],
)
def test_what_is_no_solver_is_refused_before_any_work(cli: Cli, was: str, now: str, says: str) -> None:
    assert was in SOLVER
    Path("mine.py").write_text(SOLVER.replace(was, now))
    ran = cli(*HALF, "--criterion", "wanda", "--solver", "mine.py:Mine", "--output", "out")
    assert ran.code == 2, ran.err
    assert "error: solver " in ran.err
    assert says in ran.err
    assert ran.err.count("error:") == ran.err.count("hint:") == 1
    assert {p.name for p in Path().iterdir()} == {"mine.py"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--solver", "absent.py:Mine"), "solver absent.py: No such file"),
        (("--solver", "mine.py"), "names no class"),
        (("--solver", "mine.py:Mine+refit"), "only a solver for blocks can follow another"),
        (("--solver", "mine.py:Mine", "--option", "scale=-1"), "option scale -1: input should be greater than 0"),
        (("--solver", "mine.py:Mine", "--option", "scal=1"), "option 'scal' is unknown"),
        (("--recipe", "r.toml"), "recipe r.toml: solver 'mine.py:Mine' is user code, which no recipe may run"),
    ],
)
def test_where_a_solver_does_not_go(cli: Cli, words: tuple[str, ...], says: str) -> None:
    Path("mine.py").write_text(SOLVER)
    Path("r.toml").write_text('solver = "mine.py:Mine"\n')
    ran = cli(*HALF, "--criterion", "wanda", *words, "--output", "out")
    assert (ran.code, says in ran.err) == (2, True), ran.err


def test_a_solver_that_goes_wrong_in_the_middle_stops_the_run(cli: Cli, small: tuple[object, ...]) -> None:
    Path("mine.py").write_text(SOLVER.replace("drop)\n        return", "drop - (len(weight_RC) > 3))\n        return"))
    ran = cli(*HALF, "--criterion", "wanda", "--solver", "mine.py:Mine", "--output", "out", *small)
    assert ran.code == 3
    assert "error: solver mine.py:Mine: drops" in ran.err
    assert not Path("out").exists()


@dataclass(frozen=True)
class BySize:
    needs: ClassVar[frozenset[str]] = frozenset()
    own_score: ClassVar[bool] = True
    times: int = 1

    def solve(self, weight_RC, score_RC, stats, pattern, drop):
        keep_RC = pattern.project(weight_RC.abs() * self.times, drop)
        return Pruned(weight_RC.masked_fill(~keep_RC, 0), keep_RC)


def test_the_class_itself_in_python() -> None:
    own, ours = tiny_model("llama"), tiny_model("llama")
    report = llmprune.prune(own, 0.5, solver=BySize, options={"times": 2}, group="matrix", calibration=tiny_windows())
    llmprune.prune(ours, 0.5, method="magnitude", calibration=tiny_windows())
    assert report.recipe["solver"].startswith("test_user_methods.py:BySize@")
    for (name, value), other in zip(own.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
