"""Models with several residual streams for each token (Gemma 3n): its blocks take them all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny
from model.test_carried import CPU, IDS, gradients_by_hooks
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.checkpoint.source import open_folder
from llmprune.evaluation.divergence import after_blocks
from llmprune.model.kinds import values_per_token
from llmprune.model.matrices import block_matrices
from llmprune.run.prepare import open_stream
from llmprune.statistics.gradients import loss_gradients
from llmprune.stream.stream import Stream
from llmprune.types import SILENT, Stats


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
    stream = stream_of(folder)
    matrices = {i: block_matrices(block) for i, block in enumerate(stream.walk.blocks)}
    found = loss_gradients(stream, IDS, matrices, frozenset({"grad_out_sq"}), SILENT)
    wanted = gradients_by_hooks(plain(folder), stream.walk.path)
    for i, ms in matrices.items():
        stats = {m.name: Stats() for m in ms}
        found.add_to(i, stats)
        for m in ms:
            if (i, m.name) in wanted:
                ours_R, theirs_R = stats[m.name].grad_out_sq_R, wanted[i, m.name]
                assert float((ours_R - theirs_R).abs().max() / theirs_R.abs().max().clamp_min(1e-30)) < 1e-4, m.name


@pytest.mark.parametrize("live", [False, True], ids=["folder", "live"])
def test_it_is_pruned_by_the_default_quality_and_loads(folder: Path, tmp_path: Path, live: bool) -> None:
    where = {} if live else {"output": str(tmp_path / "out")}
    report = llmprune.prune(plain(folder) if live else folder, pattern="2:4", calibration=IDS, accept_damage=True, **where)
    assert all(row.zeros * 2 == row.rows * row.columns for row in report.rows)
    if not live:
        assert report.reloaded.difference < 1e-5
