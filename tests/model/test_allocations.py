"""Ratios measured on whole models: the budget to one weight, on families of unequal matrices and experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import save_tiny, tiny_model, tiny_windows

import llmprune
from llmprune.errors import RequestError

IDS_NL = tiny_windows()
MANY = ["llama", "gpt2", "phi3", "gemma2", "falcon_new", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "mamba", "lfm2"]


@pytest.mark.parametrize("family", MANY)
@pytest.mark.parametrize("allocation", ["fisher", "global", "owl", "heavy_tail", "uniform"])
def test_the_budget_is_met_to_one_weight(family: str, allocation: str) -> None:
    model = tiny_model(family)
    report = llmprune.prune(model, 0.6, calibration=IDS_NL, method="wanda", allocation=allocation)
    total = sum(row.rows * row.columns for row in report.rows)
    assert abs(sum(row.asked * row.rows * row.columns for row in report.rows) - 0.6 * total) < 1
    assert all(0 <= row.asked < 1 and row.zeros == round(row.asked * row.rows * row.columns) for row in report.rows)
    assert (len({round(row.asked, 6) for row in report.rows}) > 1) == (allocation != "uniform")
    assert report.reasons.keys() <= {row.matrix for row in report.rows}
    assert bool(report.reasons) == (allocation != "uniform")


METHODS = [{"method": "magnitude"}, {"method": "sparsegpt"}, {"method": "alps"}, {"quality": "fast"}, {"criterion": "gblm"}]


@pytest.mark.parametrize("method", [*METHODS, {"quality": "max", "polish_steps": 2}])
@pytest.mark.parametrize("allocation", ["fisher", "global"])
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
        ({"sparsity": 0.5, "quality": "fast"}, "uniform"),
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
        ({"pattern": "2:4", "allocation": "owl"}, "allocation 'owl' with pattern 2:4"),
        ({"sparsity": 0.5, "allocation": "explicit"}, "ratios and allocation 'explicit' go together"),
        ({"sparsity": 0.5, "ratios": {"o_proj": 0.5}}, "ratios and allocation 'explicit' go together"),
        ({"sparsity": 0.5, "allocation": "explicit", "ratios": {"o_proj": 1.0}}, "ratios: 1 is outside"),
        ({"sparsity": 0.5, "allocation": "explicit", "ratios": {"q_porj": 0.5}}, "'q_porj' is in no matrix's name"),
        ({"sparsity": 0.9, "allocation": "explicit", "ratios": {"mlp": 0.0}}, "matrices would have to give up"),
    ],
)
def test_refused(ask: dict[str, Any], says: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    with pytest.raises(RequestError) as refused:
        llmprune.prune(tmp_path / "model", calibration=IDS_NL, method="wanda", output=str(tmp_path / "out"), **ask)
    assert says in refused.value.message
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
