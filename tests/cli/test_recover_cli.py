"""``llmprune recover``: from the command line to a folder that plain transformers loads, also after kill -9."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli.runner import ROOT, Cli
from faults.runs import contents
from huggingface_hub.repocard import metadata_load
from pages import read_page
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.cli.recovering import recover
from llmprune.publish.card import PLACE
from llmprune.training.lora import ALPHA, RANK
from llmprune.training.request import BATCH, PATIENCE, STEPS, Request

PAGE = ROOT / "docs" / "training.md"
COMMAND = re.compile(r"^ {4}llmprune (recover .*)$", re.MULTILINE)
QUICK = ("--steps", 6, "--every", 2, "--batch", 4, "--sequence-length", 64, "--learning-rate", "1e-3")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made")
    (place / "data.txt").write_text((BUNDLED / "calibration.txt").read_text()[20_000:36_000])
    (place / "small.txt").write_text((BUNDLED / "evaluation.txt").read_text()[:4000])
    measured = {"eval": [str(place / "small.txt")], "eval_samples": "all"}
    llmprune.prune("llama", pattern="2:4", method="wanda", samples=8, sequence_length=64, output=str(place / "pruned"), **measured)
    return place


@pytest.fixture
def here(cli: Cli, made: Path) -> Path:
    """An empty current folder with a copy of the result and its texts."""
    shutil.copytree(made, ".", dirs_exist_ok=True)
    return Path.cwd()


def test_the_command_recovers_and_says_what_it_did(cli: Cli, here: Path) -> None:
    ran = cli("recover", "pruned", "--data", "data.txt", "--eval", "small.txt", *QUICK)
    assert ran.code == 0, ran.err
    assert "6 steps of 4 windows towards llama (kd)" in ran.out
    assert "of the excess over the dense model's loss is left (small.txt" in ran.out
    assert ran.out.rstrip().endswith("saved: pruned-recovered")
    stored = json.loads(Path("pruned-recovered/llmprune.json").read_text())
    (found,) = stored["recovered"]
    assert found["best"] > 0
    assert [one["decides"] for one in found["measured"]] == [True, True, False]
    one = found["measured"][2]
    assert f"{one['after']['value']:.4g} after" in ran.out
    (again,) = llmprune.evaluate("pruned-recovered", "small.txt", window=64)
    assert again.value == pytest.approx(one["after"]["value"], rel=1e-5)
    assert cli("inspect", "pruned-recovered", "--verify", "2:4").code == 0
    assert cli("inspect", "pruned-recovered", "--manifest").code == 0
    AutoModelForCausalLM.from_pretrained("pruned-recovered")


def test_it_is_compared_by_what_was_measured_after_it(cli: Cli, here: Path) -> None:
    assert cli("recover", "pruned", "--data", "data.txt", "--eval", "small.txt", *QUICK).code == 0
    before, after = json.loads(cli("compare", "pruned", "pruned-recovered", "--json").out)
    stored = json.loads(Path("pruned-recovered/llmprune.json").read_text())
    one = stored["recovered"][0]["measured"][2]
    assert [found["perplexity"] for found in after["found"].values()] == [one["after"]["value"]]
    assert before["found"].keys() == after["found"].keys()
    assert after["method"] == f"{before['method']}, recovered"
    assert cli("compare", "pruned", "pruned-recovered", "--html", "page.html").code == 0
    assert stored["sample"]["pruned"] != "" != stored["sample"]["dense"]


def test_the_card_is_of_the_recovered_model(cli: Cli, here: Path) -> None:
    """Its results are those after the training; of a published model, the place is open again."""
    card = Path("pruned/README.md")
    card.write_text(card.read_text().replace(PLACE, "pruned"))
    assert cli("recover", "pruned", "--data", "data.txt", "--eval", "small.txt", *QUICK).code == 0
    (one,) = (m for m in json.loads(Path("pruned-recovered/llmprune.json").read_text())["recovered"][0]["measured"] if not m["decides"])
    data = metadata_load(Path("pruned-recovered/README.md"))
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == one["after"]["value"]
    assert {"pruned", "recovered", "2:4"} <= set(data["tags"])
    text = Path("pruned-recovered/README.md").read_text()
    assert f'from_pretrained("{PLACE}")' in text
    assert 'from_pretrained("pruned")' not in text
    assert text.index("## Recovery") < text.index("## What it is not good for")
    assert f"| {one['before']['value']:.4g} | {one['after']['value']:.4g} |" in text


@pytest.mark.usefixtures("pictures")
def test_the_page_shows_the_curves(cli: Cli, here: Path) -> None:
    """Both pictures, under names that are unique; the page can be made again from llmprune.json."""
    assert cli("recover", "pruned", "--data", "data.txt", *QUICK).code == 0
    page = Path("pruned-recovered/report.html")
    text = page.read_text()
    section = text[text.index('<section id="recovery0"') :].partition("</section>")[0]
    assert section.count("<svg") == 2
    assert "Held-out perplexity by step" in section
    assert "Training loss by step" in section
    read_page(text)
    assert cli("report", "pruned-recovered").code == 0
    assert page.read_text() == text


def test_a_plan_and_json(cli: Cli, here: Path) -> None:
    ran = cli("recover", "pruned", "--data", "data.txt", "--dry-run", *QUICK)
    assert ran.code == 0
    assert "zeros kept" in ran.out
    assert not list(here.glob("*recovered*"))
    asked = json.loads(cli("recover", "pruned", "--data", "data.txt", "--dry-run", "--json", *QUICK).out)
    assert (asked["loss"], asked["dense"], asked["data"]) == ("kd", "llama", "data.txt")
    ran = cli("recover", "pruned", "--data", "data.txt", "--json", "--parameters", "norms", *QUICK)
    assert json.loads(ran.out)["recovered"][0]["request"]["parameters"] == "norms"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("pruned", "--data", "nowhere.txt"), "no such file"),
        (("pruned",), "Missing option '--data'"),
        (("pruned", "--data", "data.txt", "--steps", 0), "steps 0: not a whole number above 0"),
        (("pruned", "--data", "data.txt", "--loss", "kl"), "loss 'kl' is unknown"),
        (("nowhere", "--data", "data.txt"), "no such folder"),
        (("pruned", "--data", "data.txt", "--output", "pruned"), "is the source model"),
        (("pruned", "--data", "data.txt", "--batch", 400), "a step takes 400"),
    ],
)
def test_refused(cli: Cli, here: Path, words: tuple[object, ...], says: str) -> None:
    """Exit code 2, a line and its hint, and nothing written."""
    there = sorted(path.name for path in here.iterdir())
    ran = cli("recover", *words)
    assert ran.code == 2
    assert says in ran.err
    assert len(ran.err.strip().splitlines()) <= 2
    assert sorted(path.name for path in here.iterdir()) == there


def test_defaults_are_those_of_the_request() -> None:
    """The command line states them itself, since it loads no torch."""
    values = dict(
        zip([name for name in recover.__annotations__ if name not in ("folder", "data", "return")], recover.__defaults__ or (), strict=True)
    )
    fields = Request.__dataclass_fields__
    assert {name: values[name] for name in values if name in fields and name != "eval"} == {
        name: fields[name].default for name in values if name in fields and name != "eval"
    }
    assert (values["steps"], values["batch"], values["patience"], values["rank"], values["alpha"]) == (STEPS, BATCH, PATIENCE, RANK, ALPHA)


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("seconds", [7, 9, 11])
def test_killed_and_repeated_ends_the_same(cli: Cli, here: Path, seconds: float) -> None:
    """kill -9 wherever it is by then."""
    words = ["recover", "pruned", "--data", "data.txt", "--steps", "40", "--every", "4", *map(str, QUICK[4:])]
    assert cli(*words, "--output", "whole").code == 0
    command = [sys.executable, "-m", "llmprune", *words, "--output", "out"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not Path("out").exists()
        assert subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True).returncode == 0
    assert contents(Path("out")) == contents(Path("whole"))


def test_every_command_of_the_page_runs(cli: Cli, here: Path) -> None:
    """docs/training.md, with fewer steps."""
    lines = COMMAND.findall(PAGE.read_text())
    assert len(lines) >= 3
    for name in ("my-pruned", "my-2of4"):
        shutil.copytree("pruned", name)
    shutil.copy("data.txt", "my.txt")
    for number, line in enumerate(lines):
        ran = cli(*line.split(), *QUICK, "--output", f"out{number}")
        assert ran.code == 0, ran.err
