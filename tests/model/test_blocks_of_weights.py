"""block:RxC end to end: whole blocks of zeros in the saved model, with every kind of solver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import save_tiny, tiny_windows
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.model.matrices import block_matrices


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", [{"method": "wanda"}, {"method": "sparsegpt"}, {"quality": "balanced"}, {"quality": "fast"}])
def test_zeros_come_in_blocks(family: str, method: dict[str, Any], tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    report = llmprune.prune(tmp_path / "model", 0.5, "block:2x4", calibration=tiny_windows(), output=str(tmp_path / "out"), **method)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    rows = {row.matrix: row for row in report.rows}
    for block in report.blocks:
        module = model.get_submodule(block.block)
        for m in block_matrices(module):
            if f"{block.block}.{m.name}" in rows:
                zeros = (m.view(module) == 0).reshape(m.rows // 2, 2, m.columns // 4, 4).sum((1, 3))
                row = rows[f"{block.block}.{m.name}"]
                assert set(zeros.unique().tolist()) == {0, 8}
                assert int(zeros.sum()) == row.zeros == 8 * round(row.asked * m.rows * m.columns / 8)
    assert report.recipe["group"] is None
    assert abs(report.sparsity - 0.5) < 0.01
