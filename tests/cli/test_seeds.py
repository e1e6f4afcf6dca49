"""--seed reaches everything that is drawn: another one gives other bytes, the same one the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny, tiny_windows
from often import often

import llmprune
from llmprune.checkpoint.resolve import BUNDLED

IDS_NL = tiny_windows(18)
DRAWS: dict[str, dict[str, Any]] = {
    "shuffle": {"model": "llama", "method": "wanda", "pattern": "2:4", "samples": 4, "sequence_length": 32, "shuffle": True},
    "permute": {"method": "wanda", "pattern": "2:4", "permute": True},
    "polish": {"method": "wanda", "pattern": "2:4", "polish": "kd", "polish_steps": 2},
    "random": {"criterion": "random", "sparsity": 0.5},
    # more windows than one micro-batch holds: it draws among micro-batches
    "reconstruct": {"calibration": tiny_windows(300), "criterion": "wanda", "solver": "reconstruct", "pattern": "2:4", "options": {"steps": 4}},
    "search": {"method": "wanda", "sparsity": 0.5, "allocation": "search"},
}


def weights(ask: dict[str, Any], seed: int, folder: Path) -> bytes:
    (folder / "text.txt").write_text((BUNDLED / "evaluation.txt").read_text()[:4000])
    given = {"eval": [str(folder / "text.txt")]} if "model" in ask else {"model": str(folder / "model"), "calibration": IDS_NL}
    llmprune.prune(**given | ask, seed=seed, device="cpu", output=str(folder / "out"), overwrite=True)
    return (folder / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("draw", often(DRAWS, "shuffle", "permute", "random"))
def test_another_seed_gives_other_bytes(draw: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", torch.float32)
    first, again, other = (weights(DRAWS[draw], seed, tmp_path) for seed in (7, 7, 8))
    assert first == again
    assert first != other
