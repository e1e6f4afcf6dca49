"""A sample of the damaged checkpoints, and the machinery that runs them; `PYTHONPATH=tests python -m faults.mutants 1000` for many."""

from __future__ import annotations

import time

import pytest
from faults.forks import forked
from faults.mutants import DAMAGES, KINDS, mutants


def test_no_damaged_checkpoint_gives_a_traceback_a_hang_or_a_silently_wrong_result() -> None:
    """Every kind of damage, to every kind of source."""
    count = len(DAMAGES) * len(KINDS)
    figure, said = mutants(count)
    assert figure == f"{count}/{count}", said
    assert "refused" in said
    assert "right" in said


def fails() -> str:
    raise KeyError("x")


def sleeps() -> str:
    time.sleep(60)
    return ""


@pytest.mark.parametrize(
    ("work", "end"), [(lambda: "said\n" * 50_000, ("ended", "said\n" * 50_000)), (fails, ("traceback", "KeyError: 'x'")), (sleeps, ("hang", ""))]
)
def test_what_a_child_does_is_seen(work, end) -> None:
    found = forked(work, 2)
    assert found[0] == end[0]
    assert end[1] in found[1]
