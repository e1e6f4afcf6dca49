"""The model card: what it says of the licence, how it is loaded and made, and that the Hub can read all of it."""

from __future__ import annotations

import json
import math
import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from cli.hub import metadata_errors
from huggingface_hub import ModelCard

from llmprune.checkpoint.resolve import BUNDLED, open_source
from llmprune.checkpoint.source import Source
from llmprune.publish.card import CARD, card
from llmprune.recipe.reading import read_recipe
from llmprune.recipe.recipe import Recipe
from llmprune.report.result import Report
from llmprune.results import Calibration, Environment, Evaluation, Origin, Perplexity

ON_HUB = {"name": "org/base", "revision": "a" * 40}


def folder(path: Path, **files: str) -> Path:
    shutil.copytree(BUNDLED / "llama", path)
    for name, text in files.items():
        (path / name.replace("_md", ".md")).write_text(text)
    return path


def report_of(recipe: Recipe, source: Source, *values: Perplexity) -> Report:
    return Report(
        recipe=recipe.resolved(),
        source=Origin(source.name, source.revision, {}),
        calibration=Calibration("c4", "train", 128, 2048, 128 * 2048, ""),
        blocks=(),
        perplexity=tuple(Evaluation(v, v, None) for v in values),
        parameters=1000,
        asked=0.5,
        environment=Environment({}, "cpu", "float32", 1, True),
    )


def card_of(source: Source, at: Path, *values: Perplexity, **ask: object) -> ModelCard:
    """The card, which has to pass the Hub's checks whatever it is of."""
    recipe = read_recipe(None, {"model": "x/m", "pattern": "2:4"} | ask)
    text = card(at, report_of(recipe, source, *values), recipe, source)
    assert text == card(at, report_of(recipe, source, *values), recipe, source)
    assert metadata_errors(text) == []
    found = ModelCard(text)
    assert ModelCard(str(found)).data.to_dict() == found.data.to_dict()
    return found


@pytest.mark.parametrize(
    ("files", "on_hub", "said"),
    [
        ({"README_md": "---\nlicense: mit\n---\n"}, False, {"license": "mit"}),
        (
            {"README_md": "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n", "LICENSE": "mine"},
            False,
            {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
        ),
        (
            {"README_md": "---\nlicense: other\nlicense_name: mine\nlicense_link: TERMS.md\n---\n"},
            True,
            {"license": "other", "license_name": "mine", "license_link": f"https://huggingface.co/org/base/blob/{'a' * 40}/TERMS.md"},
        ),
        (
            {"README_md": "# nothing\n", "LICENSE": "mine"},
            False,
            {"license": "other", "license_name": "as-the-base-model", "license_link": "LICENSE"},
        ),
        ({}, False, {}),
        ({"README_md": "---\nlicense: [\n---\n"}, True, {}),
        ({"README_md": "---\n- a\n- b\n---\n"}, False, {}),
        ({"README_md": "---\nlicense: 3\n---\n"}, False, {}),
        ({"README_md": "---\nlicense: !!python/object/apply:os.system ['true']\n---\n"}, False, {}),
    ],
)
def test_the_licence_is_the_sources(tmp_path, files, on_hub, said):
    source = open_source(str(folder(tmp_path / "base", **files)))
    found = card_of(replace(source, **ON_HUB) if on_hub else source, tmp_path / "base")
    assert {key: value for key, value in found.data.to_dict().items() if key.startswith("license")} == said
    assert ("Find out which it is" in found.text) == (said == {})
    assert found.data.get("base_model") == ("org/base" if on_hub else None)


def test_a_folder_of_the_bundled_models_name_is_not_it(tmp_path):
    source = open_source(str(folder(tmp_path / "llama")))
    assert card_of(source, tmp_path / "llama").data.license is None
    assert card_of(open_source("llama"), tmp_path / "llama").data.license == "apache-2.0"


def test_loading_says_when_code_is_run(tmp_path):
    path = folder(tmp_path / "base")
    assert "trust_remote_code" not in card_of(open_source(str(path)), path).text
    config = json.loads((path / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}
    (path / "config.json").write_text(json.dumps(config))
    assert "trust_remote_code" not in card_of(open_source("llama"), path).text  # transformers knows the class
    (path / "config.json").write_text(json.dumps(config | {"per_layer_config": {"0": {"intermediate_size": 8}}}))
    text = card_of(open_source("llama"), path).text
    assert 'from_pretrained("path/to/this/model", trust_remote_code=True)' in text
    compile("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), CARD, "exec")


def test_the_recipe_in_it_asks_for_the_same(tmp_path):
    source = replace(open_source("llama"), **ON_HUB)
    ask = {"pattern": "unstructured", "sparsity": 0.5, "allocation": "explicit", "ratios": {r"q_proj\.": 0.25, 'a "b" ü😀': 0.5}, "eval": ["a.txt"]}
    text = card_of(source, BUNDLED / "llama", **ask, skip=r"\d+\.mlp", output="/home/me/secret").text
    toml = tomllib.loads(re.findall(r"````toml\n(.*?)````", text, re.DOTALL)[0])
    again = read_recipe(None, toml)
    recipe = read_recipe(None, {"model": "x/m", **ask, "skip": r"\d+\.mlp"})
    assert again.revision == ON_HUB["revision"]
    assert again.resolved() | {"revision": None} == recipe.resolved()
    assert "secret" not in text


def test_figures_keep_their_definitions(tmp_path):
    """Two files are two data sets, known sets have their ids, and infinity does not break the metadata."""
    values = [
        Perplexity(5.5, "a.txt", "all", 64, 8, 504, "float32"),
        Perplexity(6.5, "b.txt", "all", 64, 8, 504, "float32"),
        Perplexity(7.5, "wikitext2@abc", "test", 64, 8, 504, "float32"),
        Perplexity(math.inf, "org/words:en", "test", 64, 8, 504, "float32"),
    ]
    found = card_of(open_source("llama"), BUNDLED / "llama", *values)
    results = found.data.eval_results
    assert [(r.dataset_type, r.dataset_config, r.dataset_split, r.dataset_revision, r.metric_value) for r in results] == [
        ("a.txt", None, "all", None, 5.5),
        ("b.txt", None, "all", None, 6.5),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "abc", 7.5),
        ("org/words", "en", "test", None, "inf"),
    ]
    assert all("8 windows of 64, stride 64, 504 targets, float32" in r.metric_name for r in results)
    assert "| b.txt, all | 6.5 | 6.5 | 8 windows of 64" in found.text


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "unstructured", "block:4x4"])
def test_it_promises_nothing(pattern):
    text = card_of(open_source("llama"), BUNDLED / "llama", pattern=pattern, sparsity=None if ":" in pattern[:2] else 0.5).text
    assert "dense kernels are no faster" in text
    assert ("Ampere" in text) == (pattern == "2:4")
