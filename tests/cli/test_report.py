"""report.html: one file, well-formed, without a way out, and true: every number in it is llmprune.json's, or follows from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli.runner import Cli
from pages import read_page, rounds_to

import llmprune
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.report.compare import Found, Result, compared, remarks
from llmprune.report.page import page
from llmprune.report.result import Report
from llmprune.report.sections import sections

pytestmark = pytest.mark.usefixtures("pictures")
BALANCED = ("--model", "llama", "--sparsity", 0.5)
HOSTILE = "</title><script>alert(1)</script>\" onload='x' & $\\frac{1}{0}$"


def leaves(value: Any) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def follows(report: dict[str, Any]) -> Iterator[float]:
    """What a page may derive: shares, sums and differences."""
    found = report["sparsity"]
    yield from (found["parameters"] - found["zeros"], found["zeros"] / found["parameters"])
    spent: dict[str, float] = {}
    for block in report["timings"]["blocks"]:
        for part, seconds in block.items():
            spent[part] = spent.get(part, 0.0) + seconds
    yield from spent.values()
    yield report["timings"]["seconds"] - sum(spent.values())
    for block in report["blocks"]:
        for row in block["rows"]:
            size = row["parameters"] if row["kept"] is not None else row["rows"] * row["columns"]
            gone = row["zeros"] if row["kept"] is None else row["parameters"] // row["units"] * (row["units"] - len(row["kept"]))
            yield from (1, size, gone, gone / size)


def known(value: float, numbers: list[float]) -> bool:
    return any(value == number or abs(value - number) <= 1e-12 * abs(number) for number in numbers)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pictures: None) -> Path:
    """A run's output, as it was left; tests take a copy."""
    place = tmp_path_factory.mktemp("report")
    (place / "small.txt").write_text((BUNDLED / "evaluation.txt").read_text()[:4000])
    llmprune.prune("llama", 0.5, samples=8, sequence_length=64, eval=[str(place / "small.txt")], output=str(place / "out"))
    return place / "out"


@pytest.fixture
def ran(cli: Cli, finished: Path) -> dict[str, Any]:
    shutil.copytree(finished, "out")
    return json.loads(Path("out/llmprune.json").read_text())


@pytest.mark.parametrize("words", [BALANCED, ("--model", "llama", "--pattern", "channels", "--sparsity", 0.25)], ids=["balanced", "channels"])
def test_every_number_is_that_of_the_run(cli: Cli, small: tuple[object, ...], words: tuple[object, ...]) -> None:
    result = cli(*words, "--output", "out", *small)
    assert result.code == 0, result.err
    report = json.loads(Path("out/llmprune.json").read_text())
    assert report["recipe"]["quality"] == "balanced"  # by its name, where nothing was named
    assert json.loads(cli("compare", "out", "--json").out)[0]["method"] == "balanced"
    found = read_page(Path("out/report.html").read_text())
    numbers = [*leaves(report), *follows(report)]
    assert len(found.numbers) > 40
    for value, text in found.numbers:
        assert known(value, numbers), (value, text)
        assert rounds_to(value, text), (value, text)
    shown = {value for value, _ in found.numbers}
    for pair in report["perplexity"]:
        assert {pair["dense"]["value"], pair["pruned"]["value"], pair["divergence"]["kl"], pair["divergence"]["top1"]} <= shown
    assert {block["output_error"] for block in report["blocks"]} <= shown
    assert set(found.ids) >= {"asked", "quality", "sparsity", "errors", "sizes", "timings", "sample", "provenance"}
    assert "svg" in found.tags
    assert report["sample"]["pruned"].strip().split("\n")[0].strip() in Path("out/report.html").read_text().replace("&#34;", '"')


def test_it_is_made_again_from_llmprune_json_alone(cli: Cli, ran: dict[str, Any]) -> None:
    before = Path("out/report.html").read_bytes()
    assert "http" not in before.decode()
    Path("alone").mkdir()
    Path("alone/llmprune.json").write_bytes(Path("out/llmprune.json").read_bytes())
    assert cli("report", "alone").code == 0
    assert Path("alone/report.html").read_bytes() == before
    assert cli("report", "alone/llmprune.json", "--html", "other.html").code == 0
    assert Path("other.html").read_bytes() == before


def test_names_are_texts_whatever_they_hold(ran: dict[str, Any]) -> None:
    """A model, a data set, a block, a note, a sample: nothing of them becomes markup, a script or mathematics."""
    ran["source"]["name"] = ran["calibration"]["dataset"] = HOSTILE
    ran["sample"] = {"prompt": HOSTILE, "tokens": 1, "dense": HOSTILE, "pruned": HOSTILE}
    for pair in ran["perplexity"]:
        pair["dense"]["dataset"] = pair["pruned"]["dataset"] = HOSTILE
    for number, block in enumerate(ran["blocks"]):
        block["block"] = f"{HOSTILE}.{number}"
        for row in block["rows"]:
            row["notes"] = [HOSTILE]
            row["matrix"] = f"{HOSTILE}.{number}.{row['matrix'].split('.')[-2]}<b>.weight"
    text = page(Report.from_json(ran))
    found = read_page(text)
    assert found.tags & {"script", "b"} == set()
    assert any(HOSTILE in said for tag, said in found.texts if tag == "h1")
    assert any("q_proj<b>" in said for tag, said in found.texts if tag == "text")


def test_measured_speeds_go_in_when_they_are_given(cli: Cli, ran: dict[str, Any]) -> None:
    spread = {"median": 12.5, "lowest": 12.0, "highest": 13.0}
    model = {"name": "out", "role": "pruned", "dtype": "float32", "prefill": spread, "decode": spread, "first_token": spread}
    model |= {"peak_memory": None, "kv_cache": 1024, "parameters": 10, "disk": 4_000_000}
    setting = {"repeat": 5, "prompt_length": 16, "new_tokens": 4, "batch": 1, "device": "cpu", "card": "a card", "threads": 2}
    Path("bench.json").write_text(json.dumps({"setting": setting, "models": [model], "ratios": [], "kernels": [], "notes": ["slow"]}))
    assert "speeds" not in read_page(Path("out/report.html").read_text()).ids
    assert cli("report", "out", "--bench", "bench.json").code == 0
    found = read_page(Path("out/report.html").read_text())
    assert "speeds" in found.ids
    assert (12.5, "12.5") in found.numbers
    assert (4e6, "4.00 MB") in found.numbers


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("report", "nowhere"), "no such file"),
        (("report", "torn.json"), "cannot be read"),
        (("report", "other.json"), "has no 'recipe.pattern'"),
        (("compare", "."), "holds neither llmprune.json nor sweep.json"),
    ],
)
def test_what_is_no_result_is_refused(cli: Cli, words: tuple[str, ...], says: str) -> None:
    Path("torn.json").write_text('{"recipe":')
    Path("other.json").write_text("{}")
    result = cli(*words)
    assert (result.code, says in result.err) == (2, True), result.err


def test_results_side_by_side(cli: Cli, small: tuple[object, ...]) -> None:
    folders = ("half", "rough", "third")
    for folder, method, sparsity in zip(folders, ("wanda", "magnitude", "wanda"), (0.5, 0.5, 0.3), strict=True):
        assert cli("--model", "llama", "--method", method, "--sparsity", sparsity, "--output", folder, *small).code == 0
    result = cli("compare", *folders, "--html", "all.html", "--json")
    assert result.code == 0, result.err
    entries = json.loads(result.out)
    reports = [json.loads((Path(folder) / "llmprune.json").read_text()) for folder in folders]
    for entry, report in zip(entries, reports, strict=True):
        (found,) = entry["found"].values()
        assert found["perplexity"] == report["perplexity"][0]["pruned"]["value"]
        assert entry["left"] == report["sparsity"]["parameters"] - report["sparsity"]["zeros"]
    printed = cli("compare", *folders).out
    assert all(folder in printed for folder in folders)
    assert f"{reports[0]['perplexity'][0]['dense']['value']:.4g}" in printed

    found = read_page(Path("all.html").read_text())
    numbers = [number for report in reports for number in (*leaves(report), *follows(report))]
    shares = [sum(r["zeros"] for r in b["rows"]) / sum(r["rows"] * r["columns"] for r in b["rows"]) for report in reports for b in report["blocks"]]
    for value, text in found.numbers:
        assert known(value, numbers + shares), (value, text)
        assert rounds_to(value, text)
    rows = [said for tag, said in found.texts if tag in ("th", "td")]
    assert rows.count("yes") == 2  # wanda at 30 % and at 50 %: magnitude is beaten


def result(name: str, sparsity: float, texts: dict[str, tuple[float, float]]) -> Result:
    """texts: the perplexities of the pruned and the dense model, by definition."""
    found = {text: Found(pruned, 0.1, 0.9) for text, (pruned, _) in texts.items()}
    return Result(name, ("m", ""), "wanda", "2:4", sparsity, None, found, {text: dense for text, (_, dense) in texts.items()})


def test_nothing_is_best_among_results_of_different_texts() -> None:
    one, both = result("one", 0.5, {"a": (70.0, 40.0)}), result("both", 0.4, {"b": (30.0, 20.0), "a": (60.0, 40.001)})
    second, renamed = result("second", 0.3, {"b": (25.0, 20.0)}), result("renamed", 0.3, {"a": (25.0, 20.0)})
    table = compared([both, one])
    assert [row[-1].text for row in table.rows] == ["", "yes", "yes"]
    assert "Best: no other result is as sparse and predicts as well, and is better in one of the two, by [2]." in remarks([both, one])
    for found in ([one, second], [one, both, second], [one, renamed]):
        assert "best" not in compared(found).heads
        assert {len(row) for row in compared(found).rows} == {len(compared(found).heads)}
        assert "None is called best: not all results were measured on the same text." in remarks(found)


def test_a_uniform_heat_map_is_one_sentence(ran: dict[str, Any]) -> None:
    report = Report.from_json(ran)
    equal = [replace(block, rows=tuple(replace(row, zeros=row.size // 4, kept=None) for row in block.rows)) for block in report.blocks]
    (said,) = (s for s in sections(replace(report, blocks=tuple(equal))) if s.id == "sparsity")
    assert (said.picture, said.said) == ("", ("Every matrix of every block has lost 25.0% of its weights.",))
    assert said.table is not None


def test_a_sweep_has_its_frontier(cli: Cli, small: tuple[object, ...]) -> None:
    words = ("--methods", "magnitude,wanda", "--sparsities", "0.4,0.6")
    assert cli("sweep", "--model", "llama", *words, "--output", "table", *small).code == 0
    result = cli("compare", "table", "--html", "sweep.html")
    assert result.code == 0, result.err
    stored = json.loads(Path("table/sweep.json").read_text())
    found = read_page(Path("sweep.html").read_text())
    assert {row["perplexity"][0]["value"] for row in stored["rows"]} <= {value for value, _ in found.numbers}
    assert "dense" in [said for _, said in found.texts]
    assert result.out.count("yes") == 2
