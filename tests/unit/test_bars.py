"""Progress bars of calls from Python: where somebody looks, and nowhere else."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest
from transformers.utils import logging

from llmprune.report.bars import bars
from llmprune.types import SILENT


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def phases() -> str:
    """What two phases have written to the error stream."""
    with bars() as listen:
        for phase, total in (("gradients", 3), ("prune", 2), ("prune", 2)):
            for done in range(total + 1):
                listen.progress(phase, done, total)
    return sys.stderr.getvalue() if isinstance(sys.stderr, io.StringIO) else ""


@pytest.fixture(autouse=True)
def switched_on() -> Iterator[None]:
    """Other tests of this process may have switched transformers' bars off."""
    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    yield
    if not before:
        logging.disable_progress_bar()


def test_a_terminal_has_a_bar_for_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    said = phases()
    assert said.count("gradients: 100%") == 1
    assert said.count("prune: 100%") == 2
    assert "2/2" in said


def test_a_pipe_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert phases() == ""
    with bars() as listen:
        assert listen is SILENT


def test_those_of_transformers_switched_off_are_ours_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    logging.disable_progress_bar()
    assert phases() == ""
