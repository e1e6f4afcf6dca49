"""Results as values: a report is read as it was written, a newer format is refused, and nothing of another type gets through."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli.runner import Cli
from families import save_tiny, tiny_windows

import llmprune
from llmprune.checkpoint.files import to_versioned_json
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.errors import RequestError
from llmprune.evaluation.answers import TaskResult
from llmprune.report.page import page
from llmprune.report.result import SAID, Report
from llmprune.report.stored import read_any, read_bench, read_run
from llmprune.results import NoSample, Step, Trial

QUICK = {"samples": 4, "sequence_length": 32}
RUNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "2:4": lambda at: {"model": "llama", "pattern": "2:4", "method": "wanda", **QUICK},
    "structured": lambda at: {"model": "llama", "pattern": "channels", "sparsity": 0.25, "method": "magnitude", "uniform": True, **QUICK},
    "mixture": lambda at: {"model": save_tiny("mixtral", at / "mixture"), "pattern": "2:4", "calibration": tiny_windows()},
    "polished": lambda at: {"model": "llama", "pattern": "2:4", "method": "magnitude", "polish": "kd", "polish_steps": 2, **QUICK},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one run with a perplexity."""
    at = tmp_path_factory.mktemp("finished")
    (at / "small.txt").write_text((BUNDLED / "evaluation.txt").read_text()[:2000])
    llmprune.prune("llama", 0.5, method="magnitude", **QUICK, eval=[str(at / "small.txt")], output=str(at / "out"))
    return at / "out"


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def change(path: Path, **values: object) -> None:
    """Set fields of a JSON file; None drops one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None or key not in values}))


@pytest.mark.parametrize("which", RUNS)
def test_a_report_is_read_as_it_was(which: str, tmp_path: Path) -> None:
    text = tmp_path / "small.txt"
    text.write_text((BUNDLED / "evaluation.txt").read_text()[:2000])
    ask = RUNS[which](tmp_path) | ({} if which == "mixture" else {"eval": [str(text)]})
    report = llmprune.prune(**ask, output=str(tmp_path / "out"))
    assert (report.smaller is not None, report.polish is not None) == (which == "structured", which == "polished")
    written = (tmp_path / "out" / "llmprune.json").read_bytes()
    content = json.loads(written)
    assert next(iter(content.items())) == ("format", 1)
    assert Report.from_json(content) == report
    again = read_run(tmp_path / "out")
    assert (again, again.output) == (report, report.output)
    assert to_versioned_json(again.to_json()) == written  # timings too


def test_parts_that_few_runs_have(finished: Path) -> None:
    report = replace(
        read_run(finished),
        tried=(Trial("uniform", 0.5, True), Trial("from uniform", 0.75, False)),
        frontier=(Step(0.25, float("inf"), 0.0),),
        sample=NoSample("the checkpoint has no tokenizer"),
        tasks=(TaskResult("little", {"acc,none": 0.5}, 6, None, "1.0", "0.4.9", "float32"),),
    )
    assert Report.from_json(json.loads(to_versioned_json(report.to_json()))) == report
    assert Report.from_json(json.loads(to_versioned_json(report.to_json()))) != read_run(finished)


NEWER = "made by a newer llmprune (format 2)\nhint: update llmprune\n"


@pytest.mark.parametrize(
    "words",
    [
        ("report", "out"),
        ("compare", "out"),
        ("inspect", "out", "--manifest"),
        ("push", "out", "me/tiny"),
        ("--model", "out", "--sparsity", 0.5, "--method", "magnitude", "--calibration", BUNDLED / "calibration.txt", "--output", "again"),
    ],
    ids=lambda words: str(words[0]),
)
def test_a_newer_format_is_refused_by_every_reader(cli: Cli, hub: object, finished: Path, words: tuple[object, ...]) -> None:
    shutil.copytree(finished, "out")
    change(Path("out/llmprune.json"), format=2)
    ran = cli(*words)
    assert ran.code == 2
    assert ran.err.endswith(NEWER), ran.err
    assert ran.err.count("error: ") == 1
    assert not Path("again").exists()


def test_an_older_result_without_a_format_is_read(cli: Cli, output: Path) -> None:
    before = (output / "report.html").read_bytes()
    change(output / "llmprune.json", format=None, tried=None, frontier=None, polish=None, reasons=None)
    assert cli("report", output).code == 0
    assert (output / "report.html").read_bytes() == before
    assert cli("compare", output, output).code == 0
    assert cli("inspect", output, "--manifest").code == 0


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llmprune.recipe.reading import read_recipe
    from llmprune.run.sweep import prepare_sweep, run_sweep

    at = tmp_path_factory.mktemp("swept")
    (at / "small.txt").write_text((BUNDLED / "evaluation.txt").read_text()[:2000])
    ask = {"model": "llama", "method": "magnitude", **QUICK, "eval": [str(at / "small.txt")]}
    report = run_sweep(prepare_sweep([read_recipe(None, ask | {"sparsity": s}) for s in (0.25, 0.5)], at / "table"))
    assert read_any(at / "table") == report
    return at / "table"


def test_a_sweep_has_a_format_too(cli: Cli, swept: Path) -> None:
    shutil.copytree(swept, "table")
    assert (swept / "sweep.json").read_bytes().startswith(b'{\n "format": 1,\n')
    change(Path("table/sweep.json"), format=None)
    assert cli("compare", "table").code == 0
    change(Path("table/sweep.json"), format=2)
    ran = cli("compare", "table")
    assert (ran.code, ran.err) == (2, f"error: sweep.json: {NEWER}")


def bench() -> dict[str, Any]:
    spread = {"median": 12.5, "lowest": 12.0, "highest": 13.0}
    model = {"name": "out", "role": "pruned", "dtype": "float32", "prefill": spread, "decode": spread, "first_token": spread}
    model |= {"peak_memory": None, "kv_cache": 1024, "parameters": 10, "disk": 4_000_000}
    setting = {"repeat": 5, "prompt_length": 16, "new_tokens": 4, "batch": 1, "device": "cpu", "card": "a card", "threads": 2}
    kernel = {"rows": 64, "columns": 32, "matrices": 3, "tokens": 1, "dense": spread, "sparse": None, "refused": "too small", "speed_up": None}
    return {"setting": setting, "models": [model], "ratios": [], "kernels": [kernel], "notes": []}


def test_a_benchmark_has_a_format_too(cli: Cli, output: Path) -> None:
    Path("bench.json").write_text(json.dumps(bench()))
    assert cli("report", output, "--bench", "bench.json").code == 0
    found = read_bench(Path("bench.json"))
    Path("again.json").write_text(json.dumps(found.to_json()))
    assert json.loads(Path("again.json").read_text())["format"] == 1
    assert read_bench(Path("again.json")) == found
    change(Path("again.json"), format=2)
    ran = cli("report", output, "--bench", "again.json")
    assert (ran.code, ran.err) == (2, f"error: again.json: {NEWER}")


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of all values; of a list the first alone."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def with_value(content: dict[str, Any], path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    changed: Any = copy.deepcopy(content)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


WRONG = (None, "x", True, 1.5, -1, [], [7], {}, {"a": "b"}, "1")


def test_nothing_of_another_type_gets_through(finished: Path) -> None:
    """Whatever single value is replaced, the file is refused in one line, or it is a report that can be shown."""
    content = json.loads((finished / "llmprune.json").read_bytes())
    del content["tensors"], content["blocks"][1:], content["timings"]["blocks"][1:]
    content["recipe"] = {word: content["recipe"][word] for word in SAID}  # all else in it is shown as it is
    known = Report.from_json(content)
    refused, read = [], []
    for path in places(content):
        for wrong in WRONG:
            try:
                found = Report.from_json(with_value(content, path, wrong))
                read += [(path, found)] if found != known else []
            except RequestError as error:
                refused.append(error.message)
    assert len(refused) > 5 * len(read)
    assert [said for said in refused if not said.startswith("llmprune.json: ") or "\n" in said] == []
    for _, found in read:
        assert (found.to_json()["format"], bool(repr(found))) == (1, True)
    shown = {path[0]: found for path, found in read}
    for found in shown.values():
        assert "<h1>" in page(found)


@pytest.mark.parametrize(
    ("path", "wrong", "says"),
    [
        (("format",), "1", "format '1' is not a number of a format"),
        (("format",), True, "format 'True' is not a number of a format"),
        (("recipe", "pattern"), None, None),
        (("recipe", "pattern"), 24, "recipe.pattern: input should be a valid string"),
        (("blocks",), {}, "blocks: input should be a valid array"),
        (("blocks", 0, "rows", 0, "zeros"), "7", "blocks.0.rows.0.zeros: input should be a valid integer"),
        (("perplexity", 0, "dense", "value"), "5.5", "perplexity.0.dense.value: input should be a valid number"),
        (("sparsity",), 0.5, "has no 'sparsity.parameters'"),
        (("timings", "blocks"), [], "timings of 0 blocks, but there are 8"),
        (("sample",), {"prompt": "a"}, "sample."),
        (("blocks", 0, "rows", 0, "kept"), [], None),  # of the right type, and of no units
    ],
    ids=str,
)
def test_a_wrong_type_is_one_line(cli: Cli, output: Path, path: tuple[str | int, ...], wrong: object, says: str | None) -> None:
    content = with_value(json.loads((output / "llmprune.json").read_bytes()), path, wrong)
    (output / "llmprune.json").write_text(json.dumps(content))
    ran = cli("report", output)
    assert ran.code == (2 if says else 0)
    if says:
        error, hint = ran.err.splitlines()
        assert error.startswith(f"error: llmprune.json: {says}"), error
        assert hint.startswith("hint: ")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", '{"format": 1', "null"], ids=["deep", "list", "number", "torn", "null"])
@pytest.mark.parametrize("command", ["report", "compare"])
def test_what_is_no_object_is_refused(cli: Cli, text: str, command: str) -> None:
    Path("llmprune.json").write_text(text)
    ran = cli(command, "llmprune.json")
    assert ran.code == 2
    assert ran.err.startswith("error: llmprune.json: ")
    assert len(ran.err.splitlines()) == 2
