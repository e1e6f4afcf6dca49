"""The fallback that loads the whole model gives what the block-by-block way gives."""

from __future__ import annotations

import pytest
import torch
from families import save_tiny

import llmprune
from llmprune.errors import ConversionError


def no_names(skeleton, keys):
    raise ConversionError("tried out")


@pytest.mark.parametrize("family", ["mixtral", "gpt_neox"])
def test_fallback_equals_block_by_block(tmp_path, monkeypatch, family):
    save_tiny(family, tmp_path / "model")
    ids = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    ask = {"calibration": ids, "method": "sparsegpt", "pattern": "2:4"}
    usual = llmprune.prune(tmp_path / "model", output=str(tmp_path / "usual"), **ask)
    monkeypatch.setattr("llmprune.checkpoint.loader.parameter_names", no_names)
    whole = llmprune.prune(tmp_path / "model", output=str(tmp_path / "whole"), **ask)
    assert usual.environment.block_by_block
    assert not whole.environment.block_by_block
    assert whole.rows == usual.rows
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (tmp_path / "usual" / "model.safetensors").read_bytes()


def test_without_transformers_conversion_a_parameter_is_one_matrix(tmp_path, monkeypatch):
    """Which of the checkpoint's tensors make it up is not known then; SparseGPT prunes row by row, so the files are the same."""
    save_tiny("mixtral", tmp_path / "model")
    ids = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    ask = {"calibration": ids, "method": "sparsegpt", "pattern": "2:4"}
    llmprune.prune(tmp_path / "model", output=str(tmp_path / "usual"), **ask)
    monkeypatch.setattr("llmprune.checkpoint.names.MOVED", "tried out")
    whole = llmprune.prune(tmp_path / "model", output=str(tmp_path / "whole"), **ask)
    assert not whole.environment.block_by_block
    assert "model.layers.0.mlp.experts.gate_up_proj[0]" in {row.matrix for row in whole.rows}
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (tmp_path / "usual" / "model.safetensors").read_bytes()


def test_a_conversion_that_does_not_lead_back_falls_back(tmp_path, monkeypatch):
    save_tiny("mixtral", tmp_path / "model")
    ids = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("llmprune.checkpoint.loader.revert", lambda skeleton, parameters: {"elsewhere": torch.zeros(1)})
    report = llmprune.prune(tmp_path / "model", 0.5, calibration=ids, method="wanda", output=str(tmp_path / "out"))
    assert not report.environment.block_by_block
    assert report.sparsity == 0.5
