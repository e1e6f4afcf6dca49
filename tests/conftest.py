"""Shared fixtures. The real models and texts beside the checkout are optional: tests that need them skip where they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
ASSETS = Path(os.environ.get("LLMPRUNE_ASSETS", ROOT.parent / "shared" / "assets"))


@pytest.fixture(scope="session")
def assets() -> Path:
    if not (ASSETS / "stories260K").is_dir():
        pytest.skip("the real test models are not here; LLMPRUNE_ASSETS names their folder")
    return ASSETS
