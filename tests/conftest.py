"""Shared fixtures. The real models and texts beside the checkout are optional: tests that need them skip where they are absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from shortcuts import PICTURES, SKETCHES, load_here

from llmprune.export.reload import Reloader
from llmprune.report import sections

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # models are loaded in forks too, whose threads are not OpenMP's
torch.set_num_threads(1)

START, LOAD = Reloader.start, Reloader.load
ROOT = Path(__file__).parent.parent
ASSETS = Path(os.environ.get("LLMPRUNE_ASSETS", ROOT.parent / "shared" / "assets"))


@pytest.fixture(scope="session")
def assets() -> Path:
    if not (ASSETS / "stories260K").is_dir():
        pytest.skip("the real test models are not here; LLMPRUNE_ASSETS names their folder")
    return ASSETS


@pytest.fixture(scope="session", autouse=True)
def short_samples() -> Iterator[None]:
    """A run's sample is as many forwards of the whole model as it has tokens, half the time of a run in these tests; four tokens show the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmprune.evaluation.sample.TOKENS", 4)
        yield


@pytest.fixture(scope="session", autouse=True)
def reloaded_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Starting a process takes seconds, so a result is loaded again in this one, whose imports are there, but where a test is marked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reloader, "start", lambda self: None)
        patch.setattr(Reloader, "load", load_here)
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.getbasetemp() / "modules"))
        yield


@pytest.fixture(autouse=True)
def fresh_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests with the mark of this name."""
    if request.node.get_closest_marker("fresh_process"):
        monkeypatch.setattr(Reloader, "start", START)
        monkeypatch.setattr(Reloader, "load", LOAD)


@pytest.fixture(scope="session", autouse=True)
def sketched() -> Iterator[None]:
    """Pictures are most of a run as short as in these tests (see shortcuts.py); ``pictures`` asks for real ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name, sketch in SKETCHES.items():
            patch.setattr(sections, name, sketch)
        yield


@pytest.fixture(scope="module")
def pictures(sketched: None) -> Iterator[None]:
    """For files of tests that look at a report's pictures."""
    with pytest.MonkeyPatch.context() as patch:
        for name, draw in PICTURES.items():
            patch.setattr(sections, name, draw)
        yield
