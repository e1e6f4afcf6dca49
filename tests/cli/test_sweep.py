"""llmprune sweep: rows equal runs of their own, calibration is shared, a killed sweep goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cli.runner import Cli
from families import save_tiny, tiny_windows
from often import often

import llmprune
from llmprune.data.windows import Windows
from llmprune.recipe.reading import recipes_of_sweep
from llmprune.run import sweep as sweeping
from llmprune.run.sweep import prepare_sweep, run_sweep
from llmprune.types import Listener

METHODS = ["magnitude", "wanda", "sparsegpt", "balanced"]
SPARSITIES = ["0.3", "0.4", "0.5", "0.6"]
KILLED: list[tuple[list[str], list[str]]] = [(METHODS[1::2], SPARSITIES[::2]), (METHODS, SPARSITIES)]


def asked(small: tuple[object, ...], methods: list[str], sparsities: list[str], patterns: list[str]) -> list[object]:
    base = {"model": "llama", "samples": 8, "sequence_length": 64, "eval": [str(small[-1])]}
    return recipes_of_sweep(None, base, methods, sparsities, patterns)


@pytest.mark.parametrize("patterns", often(["unstructured", "unstructured,2:4"], "unstructured"))
def test_rows_are_those_of_runs_of_their_own(cli: Cli, small: tuple[object, ...], patterns: str) -> None:
    several = patterns.split(",")
    words = ("--methods", "wanda,balanced", "--sparsities", "60%", "--patterns", patterns)
    ran = cli("sweep", "--model", "llama", *words, "--output", "table", *small)
    assert ran.code == 0, ran.err
    assert f"{2 * len(several)} prunings" in ran.out
    stored = json.loads(Path("table/sweep.json").read_text())
    assert [(row["method"], row["pattern"]) for row in stored["rows"]] == [(m, p) for m in ("wanda", "balanced") for p in several]
    for number, row in enumerate(stored["rows"]):
        kind = {"method" if row["method"] == "wanda" else "quality": row["method"]}
        share = {} if row["pattern"] == "2:4" else {"sparsity": row["asked"]}
        ask = {"samples": 8, "sequence_length": 64, "eval": [str(small[-1])], "output": f"alone{number}"}
        alone = llmprune.prune("llama", pattern=row["pattern"], **kind, **share, **ask)
        assert row["perplexity"][0]["value"] == alone.perplexity[0].pruned.value
        assert row["sparsity"] == alone.sparsity
        assert stored["dense"][0]["value"] == alone.perplexity[0].dense.value
    table = Path("table/sweep.md").read_text()
    assert table.count("\n| balanced | ") == len(several)
    assert Path("table/sweep.svg").read_text().count("<svg") == 1
    assert ("balanced 2:4" if "2:4" in several else "balanced") in Path("table/sweep.svg").read_text()


@pytest.mark.parametrize(("methods", "sparsities"), often(KILLED, KILLED[0]))
def test_a_sweep_survives_a_kill(
    cli: Cli, small: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, methods: list[str], sparsities: list[str]
) -> None:
    passes = []
    gradients = sweeping.dense_gradients

    def counted(*args: object) -> object:
        passes.append("gradients")
        return gradients(*args)

    class Killed(Exception):
        pass

    def killed_after_three(step: str, done: int, total: int) -> None:
        if (step, done) == ("sweep", 3):
            raise Killed

    monkeypatch.setattr(sweeping, "dense_gradients", counted)
    rows = asked(small, methods, sparsities, ["unstructured"])
    whole = run_sweep(prepare_sweep(rows, Path("whole")))
    assert passes == ["gradients"]
    with pytest.raises(Killed):
        run_sweep(prepare_sweep(rows, Path("table")), Listener(progress=killed_after_three))
    assert not Path("table").exists()
    pruned = []
    prune_row = sweeping.prune_row
    monkeypatch.setattr(sweeping, "prune_row", lambda *args: pruned.append(args[1]) or prune_row(*args))
    resumed = run_sweep(prepare_sweep(rows, Path("table")))
    assert len(pruned) == len(rows) - 3
    assert resumed.rows == whole.rows
    assert len(resumed.rows) == len(rows) == len(methods) * len(sparsities)
    assert all(row.sparsity == pytest.approx(row.asked, abs=1e-4) for row in resumed.rows)
    assert not Path("table.partial").exists()


def test_a_quick_sweep_of_one_block_is_a_sweep(tmp_path: Path) -> None:
    """There the pruned path's inputs are the dense path's, so rows that aim at their own outputs have to be the same."""
    save_tiny("llama_one_block", tmp_path / "model")
    found = []
    for quick in (False, True):
        asked = recipes_of_sweep(None, {"model": str(tmp_path / "model")}, ["wanda", "sparsegpt", "alps"], ["0.4", "0.7"], ["unstructured", "2:4"])
        sweep = prepare_sweep(asked, tmp_path / f"quick{quick}", windows=tiny_windows(), quick=quick)
        sweep.job.data = replace(sweep.job.data, evaluation=(Windows(tiny_windows(4), "random tokens", "all"),))
        found.append(run_sweep(sweep))
    for slow, quick in zip(found[0].rows, found[1].rows, strict=True):
        assert (quick.method, quick.pattern, quick.sparsity) == (slow.method, slow.pattern, slow.sparsity)
        assert quick.perplexity[0].value == pytest.approx(slow.perplexity[0].value, rel=1e-6)
    assert len({row.perplexity[0].value for row in found[1].rows}) == len(found[1].rows)


def test_a_quick_sweep_says_so_and_goes_on(cli: Cli, small: tuple[object, ...]) -> None:
    words = ("sweep", "--model", "llama", "--methods", "wanda,balanced", "--sparsities", "0.5,0.6", "--quick", "--output", "table", *small)
    ran = cli(*words)
    assert ran.code == 0, ran.err
    assert "quick: by the dense model's statistics" in ran.out
    assert "quick: by the dense model's statistics" in Path("table/sweep.md").read_text()
    rows = json.loads(Path("table/sweep.json").read_text())["rows"]
    dense = json.loads(Path("table/sweep.json").read_text())["dense"][0]["value"]
    for row in rows:
        assert row["sparsity"] == pytest.approx(row["asked"], abs=1e-4)
        assert row["perplexity"][0]["value"] > dense
    refused = cli("sweep", "--model", "llama", "--methods", "max", "--sparsities", "0.5", "--quick", "--output", "other", *small)
    assert refused.code == 2
    assert "quick sweep of max" in refused.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--methods", "wnda", "--sparsities", "0.5"), "method 'wnda' is unknown"),
        (("--methods", "wanda"), "a sweep of nothing"),
        (("--methods", "", "--sparsities", "0.5"), "a sweep of nothing"),
        (("--methods", "wanda", "--sparsities", "1.5"), "outside 0 <= sparsity < 1"),
        (("--methods", "wanda", "--sparsities", "0.5", "--patterns", "unstructured,2:x"), "pattern '2:x' is unknown"),
        (("--methods", "wanda", "--patterns", "3:7"), "matrices have a width that 7 does not divide"),
        (("--methods", "wanda", "--sparsities", "0.5", "--samples", "1000"), "182 windows of 256, 1000 asked for"),
    ],
)
def test_refused(cli: Cli, words: tuple[str, ...], says: str) -> None:
    ran = cli("sweep", "--model", "llama", "--output", "table", *words)
    assert ran.code == 2
    assert says in ran.err
    assert ran.err.count("error: ") == 1
    assert list(Path().iterdir()) == []


def test_an_output_is_replaced_only_if_asked_and_only_a_sweeps(cli: Cli, small: tuple[object, ...]) -> None:
    words = ("sweep", "--model", "llama", "--methods", "magnitude", "--sparsities", "0.3", "--output", "table", *small)
    assert cli(*words).code == 0
    assert "exists already" in cli(*words).err
    assert cli(*words, "--overwrite").code == 0
    Path("strange").mkdir()
    Path("strange/file").write_text("mine")
    again = cli(*words[: -len(small) - 1], "strange", *small, "--overwrite")
    assert again.code == 2
    assert "contains no sweep.json" in again.err
    assert Path("strange/file").read_text() == "mine"
