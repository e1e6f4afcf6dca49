from __future__ import annotations

import pytest
from cli.runner import Cli

from llmprune.checkpoint.resolve import BUNDLED


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line, in an empty current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Cli(capsys)


@pytest.fixture
def small(tmp_path) -> tuple[object, ...]:
    """Flags that keep a run on the bundled model short."""
    text = tmp_path / "small.txt"
    text.write_text((BUNDLED / "evaluation.txt").read_text()[:4000])
    return ("--samples", 8, "--sequence-length", 64, "--eval", text)
