"""The commands of README and of the pages for users, run one after the other as they stand there, on the bundled model; calibration and measurements
are made short. What needs the Hub or lm-eval's own tasks is left out.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from cli.runner import ROOT, Cli

COMMAND = re.compile(r"^ {4}(?:python -m )?llmprune (.*)", re.MULTILINE)
PAGES = ("README.md", "docs/after-pruning.md", "docs/gpu.md")
ELSEWHERE = ("org/name", "c4", "wikitext2", "piqa")  # not on this machine
SHORT = {"prune": {"--samples": 8, "--sequence-length": 64}, "bench": {"--prompt-length": 8, "--new-tokens": 2, "--repeat": 1}}


def commands(page: str) -> list[list[str]]:
    found = [shlex.split(line, comments=True) for line in COMMAND.findall((ROOT / page).read_text(encoding="utf-8"))]
    return [words for words in found if not any(name in word for word in words for name in ELSEWHERE)]


def shortened(words: list[str]) -> list[str]:
    name = "prune" if words[0].startswith("-") else words[0]
    more = {flag: value for flag, value in SHORT.get(name, {}).items() if flag not in words}
    return [*words, *(str(word) for pair in more.items() for word in pair)]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, cli: Cli) -> None:
    here = Path.cwd()
    (here / "recipes").symlink_to(ROOT / "recipes")
    (here / "my.py").write_text("needs = ('input_sq',)\n\n\ndef score(weight_RC, stats):\n    return weight_RC.abs() * stats.input_sq_C**0.25\n")
    made = commands(page)
    assert made
    if page == "README.md":
        made.insert(0, ["--model", "llama", "--sparsity", "0.5", "--pattern", "2:4", "--method", "magnitude"])  # scripts/demo.sh
    for words in made:
        ran = cli(*shortened(words))
        assert ran.code == 0, f"llmprune {shlex.join(words)}\n{ran.out[-500:]}{ran.err[-800:]}"
