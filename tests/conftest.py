"""Shared fixtures. The real models and texts beside the checkout are optional: tests that need them skip where they are absent."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune.export.reload import Loaded, Reloader, loaded
from llmprune.report import sections

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


@pytest.fixture(scope="session", autouse=True)
def short_samples() -> Iterator[None]:
    """A run's sample is as many forwards of the whole model as it has tokens, half the time of a run in these tests; four tokens show the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmprune.evaluation.sample.TOKENS", 4)
        yield


@pytest.fixture(autouse=True)
def reloaded_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Starting a process takes seconds, so a result is loaded again in this one, whose imports are there, but where a test is marked."""
    if request.node.get_closest_marker("fresh_process"):
        return

    def load(self: Reloader, folder: Path, ids_1L: torch.Tensor) -> Loaded:
        return loaded(self.source, folder, self.dtype, ids_1L)

    monkeypatch.setattr(Reloader, "start", lambda self: None)
    monkeypatch.setattr(Reloader, "load", load)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.getbasetemp() / "modules"))


@pytest.fixture(scope="session")
def drawn() -> dict[str, str]:
    return {}


@pytest.fixture
def pictures_once(monkeypatch: pytest.MonkeyPatch, drawn: dict[str, str]) -> None:
    """For tests that make the same result again and again: a picture of the same numbers is not drawn twice."""
    for name in ("bars", "curves", "heat_map"):
        monkeypatch.setattr(f"llmprune.report.sections.{name}", _remembered(getattr(sections, name), drawn))


def _remembered(draw: Callable[..., str], drawn: dict[str, str]) -> Callable[..., str]:
    @wraps(draw)
    def remembered(*values: Any, **named: Any) -> str:
        key = repr((draw.__name__, values, named))
        if key not in drawn:
            drawn[key] = draw(*values, **named)
        return drawn[key]

    return remembered
