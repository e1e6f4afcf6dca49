"""Models with several residual streams for each token (Gemma 3n): its blocks take them all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny
from model.test_carried import CPU, IDS, check_gradients
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.checkpoint.source import open_folder
from llmprune.evaluation.divergence import after_blocks
from llmprune.model.kinds import values_per_token
from llmprune.run.prepare import open_stream
from llmprune.stream.stream import Stream


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("gemma3n_text", tmp_path / "model", torch.float32)


def stream_of(folder: Path) -> Stream:
    return open_stream(open_folder(folder, "model"), torch.float32, CPU)


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_the_blocks_walked_one_by_one_are_the_model(folder: Path) -> None:
    flow = after_blocks(stream_of(folder), IDS)
    wanted = torch.cat([plain(folder)(input_ids=ids_1L, use_cache=False).logits for ids_1L in IDS.split(1)])
    torch.testing.assert_close(torch.cat([logits for _, logits in flow.logits()]), wanted, rtol=1e-5, atol=1e-5)
    assert flow.hidden[0].shape[-1] == values_per_token(plain(folder).config)


def test_gradients_are_those_of_the_model(folder: Path) -> None:
    check_gradients(stream_of(folder), plain(folder))


@pytest.mark.parametrize("live", [False, True], ids=["folder", "live"])
def test_it_is_pruned_by_the_default_quality_and_loads(folder: Path, tmp_path: Path, live: bool) -> None:
    where = {} if live else {"output": str(tmp_path / "out")}
    report = llmprune.prune(plain(folder) if live else folder, pattern="2:4", calibration=IDS, accept_damage=True, **where)
    assert all(row.zeros * 2 == row.rows * row.columns for row in report.rows)
    if not live:
        assert report.reloaded.difference < 1e-5
