"""The Python face as a notebook has it: what a report shows of itself, and who is told how far a run has come."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli.runner import Cli
from families import tiny_model, tiny_windows
from pages import read_page
from rich.console import Console

import llmprune
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.stream import heap

HOSTILE = "<script>alert(1)</script> [bold]&"


class Steps(list[tuple[str, int, int]]):
    """Notes what a run says of itself."""

    def __call__(self, step: str, done: int, total: int) -> None:
        self.append((step, done, total))

    def of(self, step: str) -> list[tuple[int, int]]:
        return [(done, total) for name, done, total in self if name == step]


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "small.txt"
    text.write_text((BUNDLED / "evaluation.txt").read_text()[:4000])
    return {"samples": 4, "sequence_length": 64, "eval": [str(text)], "output": str(tmp_path / "out")}


def shown(report: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(report)
    return console.file.getvalue()


def test_a_report_shows_what_counts(asked: dict[str, Any]) -> None:
    report = llmprune.prune("llama", pattern="2:4", method="wanda", **asked)
    (pair,) = report.perplexity
    content = json.loads((Path(asked["output"]) / "llmprune.json").read_text())
    numbers = [f"{pair.dense.value:.4g} dense, {pair.pruned.value:.4g} pruned", "50.0000% of the pruned matrices, asked 50.0000%", "2:4, by wanda"]
    numbers += [f"{content['sparsity']['parameters'] - content['sparsity']['zeros']:,} of {content['sparsity']['parameters']:,}"]
    numbers += [f"{report.source.bytes / 1e6:.2f} MB"]
    page = read_page("<!doctype html>" + report._repr_html_())
    cells = [text for tag, text in page.texts if tag in ("th", "td", "caption")]
    assert {"llama, pruned", "time"} <= set(cells)
    for number in numbers:
        assert any(number in cell for cell in cells), number
        assert number in shown(report), number
        assert number in repr(report), number
    assert len(repr(report).splitlines()) == 1
    assert asked["output"] not in repr(report) + report._repr_html_()


def test_names_are_texts_whatever_they_hold(asked: dict[str, Any]) -> None:
    report = llmprune.prune("llama", 0.5, method="magnitude", **asked)
    report = replace(report, source=replace(report.source, name=HOSTILE))
    page = read_page("<!doctype html>" + report._repr_html_())
    assert "script" not in page.tags
    assert any(HOSTILE in text for _, text in page.texts)
    assert HOSTILE in shown(report)


def test_progress_is_that_of_the_bars(asked: dict[str, Any]) -> None:
    steps = Steps()
    llmprune.prune("llama", 0.5, method="wanda", on_progress=steps, **asked)
    assert steps.of("prune") == [(done, 8) for done in range(9)]
    for step in ("dense evaluation", "pruned evaluation"):
        (*_, (done, total)) = steps.of(step)
        assert done == total > 0
    measured = Steps()
    (value,) = llmprune.evaluate(asked["output"], asked["eval"], window=64, on_progress=measured)
    assert measured.of("evaluation")[-1][0] == measured.of("evaluation")[-1][1] > 0
    assert value.windows > 0


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"sparsity": 0.5}, {"gradients", "allocation", "prune"}),
        ({"sparsity": 0.25, "pattern": "channels", "round_to": 4}, {"gradients", "prune"}),
        ({"sparsity": 0.34, "pattern": "layers"}, {"layers", "prune"}),
        ({"pattern": "2:4", "polish": "kd", "polish_steps": 3}, {"prune", "polish"}),
    ],
    ids=["balanced", "channels", "layers", "polish"],
)
def test_a_live_model_tells_too(options: dict[str, Any], names: set[str]) -> None:
    model, steps = tiny_model("llama"), Steps()
    report = llmprune.prune(model, calibration=tiny_windows(), on_progress=steps, **options)
    assert {step for step, _, _ in steps} >= names
    assert all(0 <= done <= total for _, done, total in steps)
    assert steps.of("prune")[-1] == (3, 3)
    text = repr(report)
    assert "perplexity" not in text
    assert "LlamaForCausalLM" in text
    left = sum(p.numel() for p in report.model.parameters()) if report.model is not None else None
    if left is None:
        zeros = sum(int((value == 0).sum()) for value in model.parameters())
        left = model.num_parameters() - zeros
    assert f"{left:,} of" in text


class Allocator:
    """Notes what would change the process's allocator for good."""

    def __init__(self) -> None:
        self.changed: list[int] = []

    def mallopt(self, option: int, value: int) -> int:
        self.changed.append(option)
        return 1

    def malloc_trim(self, pad: int) -> int:
        return 1


def test_only_the_command_line_changes_how_the_process_allocates(asked: dict[str, Any], cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator()
    monkeypatch.setattr(heap, "GLIBC", allocator)
    llmprune.prune("llama", pattern="2:4", method="magnitude", **asked)
    assert allocator.changed == []
    words = ("--samples", 4, "--sequence-length", 64, "--eval", asked["eval"][0])
    assert cli("--model", "llama", "--pattern", "2:4", "--method", "magnitude", *words).code == 0
    assert heap.M_ARENA_MAX in allocator.changed
    allocator.changed.clear()
    assert cli("sweep", "--model", "llama", "--methods", "magnitude", "--patterns", "2:4", "--output", "swept", *words).code == 0
    assert heap.M_ARENA_MAX in allocator.changed
