"""The command line is the recipe: its options, their panels, types and defaults are those of ``Recipe``'s fields."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from cli.runner import Cli

import llmprune
from llmprune.cli.options import flag_of
from llmprune.methods import KINDS, document, own_names
from llmprune.recipe.flags import MOST_USED, PANELS
from llmprune.recipe.named import DEFAULT_QUALITY
from llmprune.recipe.recipe import Recipe
from llmprune.run.windows import BUNDLED_LENGTH, DEFAULT_LENGTH, DEFAULT_SAMPLES

COMMANDS = [
    "prune",
    "recover",
    "sweep",
    "eval",
    "inspect",
    "bench",
    "report",
    "compare",
    "methods",
    "push",
    "recipe new",
    "recipe check",
    "recipe schema",
]
ROW = re.compile(r"^  (?:-h, )?(--[a-z-]+)(?: / --no-[a-z-]+)?(?: (\S+))?(?:  |$)", re.MULTILINE)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def joined(text: str) -> str:
    return " ".join(text.split())


def panels(text: str) -> dict[str, dict[str, str]]:
    """Of a help text: panel -> flag -> the word for its value, or "" of a switch."""
    parts = re.split(r"^(\S[^\n]*):\n", text, flags=re.MULTILINE)
    return {title: dict(ROW.findall(rows)) for title, rows in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.usefixtures("wide")
def test_every_field_is_an_option_with_its_text_and_default(cli: Cli) -> None:
    text = cli("prune", "--help").out
    found, words = panels(text), joined(text)
    assert list(found) == list(PANELS)
    for name, field in Recipe.model_fields.items():
        flag = flag_of(name)
        option = f"--{(flag.name or name).replace('_', '-')}"
        assert [panel for panel, rows in found.items() if option in rows] == [flag.panel], name
        assert joined(str(field.description)) in words
        assert bool(found[flag.panel][option]) == (field.annotation not in (bool, bool | None)), name
        default = flag.default or field.get_default(call_default_factory=True)
        if default and not field.is_required():
            assert re.search(rf"{re.escape(option)} .*?\[default: {re.escape(str(default))}\]", words), name


@pytest.mark.usefixtures("wide")
def test_the_most_used_options_come_first(cli: Cli) -> None:
    found = panels(cli("prune", "--help").out)
    assert [*found[MOST_USED].items()] == [
        ("--model", "PATH|ID"),
        ("--sparsity", "FLOAT"),
        ("--pattern", "N:M|NAME"),
        ("--quality", "NAME"),
        ("--calibration", "PATH|ID"),
        ("--output", "PATH"),
        ("--help", ""),
    ]
    assert set(found["Output"]) == {"--overwrite", "--restart", "--dry-run", "--json"}
    assert set(found["Hub"]) == {"--push", "--public", "--existing"}


def test_defaults_in_words_are_those_of_the_code() -> None:
    assert flag_of("samples").default == str(DEFAULT_SAMPLES)
    assert re.findall(r"\d+", flag_of("sequence_length").default) == [str(DEFAULT_LENGTH), str(BUNDLED_LENGTH)]
    assert flag_of("quality").default == DEFAULT_QUALITY


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_the_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in COMMANDS:
        ran = cli(*command.split(), "--help")
        assert (ran.code, ran.err) == (0, ""), command
        assert [line for line in ran.out.splitlines() if len(line) > columns] == [], command
        assert re.findall(r"<(?:str|int|float|bool|list)\b", ran.out) == [], command  # names of Python's types


def test_the_program_alone_prints_its_help(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    alone = cli()
    assert (alone.code, alone.err) == (0, "")
    assert alone.out == cli("-h").out == cli("--help").out
    assert {"--version", "--help", "--install-completion", "--show-completion"} == {flag for flag, _ in ROW.findall(alone.out)}
    assert all(line.endswith(".") for line in alone.out.partition("Commands:")[2].split("\n") if line), "cut off"
    assert "...\n" not in alone.out.partition("Commands:")[2]
    assert cli("prune", "-h").out == cli("prune", "--help").out
    assert cli("--version").out == f"{llmprune.__version__}\n"


def test_a_shell_completes_commands_and_options(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_LLMPRUNE_COMPLETE", "complete_bash")
    for words, place, found in (("llmprune s", 1, "sweep"), ("llmprune prune --spars", 2, "--sparsity")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(place))
        assert cli().out.split() == [found]


def test_methods_are_listed_by_whole_sentences(cli: Cli) -> None:
    lines = dict(line.split(": ", 1) for line in cli("methods").out.splitlines())
    for kind in KINDS:
        for name in own_names(kind):
            said = lines[f"{kind}/{name}"]
            assert said.endswith("."), name
            assert " ".join(document(kind, name).split()).startswith(said), name


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("prune", "folder", "--sparsity", 0.5), "write --model folder"),
        (("prune", "folder", "--model", "llama"), "see llmprune prune --help"),
        (("sweep", "folder", "--methods", "wanda", "--output", "out"), "write --model folder"),
        (("org/name", "--sparsity", 0.5), "llmprune --model org/name"),
        (("inspect", "llama", "other"), "see llmprune inspect --help"),
        (("eval", "--modl", "llama"), "see llmprune eval --help"),
        (("recover", "no-such-folder", "--data", "text.txt"), "give the output folder of a finished run"),
        (("push", "no-such-folder", "me/name", "--dry-run"), "give the output folder of a finished run"),
    ],
)
def test_a_misplaced_word_gets_a_hint(cli: Cli, words: tuple[object, ...], hint: str) -> None:
    ran = cli(*words)
    assert ran.code == 2
    assert re.search(rf"^error: .*\nhint: .*{re.escape(hint)}", ran.err), ran.err


def test_help_loads_nothing_heavy() -> None:
    code = "import sys\nfrom llmprune.cli.main import main\ntry: main(['prune', '--help'])\nexcept SystemExit: print({'torch'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "set()"


def test_ratios_are_given_one_by_one(cli: Cli) -> None:
    words = ("--model", "llama", "--allocation", "explicit", "--sparsity", 0.5)
    assert cli("recipe", "new", "mine.toml", *words, "--ratio", r"layers\.[0-3]\.=0.25", "--ratio", "(?=x)up=7e-1").code == 0
    assert cli("recipe", "check", "mine.toml").code == 0
    assert tomllib.loads(Path("mine.toml").read_text())["ratios"] == {r"layers\.[0-3]\.": 0.25, "(?=x)up": 0.7}


def test_a_ratio_on_top_of_a_recipe_replaces_its_own_alone(cli: Cli, small: tuple[object, ...]) -> None:
    Path("r.toml").write_text(
        'model = "llama"\nallocation = "explicit"\nsparsity = 0.5\nmethod = "magnitude"\n[ratios]\nq_proj = 0.5\nup_proj = 0.5\n'
    )
    ran = cli("--recipe", "r.toml", "--ratio", "up_proj=0.75", "--dry-run", "--json", *small)
    assert ran.code == 0, ran.err
    assert '"ratios": {"q_proj": 0.5, "up_proj": 0.75}' in ran.out


@pytest.mark.parametrize(
    ("said", "error"),
    [("up_proj", "--ratio 'up_proj'"), ("=0.5", "--ratio '=0.5'"), ("up_proj=", "--ratio 'up_proj='"), ("up_proj=half", "ratios.up_proj 'half'")],
)
def test_a_ratio_without_a_name_or_a_number(cli: Cli, said: str, error: str) -> None:
    ran = cli("--model", "llama", "--sparsity", 0.5, "--allocation", "explicit", "--ratio", said)
    assert ran.code == 2
    assert f"error: {error}" in ran.err
    assert "hint: " in ran.err


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ((), {"solver.damping": 0.02}),
        (("--method", "sparsegpt"), {"solver.damping": 0.02}),
        (("--option", "damping=0.03"), {"solver.damping": 0.03}),
        (("--option", "slab=64"), {"solver.damping": 0.02, "solver.slab": 64}),
        (("--method", "wanda"), {}),
        (("--quality", "fast"), {}),
        (("--criterion", "magnitude"), {}),
    ],
    ids=lambda value: "-".join(map(str, value)) or "nothing",
)
def test_options_of_a_recipe_are_those_of_its_method(cli: Cli, small: tuple[object, ...], words: tuple[str, ...], left: dict[str, float]) -> None:
    Path("r.toml").write_text('model = "llama"\nsparsity = 0.5\nmethod = "sparsegpt"\n[options]\ndamping = 0.02\n')
    ran = cli("--recipe", "r.toml", *words, "--dry-run", "--json", *small)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["recipe"]["options"] == left
