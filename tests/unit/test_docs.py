"""README.md, CONTRIBUTING.md and docs/ are true: commands parse, links lead somewhere, quoted code is the code's, generated parts are up to date."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from llmprune.cli.console import app
from llmprune.cli.main import main  # noqa: F401  the commands are added to the application
from llmprune.cli.options import given_values
from llmprune.recipe.reading import read_recipe
from llmprune.recipe.recipe import Recipe

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^(?: {4}|\$ )((?:python -m )?llmprune .*)", re.MULTILINE)
SCRIPT = re.compile(r"(?:bash|python) ((?:scripts|tests)/\S+?\.(?:sh|py))\b")
LINK = re.compile(r"\]\((?!https?://)([^)#]+)\)")
FILE = re.compile(r"`((?:llmprune|tests|scripts|recipes)/[\w/.-]+\.\w+)`")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def words_of(line: str) -> list[str]:
    """A command's words, without the program, a redirection and a comment."""
    words = shlex.split(line, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    return words[words.index("llmprune") + 1 :]


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """(the command's name, its values), as the command line would have them; nothing is run."""
    words = ["prune", *words] if words[0].startswith("-") else words
    command: Any = typer.main.get_command(app)
    while subcommands := getattr(command, "commands", {}):
        command, words = subcommands[words[0]], words[1:]
    return command.name, command.make_context(command.name, words).params


COMMANDS = sorted({line for page in PAGES for line in COMMAND.findall(page.read_text())})


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, values = parsed(words_of(line))
    if name != "prune":
        return
    own = values["criterion"]
    if own and ":" in own:
        (tmp_path / own.partition(":")[0]).write_text("def score(weight_RC, stats):\n    return weight_RC.abs()\n")
    recipe = ROOT / values["recipe"] if values["recipe"] else None
    monkeypatch.chdir(tmp_path)
    asked = given_values({key: value for key, value in values.items() if key in Recipe.model_fields})
    assert read_recipe(recipe, asked).model == values["model"]


def test_there_are_commands() -> None:
    assert {"prune", "bench", "compare", "eval", "inspect", "push", "check", "new"} <= {parsed(words_of(line))[0] for line in COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_scripts_are_there(page: Path) -> None:
    text = page.read_text()
    gone = [target for target in LINK.findall(text) if not (page.parent / target).exists()]
    gone += [file for file in SCRIPT.findall(text) + FILE.findall(text) if not (ROOT / file).exists()]
    assert gone == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_is_python(page: Path) -> None:
    for block in BLOCK.findall(page.read_text()):
        compile(block, page.name, "exec")


def test_quoted_code_is_the_codes_own() -> None:
    """All that docs/extending.md quotes; the user's own criterion is README's."""
    code = [path.read_text() for path in (ROOT / "llmprune").rglob("*.py")]
    own, *others = BLOCK.findall((ROOT / "docs" / "extending.md").read_text())
    assert own.splitlines()[-1] in (ROOT / "README.md").read_text()
    assert len(others) == 4
    assert [block for block in others if not any(block in text for text in code)] == []


def test_the_loop_is_quoted_whole() -> None:
    assert BLOCK.findall((ROOT / "docs" / "architecture.md").read_text()) == [(ROOT / "llmprune" / "engine.py").read_text()]


def test_what_is_made_from_the_code_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))
    for page in made["PAGES"]:
        assert page.read_text() == made["fresh"](page.read_text()), "python scripts/make_docs.py"


def test_troubleshooting_quotes_what_the_code_says() -> None:
    """Each piece of each message in its first column is in the code."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "llmprune").rglob("*.py"))
    rows = [
        line.split(" | ")[0] for line in (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    ]
    pieces = [piece.strip() for row in rows for quoted in re.findall(r"`([^`]+)`", row) for piece in quoted.split("…")]
    assert len(rows) > 20
    assert [piece for piece in pieces if piece not in code] == []
