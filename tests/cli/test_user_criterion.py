"""A criterion of the user's own: --criterion my.py:score, and the function itself in Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli.runner import Cli
from families import tiny_model, tiny_windows
from huggingface_hub import ModelCard

import llmprune
from llmprune.errors import LlmpruneError, RequestError
from llmprune.recipe.reading import read_recipe

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
    assert report.recipe["criterion"].startswith("test_user_criterion.py:by_input_energy@")
    for (name, value), other in zip(own.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_a_function_without_source_is_refused() -> None:
    space: dict[str, object] = {}
    exec("def score(weight_RC, stats): return weight_RC.abs()", space)
    with pytest.raises(RequestError, match="source cannot be read"):
        llmprune.prune(tiny_model("llama"), 0.5, criterion=space["score"], calibration=tiny_windows())
    with pytest.raises(LlmpruneError, match="criterion 3: is no name"):
        llmprune.prune(tiny_model("llama"), 0.5, criterion=3, calibration=tiny_windows())
