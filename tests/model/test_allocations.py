"""Ratios measured on whole models: the budget to one weight, on families of unequal matrices and experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny, tiny_model, tiny_windows
from often import often

import llmprune
from llmprune.data.reading import read_windows
from llmprune.errors import RequestError
from llmprune.model.matrices import Selection
from llmprune.stream.live import LiveStream
from llmprune.stream.selected import selected

IDS_NL = tiny_windows()
MANY = ["llama", "gpt2", "phi3", "gemma2", "falcon_new", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "mamba", "lfm2"]


ALL = ["fisher", "global", "owl", "heavy_tail", "entropy", "sensitivity", "flap", "uniform", "erk"]
CASES = [(family, allocation) for family in MANY for allocation in ALL]


@pytest.mark.parametrize(
    ("family", "allocation"), often(CASES, *((f, a) for f, a in CASES if a == "fisher" or f == "qwen3_moe" or (f, a) == ("gpt_oss", "global")))
)
def test_the_budget_is_met_to_one_weight(family: str, allocation: str) -> None:
    model = tiny_model(family)
    report = llmprune.prune(model, 0.6, calibration=IDS_NL, method="wanda", allocation=allocation)
    total = sum(row.rows * row.columns for row in report.rows)
    assert abs(sum(row.asked * row.rows * row.columns for row in report.rows) - 0.6 * total) < 1
    assert all(0 <= row.asked < 1 and row.zeros == round(row.asked * row.rows * row.columns) for row in report.rows)
    assert (len({round(row.asked, 6) for row in report.rows}) > 1) == (allocation != "uniform")
    assert report.reasons.keys() <= {row.matrix for row in report.rows}
    assert bool(report.reasons) == (allocation != "uniform")


MAX: dict[str, Any] = {"quality": "max", "polish_steps": 2}
METHODS: list[dict[str, Any]] = [{"method": "magnitude"}, {"method": "sparsegpt"}, {"method": "alps"}, {"quality": "fast"}, {"criterion": "gblm"}]
RATIOS = [(method, allocation) for method in (*METHODS, MAX) for allocation in ("fisher", "global")]


@pytest.mark.parametrize(("method", "allocation"), often(RATIOS, *((m, "fisher") for m in METHODS[1:]), (METHODS[0], "global"), (MAX, "global")))
def test_any_method_takes_the_ratios(method: dict[str, Any], allocation: str, tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "model")
    report = llmprune.prune(tmp_path / "model", 0.5, calibration=IDS_NL, allocation=allocation, output=str(tmp_path / "out"), **method)
    assert all(row.zeros == round(row.asked * row.rows * row.columns) for row in report.rows)
    stored = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert stored["reasons"] == report.reasons
    assert stored["recipe"]["allocation"] == allocation
    assert stored["sparsity"]["zeros"] == sum(row.zeros for row in report.rows)


def test_our_own_presets_choose_fisher_and_papers_stay_uniform() -> None:
    for ask, expected in (
        ({"sparsity": 0.5}, "fisher"),
        ({"sparsity": 0.5, "pattern": "block:2x4"}, "fisher"),
        ({"pattern": "2:4"}, "uniform"),
        ({"sparsity": 0.5, "quality": "fast"}, "fisher"),
        ({"pattern": "2:4", "quality": "fast"}, "uniform"),
        ({"sparsity": 0.5, "method": "alps"}, "uniform"),
        ({"sparsity": 0.5, "allocation": "uniform"}, "uniform"),
    ):
        report = llmprune.prune(tiny_model("llama"), calibration=IDS_NL, **ask)
        assert report.recipe["allocation"] == expected


def test_ratios_by_name() -> None:
    model = tiny_model("llama")
    report = llmprune.prune(model, 0.5, calibration=IDS_NL, method="wanda", allocation="explicit", ratios={"down_proj": 0.25, r"layers\.0\.": 0.75})
    by_name = {row.matrix: row.asked for row in report.rows}
    rest = set()
    for name, ratio in by_name.items():
        if "down_proj" in name:
            assert ratio == 0.25
        elif ".layers.0." in name:
            assert ratio == 0.75
        else:
            rest.add(ratio)
    assert len(rest) == 1
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        ({"pattern": "2:4", "allocation": "owl"}, "no sparsity"),
        ({"pattern": "2:4", "sparsity": 0.5, "allocation": "owl"}, "pattern 2:4 mixed by allocation 'owl' at sparsity 0.5"),
        ({"pattern": "2:4", "sparsity": 0.4}, "pattern 2:4 means sparsity 0.5, not 0.4"),
        ({"pattern": "2:4", "sparsity": 0.4, "allocation": "explicit", "ratios": {"o_proj": 0.5}}, "allocation 'explicit' with pattern 2:4"),
        ({"pattern": "2:4", "sparsity": 0.4, "allocation": "search"}, "allocation 'search' with pattern 2:4"),
        ({"pattern": "2:4", "target_params": 9_000}, "target_params with pattern 2:4"),
        ({"sparsity": 0.5, "target_params": 9_000}, "sparsity together with target_params"),
        ({"target_params": 9_000, "max_ppl_increase": 0.05}, "target_params together with max_ppl_increase"),
        ({"target_params": 900}, "target_params 900: the model has"),
        ({"target_params": "9e3%"}, "target_params '9e3%': is not a count"),
        ({"max_ppl_increase": "5 percent"}, "max_ppl_increase '5 percent': is not a number"),
        ({"max_ppl_increase": 0}, "max_ppl_increase 0: is outside"),
        ({"max_ppl_increase": 0.05, "allocation": "auto"}, "max_ppl_increase with allocation 'auto'"),
        ({"sparsity": 0.5, "allocation": "auto", "only": "proj|lm_head"}, "trials of ratios with a pruned head"),
        ({"sparsity": 0.5, "allocation": "explicit"}, "ratios and allocation 'explicit' go together"),
        ({"sparsity": 0.5, "ratios": {"o_proj": 0.5}}, "ratios and allocation 'explicit' go together"),
        ({"sparsity": 0.5, "allocation": "explicit", "ratios": {"o_proj": 1.0}}, "ratios: 1 is outside"),
        ({"sparsity": 0.5, "allocation": "explicit", "ratios": {"q_porj": 0.5}}, "'q_porj' matches no matrix's name"),
        ({"sparsity": 0.9, "allocation": "explicit", "ratios": {"mlp": 0.0}}, "matrices would have to lose"),
    ],
)
def test_refused(ask: dict[str, Any], says: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    with pytest.raises(RequestError) as refused:
        llmprune.prune(tmp_path / "model", calibration=IDS_NL, method="wanda", output=str(tmp_path / "out"), **ask)
    assert says in refused.value.message
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("family", often(["llama", "mixtral", "gpt2"], "llama"))
def test_trials_leave_no_trace_and_keep_the_best(family: str, tmp_path: Path) -> None:
    """A run by ``auto`` is a run by the allocation that it says it has kept, live and from a folder."""
    save_tiny(family, tmp_path / "model", torch.float32)
    ids_NL = torch.cat([IDS_NL] * 2)
    ask = {"sparsity": 0.6, "method": "sparsegpt", "calibration": ids_NL}
    report = llmprune.prune(tmp_path / "model", allocation="auto", output=str(tmp_path / "auto"), **ask)
    assert [trial.allocation for trial in report.tried] == ["uniform", "fisher", "owl"]
    (kept,) = [trial for trial in report.tried if trial.kept]
    assert kept.divergence == min(trial.divergence for trial in report.tried)
    live = llmprune.prune(tiny_model(family), allocation="auto", **ask)
    assert [trial.divergence for trial in live.tried] == pytest.approx([trial.divergence for trial in report.tried], rel=1e-4)
    held = max(1, len(ids_NL) // 8)
    alone = llmprune.prune(tmp_path / "model", allocation=kept.allocation, output=str(tmp_path / "alone"), **ask | {"calibration": ids_NL[:-held]})
    assert alone.rows == report.rows
    for file in (tmp_path / "alone").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "auto" / file.name).read_bytes()


def test_divergence_of_a_trial_is_that_of_the_pruned_model(tmp_path: Path) -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    report = llmprune.prune(model, 0.6, method="wanda", calibration=IDS_NL, allocation="auto")
    (kept,) = [trial for trial in report.tried if trial.kept]
    held_NL = IDS_NL[-max(1, len(IDS_NL) // 8) :]
    with torch.no_grad():
        theirs, ours = (m(held_NL).logits.log_softmax(-1) for m in (dense, model))
    assert kept.divergence == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-4)


@pytest.mark.parametrize("family", often(["llama", "qwen3_moe"], "llama"))
def test_a_search_meets_the_budget_and_is_no_worse_than_its_start(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.ratios.trials.STEP", 0.1)
    report = llmprune.prune(tiny_model(family), 0.6, method="sparsegpt", calibration=torch.cat([IDS_NL] * 2), allocation="search")
    sizes = {row.matrix: row.rows * row.columns for row in report.rows}
    assert abs(sum(row.asked * sizes[row.matrix] for row in report.rows) - 0.6 * sum(sizes.values())) < 1
    (kept,) = [trial for trial in report.tried if trial.kept]
    assert kept.divergence == min(trial.divergence for trial in report.tried)
    assert len(report.tried) == 4


@pytest.mark.parametrize("allocation", ["fisher", "sensitivity", "owl"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_mixed_patterns(family: str, allocation: str) -> None:
    model = tiny_model(family)
    report = llmprune.prune(model, 0.35, "2:4", calibration=IDS_NL, method="sparsegpt", allocation=allocation)
    asked = {row.asked for row in report.rows}
    assert asked <= {0.0, 0.25, 0.5}
    assert len(asked) > 1
    assert all(row.zeros == round(row.asked * row.rows * row.columns) for row in report.rows)
    total = sum(row.rows * row.columns for row in report.rows)
    step = 0.25 * min(row.rows * row.columns for row in report.rows if row.asked < 0.5)
    assert 0.35 * total - step <= report.zeros <= 0.35 * total + 0.5
    (index,) = [i for i, row in enumerate(report.rows) if row.asked == 0.25][:1]
    stream = LiveStream(model)
    matrices = {f"{stream.path_of(i)}.{m.name}": (i, m) for i, ms in selected(stream, Selection()).items() for m in ms}
    at, matrix = matrices[report.rows[index].matrix]
    weight_RC = matrix.view(stream.walk.blocks[at])
    assert bool(((weight_RC.reshape(len(weight_RC), -1, 4) == 0).sum(-1) >= 1).all())


@pytest.mark.parametrize("ask", [{"target_params": 15_000}, {"target_params": "15k", "allocation": "uniform"}])
def test_a_budget_of_parameters(ask: dict[str, Any]) -> None:
    model = tiny_model("llama")
    llmprune.prune(model, calibration=IDS_NL, method="wanda", **ask)
    assert abs(sum(int((p != 0).sum()) for p in model.parameters()) - 15_000) <= len(list(model.parameters()))


def test_a_budget_of_perplexity_ends_near_its_limit(tmp_path: Path) -> None:
    """On text that the model knows: what the report says of the held-back windows is what the saved model does on them."""
    ask: dict[str, Any] = {"method": "wanda", "samples": 24, "sequence_length": 64, "max_ppl_increase": "20%"}
    report = llmprune.prune("llama", output=str(tmp_path / "out"), **ask)
    chosen = next(step for step in report.frontier if step.sparsity == report.asked)
    assert 0.17 <= chosen.increase <= 0.2
    assert all(step.increase > 0.2 for step in report.frontier if step.sparsity > report.asked)
    assert report.sparsity == pytest.approx(report.asked, abs=1e-3)
    windows = read_windows("bundled-calibration", "calibration", llmprune.load(tmp_path / "out")[1], 64, None)
    held_NL = windows.held_back(32)[1].ids_NL
    model = llmprune.load(tmp_path / "out", dtype=torch.float32)[0]
    with torch.no_grad():
        losses = [model(ids[None], labels=ids[None]).loss for ids in held_NL]
    assert float(torch.stack(losses).mean().exp()) == pytest.approx(chosen.perplexity, rel=1e-3)
