"""Recipe files: each that is shipped runs, they agree with their schema, and the commands that check and begin them."""

from __future__ import annotations

import importlib.util
import json
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.runner import ROOT, Cli
from families import FAMILIES, uneven
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmprune.checkpoint.resolve import BUNDLED
from llmprune.recipe.files import schema
from llmprune.recipe.reading import read_recipe

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
SCHEMA = ROOT / "recipes" / "recipe.schema.json"
MIXTURES = [recipe for recipe in RECIPES if recipe.stem.startswith("mixtral")]
KINDS = {"string": str, "number": (int, float), "integer": int, "boolean": bool, "array": list, "object": dict}


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    """A tiny random Mixtral with the bundled model's tokenizer."""
    kind, values = FAMILIES["mixtral"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values | {"vocab_size": 2048, "max_position_embeddings": 512}))
    uneven(model)
    model.save_pretrained(tmp_path / "mixtral")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / "llama" / name, tmp_path / "mixtral" / name)
    return tmp_path / "mixtral"


LONG = ("best-2of4", "within-5-percent", "mixed-2of4-40", "iterative-70")


def runs() -> Iterator[Any]:
    """Each recipe and further flags; one that distils does so in few steps, and as it says where there is time."""
    for recipe in (recipe for recipe in RECIPES if recipe not in MIXTURES):
        distils = "polish_steps" in tomllib.loads(recipe.read_text())
        marks = [pytest.mark.slow] if recipe.stem in LONG else []
        fewer = ("--polish-steps", 3) if distils else ("--rounds", 2, "--recover-steps", 1) if "rounds" in tomllib.loads(recipe.read_text()) else ()
        yield pytest.param(recipe, fewer, id=recipe.stem, marks=marks)
        if distils:
            yield pytest.param(recipe, (), id=f"{recipe.stem} in full", marks=pytest.mark.slow)


@pytest.mark.parametrize(("recipe", "flags"), [*runs()])
def test_every_recipe_runs(cli: Cli, small: tuple[object, ...], recipe: Path, flags: tuple[object, ...]) -> None:
    ran = cli("--recipe", recipe, "--output", "out", *small, *flags)
    assert ran.code == 0, ran.err
    report = json.loads(Path("out/llmprune.json").read_text())
    if report["smaller"] is not None:
        model = AutoModelForCausalLM.from_pretrained("out")
        assert sum(p.numel() for p in model.parameters()) == report["smaller"]["parameters"] < report["sparsity"]["parameters"]
        return
    for row in (row for block in report["blocks"] for row in block["rows"]):
        assert row["zeros"] == round(row["asked"] * row["rows"] * row["columns"])
    mixed = "2of4-40" in recipe.stem  # whole matrices of one pattern: a little less than was asked for
    assert report["sparsity"]["pruned_matrices"] == pytest.approx(report["sparsity"]["asked"], abs=0.01 if mixed else 1e-4)


@pytest.mark.parametrize("recipe", MIXTURES, ids=lambda p: p.stem)
def test_every_recipe_for_mixtures_leaves_what_it_says(cli: Cli, small: tuple[object, ...], mixtral: Path, recipe: Path) -> None:
    words = ("--model", mixtral, "--calibration", BUNDLED / "calibration.txt", "--output", "out")
    ran = cli("--recipe", recipe, *words, *small)
    assert ran.code == 0, ran.err
    before, after = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (mixtral, "out"))
    if "half-experts" in recipe.stem:
        assert 2 * after.config.num_local_experts == before.config.num_local_experts
        return
    dense = before.state_dict()
    for name, value in after.state_dict().items():
        if "experts" in name:
            assert int((value.reshape(-1, 4) != 0).sum(1).max()) == 2, name
        else:
            assert torch.equal(value, dense[name]), name


def test_the_schema_is_up_to_date() -> None:
    assert json.loads(SCHEMA.read_text()) == schema(), "llmprune recipe schema > recipes/recipe.schema.json"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_names_the_schema_and_keeps_to_it(recipe: Path) -> None:
    assert recipe.read_text().splitlines()[0] == f"#:schema ./{SCHEMA.name}"
    known = json.loads(SCHEMA.read_text())["properties"]
    for key, value in tomllib.loads(recipe.read_text()).items():
        kinds = known[key].get("anyOf", [known[key]])
        assert any(isinstance(value, KINDS[kind["type"]]) if "type" in kind else True for kind in kinds), key
        assert value in known[key].get("enum", [value]), key


@pytest.mark.skipif(importlib.util.find_spec("jsonschema") is None, reason="jsonschema is not installed")
def test_the_schema_takes_what_a_run_takes() -> None:
    import jsonschema

    checker = jsonschema.Draft7Validator(json.loads(SCHEMA.read_text()))
    jsonschema.Draft7Validator.check_schema(checker.schema)
    for recipe in RECIPES:
        checker.validate(tomllib.loads(recipe.read_text()))
    for good in ({"sparsity": "50%"}, {"target_params": "900M"}, {"pattern": "block:4x4"}, {"solver": "admm+reconstruct"}, {"ratios": {"a": 0.5}}):
        assert checker.is_valid(good), good
    for bad in ({"push": "me/mine"}, {"sparsty": 0.5}, {"pattern": "2-4"}, {"samples": 0}, {"quality": "best"}, {"shuffle": "yes"}):
        assert not checker.is_valid(bad), bad


def test_check_has_a_line_for_every_file(cli: Cli) -> None:
    ran = cli("recipe", "check", *RECIPES)
    assert (ran.code, ran.err) == (0, "")
    assert [line.endswith(".toml: fine") for line in ran.out.splitlines()] == [True] * len(RECIPES)
    Path("keys.toml").write_text("sparsty = 1\nmodle = 2\n")
    Path("values.toml").write_text("model = 2\nsparsity = 1.5\nsamples = 0\n")
    Path("torn.toml").write_text("model = ")
    ran = cli("recipe", "check", RECIPES[0], "keys.toml", "values.toml", "torn.toml", "absent.toml")
    assert ran.code == 2
    assert "4 of 5 recipes would be refused, first keys.toml" in ran.err
    fine, keys, values, torn, absent = ran.out.splitlines()
    assert fine.endswith("fine")
    assert "keys 'sparsty', 'modle' are unknown" in keys
    assert all(said in values for said in ("model 2: ", "sparsity 1.5: is outside", "samples 0: "))
    assert "not valid TOML" in torn
    assert "No such file" in absent


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--pattern", "2:4", "--quality", "max", "--model", "org/name"),
        ("--pattern", "channels"),
        ("--sparsity", "60%", "--criterion", "wanda", "--solver", "refit", "--allocation", "owl", "--samples", 32),
        ("--method", "sparsegpt", "--calibration", 'a "quoted" \\ name.txt'),
    ],
    ids=["plain", "2of4", "channels", "parts", "quotes"],
)
def test_new_begins_a_recipe_that_asks_for_what_was_said(cli: Cli, words: tuple[object, ...]) -> None:
    assert cli("recipe", "new", "mine.toml", *words).code == 0
    assert cli("recipe", "check", "mine.toml").code == 0
    text = Path("mine.toml").read_text()
    assert cli("recipe", "new", *words).out == text
    flags = {str(flag)[2:]: value for flag, value in zip(words[::2], words[1::2], strict=True)}
    found = read_recipe(Path("mine.toml"), {})
    assert found == read_recipe(None, {"model": "llama"} | ({} if found.sparsity is None else {"sparsity": found.sparsity}) | flags)
    assert all(f"{key} = " in text for key in schema()["properties"])
    again = cli("recipe", "new", "mine.toml", "--pattern", "4:8")
    assert again.code == 2
    assert "mine.toml: exists already" in again.err
    assert Path("mine.toml").read_text() == text


def test_new_refuses_what_a_run_refuses(cli: Cli) -> None:
    ran = cli("recipe", "new", "mine.toml", "--quality", "best")
    assert (ran.code, "quality 'best' is unknown" in ran.err) == (2, True)
    ran = cli("recipe", "new", "absent/mine.toml")
    assert (ran.code, "cannot be written" in ran.err) == (2, True)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("said", [r'ratios = {"\u001f" = false}', r'"\u001b[2J" = 1', r'skip = "\u0007("'])
def test_what_a_terminal_would_act_on_is_escaped(cli: Cli, tmp_path: Path, said: str) -> None:
    (tmp_path / "r.toml").write_text(f'{said}\nmodel = "llama"\nsparsity = 0.5\n')
    ran = cli("--recipe", tmp_path / "r.toml", "--dry-run")
    assert ran.code == 2
    assert all(line.isprintable() for line in ran.err.splitlines())
    assert "\\x" in ran.err


def test_the_schema_is_printed(cli: Cli) -> None:
    assert json.loads(cli("recipe", "schema").out) == schema()


SHELL = sorted((ROOT / "recipes").glob("*.sh"))
SCRIPTS = sorted((ROOT / "recipes").glob("*.py"))


@pytest.mark.parametrize("recipe", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * ("lora" in p.stem)) for p in SHELL])
def test_every_list_of_commands_runs(cli: Cli, small: tuple[object, ...], recipe: Path) -> None:
    """In few steps, on little data."""
    for line in recipe.read_text().splitlines():
        if line.startswith("#"):
            continue
        program, command, *words = shlex.split(line)
        assert program == "llmprune"
        fewer = {"prune": small, "recover": ("--steps", 2, "--batch", 2)}.get(command, ())
        ran = cli(command, *words, *fewer)
        assert ran.code == 0, ran.err


@pytest.mark.parametrize("recipe", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [recipe.name, "--steps", "4", "--output", "out"])
    runpy.run_path(str(recipe))
    found = json.loads(Path("out/llmprune.json").read_text())
    assert found["sparsity"]["pruned_matrices"] == pytest.approx(0.5 if "2of4" in str(recipe.read_text()) else 0.8, abs=1e-3)
    assert AutoModelForCausalLM.from_pretrained("out").num_parameters() == found["sparsity"]["parameters"]
