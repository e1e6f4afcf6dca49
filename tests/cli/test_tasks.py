"""llmprune eval --tasks: lm-eval's own numbers, offline, on task files of the user's own."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from cli.runner import Cli
from pages import read_page
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune.checkpoint.resolve import BUNDLED
from llmprune.evaluation.harness import TaskResult
from llmprune.report.stored import add_tasks, result_of

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install llmprune[eval]")
QUESTIONS = [
    ("A river flows into the", ["sea", "loom", "thread"], 0),
    ("The weaver works at a", ["storm", "loom", "river"], 1),
    ("At night one sees the", ["weft", "warp", "stars"], 2),
    ("Bread is made of", ["flour", "iron", "glass"], 0),
    ("Ships sail on the", ["roof", "sea", "shed"], 1),
    ("A horse has four", ["legs", "wings", "sails"], 0),
]
TASK = """
task: little
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata: {{version: 1.0}}
"""


@pytest.fixture
def task_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [json.dumps({"q": q, "choices": choices, "gold": gold}) for q, choices, gold in QUESTIONS]
    (folder / "little.jsonl").write_text("\n".join(rows))
    (folder / "little.yaml").write_text(TASK.format(file=folder / "little.jsonl"))
    return folder


def direct(folder: Path, task_dir: Path) -> dict[str, float]:
    """The numbers by lm-eval alone."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wrapped = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=2, device="cpu")
    manager = TaskManager(include_path=str(task_dir), include_defaults=False)
    return lm_eval.simple_evaluate(model=wrapped, tasks=["little"], task_manager=manager, log_samples=False)["results"]["little"]


@needs_lm_eval
def test_numbers_are_those_of_lm_eval_for_dense_and_pruned(cli: Cli, small: tuple[object, ...], task_dir: Path) -> None:
    assert cli("--model", "llama", "--sparsity", 0.6, "--method", "magnitude", "--output", "out", *small).code == 0
    for model, folder in (("llama", BUNDLED / "llama"), ("out", Path("out"))):
        ran = cli("eval", model, "--tasks", "little", "--task-dir", task_dir, "--json")
        assert ran.code == 0, ran.err
        (found,) = json.loads(ran.out)["tasks"]
        alone = direct(folder, task_dir)
        assert found["task"] == "little"
        assert found["samples"] == len(QUESTIONS)
        for metric in ("acc,none", "acc_norm,none", "acc_stderr,none"):
            assert found["metrics"][metric] == pytest.approx(alone[metric], rel=1e-6)
    printed = cli("eval", "out", "--tasks", "little", "--task-dir", task_dir).out
    assert "little: acc 0." in printed
    assert "6 samples" in printed
    (kept,) = json.loads(Path("out/llmprune.json").read_text())["tasks"]  # the second answer to the same question took the first one's place
    assert kept == found


@needs_lm_eval
def test_an_unknown_task_is_refused_with_what_is_there(cli: Cli, task_dir: Path) -> None:
    ran = cli("eval", "llama", "--tasks", "little,big", "--task-dir", task_dir)
    assert ran.code == 2
    assert "error: task 'big'" in ran.err
    assert "it has little" in ran.err


def test_without_lm_eval_the_hint_says_how_to_get_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.evaluation.harness.find_spec", lambda name: None)
    ran = cli("eval", "llama", "--tasks", "piqa")
    assert ran.code == 2
    assert "lm-eval, which is not installed" in ran.err
    assert 'pip install "llmprune[eval]"' in ran.err


def test_a_task_folder_needs_tasks(cli: Cli) -> None:
    ran = cli("eval", "llama", "--task-dir", ".")
    assert ran.code == 2
    assert "--tasks a,b" in ran.err


def test_answers_go_into_the_result_and_its_page(cli: Cli, small: tuple[object, ...]) -> None:
    assert cli("--model", "llama", "--sparsity", 0.5, "--method", "magnitude", "--output", "out", *small).code == 0
    before, page = json.loads(Path("out/llmprune.json").read_text()), Path("out/report.html").read_text()
    whole = TaskResult("little", {"acc,none": 0.61803398, "acc_stderr,none": 0.14159265, "em,strict": 0.25}, 6, 0, "1.0", "0.4.9", "float32")
    add_tasks(Path("out"), [whole, replace(whole, samples=2, metrics={"acc,none": 0.5})])
    add_tasks(Path("out"), [replace(whole, task="<b>other", shots=5, task_version=None)])
    after = json.loads(Path("out/llmprune.json").read_text())
    tasks = after.pop("tasks")
    assert after == before
    assert tasks[0] == asdict(whole)
    assert [(one["task"], one["shots"], one["samples"]) for one in tasks] == [("little", 0, 6), ("little", 0, 2), ("<b>other", 5, 6)]
    assert cli("report", "out").code == 0
    found = read_page(Path("out/report.html").read_text())
    assert "tasks" in found.ids
    assert {(0.61803398, "0.618"), (0.14159265, "0.1416"), (0.5, "0.5")} <= set(found.numbers)
    texts = [text for _, text in found.texts]
    assert {"<b>other", "em (strict)", "0.4.9", "float32"} <= set(texts)
    assert "tasks" not in read_page(page).ids
    again = replace(whole, metrics={"acc,none": 1.0})
    add_tasks(Path("out"), [again])
    assert json.loads(Path("out/llmprune.json").read_text())["tasks"][0] == asdict(again)


def test_only_a_result_keeps_them(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model's name is not that of a folder here; a damaged result is refused before lm-eval is asked for."""
    Path("llama").mkdir()
    Path("llama/llmprune.json").write_text("{}")
    assert result_of("llama") is None
    assert result_of("absent") is None
    Path("torn").mkdir()
    Path("torn/llmprune.json").write_text('{"recipe"')
    monkeypatch.setattr("llmprune.evaluation.harness.find_spec", lambda name: None)
    ran = cli("eval", "torn", "--tasks", "piqa")
    assert (ran.code, "llmprune.json: cannot be read" in ran.err) == (2, True)
