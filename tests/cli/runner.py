"""Runs the command line inside the test process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from llmprune.cli.main import main

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Ran:
    code: int
    out: str
    err: str


class Cli:
    """Calls llmprune with words and hands back the exit code and what was printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: object) -> Ran:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        printed = self._capsys.readouterr()
        return Ran(int(stopped.value.code or 0), printed.out, printed.err)
