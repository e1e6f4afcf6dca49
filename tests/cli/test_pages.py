"""The commands of README and of the pages for users, run one after the other as they stand there, on the bundled model; calibration and measurements
are made short. What needs the Hub or lm-eval's own tasks is left out.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli.runner import ROOT, Cli

from llmprune.checkpoint.resolve import BUNDLED

COMMAND = re.compile(r"^ {4}(?:python -m )?llmprune (.*)", re.MULTILINE)
PAGES = ("README.md", "docs/after-pruning.md", "docs/data.md", "docs/gpu.md")
ELSEWHERE = ("org/name", "c4", "wikitext2", "piqa")  # not on this machine
SHORT = {"prune": {"--samples": 8, "--sequence-length": 64}, "bench": {"--prompt-length": 8, "--new-tokens": 2, "--repeat": 1}}


def commands(page: str) -> list[list[str]]:
    found = [shlex.split(line, comments=True) for line in COMMAND.findall((ROOT / page).read_text(encoding="utf-8"))]
    return [words for words in found if not any(name in word for word in words for name in ELSEWHERE)]


def shortened(words: list[str]) -> list[str]:
    name = "prune" if words[0].startswith("-") else words[0]
    more = {flag: value for flag, value in SHORT.get(name, {}).items() if flag not in words}
    return [*words, *(str(word) for pair in more.items() for word in pair)]


def data_of_the_pages(here: Path) -> None:
    """The files and the model that docs/data.md names."""
    text = (BUNDLED / "calibration.txt").read_text()[:60_000]
    pieces = [text[i : i + 300] for i in range(0, len(text), 300)]
    (here / "notes.txt").write_text(text)
    (here / "texts").mkdir()
    (here / "texts" / "a.txt").write_text(text)
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    dialogues = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in turns]
    (here / "dialogues.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"messages": None}, *dialogues, {"messages": []}]))
    with gzip.open(here / "articles.csv.gz", "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("title", "body"), *(("of a river", piece) for piece in pieces)])
    shutil.copytree(BUNDLED / "llama", here / "my-chat-model")
    (here / "my-chat-model" / "chat_template.jinja").write_text("{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}")


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, cli: Cli) -> None:
    here = Path.cwd()
    (here / "recipes").symlink_to(ROOT / "recipes")
    (here / "my.py").write_text("needs = ('input_sq',)\n\n\ndef score(weight_RC, stats):\n    return weight_RC.abs() * stats.input_sq_C**0.25\n")
    made = commands(page)
    assert made
    if page == "README.md":
        made.insert(0, ["--model", "llama", "--sparsity", "0.5", "--pattern", "2:4", "--method", "magnitude"])  # scripts/demo.sh
    if page == "docs/data.md":
        data_of_the_pages(here)
    for words in made:
        ran = cli(*shortened(words))
        assert ran.code == 0, f"llmprune {shlex.join(words)}\n{ran.out[-500:]}{ran.err[-800:]}"


def test_the_python_of_docs_data_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data_of_the_pages(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    exec(block, found)
    assert found["report"].calibration.template == "messages"
    assert found["report"].perplexity[0].pruned.dataset == "notes.txt"
