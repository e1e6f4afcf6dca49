"""Memory that runs out at any moment of a run: one line with what to do, no output, and the same command goes on to the same result."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.runs import contents, small_text
from torch.utils._python_dispatch import TorchDispatchMode

from llmprune.cli.main import main

TORCH_SAYS = "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes. Error code 12"
ASK = ["--model", "llama", "--samples", "2", "--sequence-length", "16", "--eval", "small.txt", "--output", "out"]
CASES = {
    "wanda": ["--method", "wanda", "--sparsity", "0.5"],
    "balanced 2:4": ["--quality", "balanced", "--pattern", "2:4"],
    "balanced": ["--quality", "balanced", "--sparsity", "0.5"],
    "channels": ["--pattern", "channels", "--sparsity", "0.25"],
}


class Exhausted(TorchDispatchMode):
    """From its operation number ``at`` on, torch can do nothing more: any of them may be the one that wants memory."""

    def __init__(self, at: int | None, error: Exception) -> None:
        super().__init__()
        self.done = 0
        self._at = at
        self._error = error

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.done += 1
        if self._at is not None and self.done >= self._at:
            raise self._error
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The command's own handlers of signals go with it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(words: list[str], at: int | None = None, error: Exception | None = None) -> tuple[int, int]:
    """(exit code, operations done) of a command in this process."""
    with pytest.raises(SystemExit) as stopped, Exhausted(at, error or RuntimeError(TORCH_SAYS)) as operations:
        main(words)
    return int(stopped.value.code or 0), operations.done


@pytest.mark.parametrize(
    ("case", "moments"),
    [("wanda", 3), pytest.param("balanced 2:4", 3, marks=pytest.mark.slow), *(pytest.param(case, 60, marks=pytest.mark.slow) for case in CASES)],
)
def test_memory_that_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], case: str, moments: int) -> None:
    words = [*ASK, *CASES[case]]
    whole = tmp_path / "whole"
    whole.mkdir()
    small_text(whole)
    monkeypatch.chdir(whole)
    code, operations = ended(words)
    assert code == 0
    wanted = contents(whole / "out")
    for moment in range(moments):
        folder = tmp_path / f"at-{moment}"
        folder.mkdir()
        small_text(folder)
        monkeypatch.chdir(folder)
        capfd.readouterr()
        error = MemoryError() if moment % 2 else RuntimeError(TORCH_SAYS)
        at = 1 + moment * (operations - 1) // moments
        code, _ = ended(words, at, error)
        said = capfd.readouterr().err.splitlines()
        errors = [line for line in said if line.startswith("error: ")]
        assert len(errors) == 1, (at, said)
        assert code == 3 or (code == 2 and at == 1), (at, said)  # before the model is built, its sizes may be what is wrong
        assert "memory" in errors[0], (at, said)
        assert not any("Traceback" in line for line in said), (at, said)
        assert not (folder / "out").exists()
        assert ended(words)[0] == 0
        assert contents(folder / "out") == wanted, at
