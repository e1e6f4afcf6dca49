"""What perplexity hides: a small set of lm-eval tasks made of the bundled text, which needs no network.

    python scripts/skills.py FOLDER                     # writes task files for llmprune eval MODEL --task-dir FOLDER --tasks cloze,copying,arithmetic
    python scripts/skills.py FOLDER --models DENSE A B  # and prints the models' accuracies

Each question has four choices, one of them right; chance is 25 %.
    cloze: the last word of a sentence of the bundled evaluation text, among last words of other sentences;
    copying: the next word of a list of random words that is repeated, among the words of the list;
    arithmetic: a sum of two digits after four solved ones, among sums that differ by at most 3.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import llmprune
from llmprune.data.sources import BUNDLED, BUNDLED_NAMES
from llmprune.evaluation.answers import TaskResult

QUESTIONS = 200
CHOICES = 4
SOLVED = 4  # sums before the question
LISTED = 10  # words to copy
Question = tuple[str, list[str]]  # the right choice first
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
metric_list:
  - metric: acc
metadata: {{version: 1.0}}
"""


def cloze(chance: random.Random, text: str) -> Iterator[Question]:
    sentences = [sentence.split() for sentence in re.split(r"(?<=[.!?])\s+", text)]
    sentences = [words for words in sentences if 8 <= len(words) <= 40 and re.fullmatch(r"[a-z]{4,}\.", words[-1])]
    endings = sorted({words[-1][:-1] for words in sentences})
    for words in chance.sample(sentences, len(sentences)):
        right = words[-1][:-1]
        yield " ".join(words[:-1]), [right, *chance.sample([word for word in endings if word != right], CHOICES - 1)]


def copying(chance: random.Random, text: str) -> Iterator[Question]:
    words = sorted(set(re.findall(r"\b[a-z]{4,7}\b", text)))
    while True:
        listed = chance.sample(words, LISTED)
        asked = chance.randrange(LISTED // 2, LISTED)
        others = chance.sample([word for word in listed if word != listed[asked]], CHOICES - 1)
        yield " ".join([*listed, *listed[:asked]]), [listed[asked], *others]


def arithmetic(chance: random.Random, text: str) -> Iterator[Question]:
    while True:
        sums = [(chance.randrange(10), chance.randrange(10)) for _ in range(SOLVED + 1)]
        *solved, (left, right) = sums
        shown = "".join(f"{a} + {b} = {a + b}\n" for a, b in solved)
        total = left + right
        near = [value for value in range(max(total - 3, 0), total + 4) if value != total]
        yield f"{shown}{left} + {right} =", [str(value) for value in (total, *chance.sample(near, CHOICES - 1))]


TASKS = {"cloze": cloze, "copying": copying, "arithmetic": arithmetic}


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = (BUNDLED / BUNDLED_NAMES["bundled-evaluation"]).read_text()
    for name, questions in TASKS.items():
        chance, file = random.Random(name), folder / f"{name}.jsonl"
        rows = []
        for (question, choices), _ in zip(questions(chance, text), range(QUESTIONS), strict=False):
            mixed = chance.sample(choices, len(choices))
            rows.append(json.dumps({"question": question, "choices": mixed, "right": mixed.index(choices[0])}))
        file.write_text("\n".join(rows) + "\n")
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file.resolve()))


def cell(found: TaskResult) -> str:
    return f"{found.metrics['acc,none']:.1%} ± {found.metrics['acc_stderr,none']:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="*", default=[], metavar="MODEL")
    options = parser.parse_args()
    write(options.folder)
    if options.models:
        print("| |", " | ".join(TASKS), "|\n|---|" + "---|" * len(TASKS))
    for model in options.models:
        found = {result.task: result for result in llmprune.evaluate_tasks(model, list(TASKS), task_dir=options.folder)}
        print(f"| {Path(model).name} |", " | ".join(cell(found[name]) for name in TASKS), "|", flush=True)


if __name__ == "__main__":
    main()
