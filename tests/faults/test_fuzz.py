"""Some thousand fuzzed headers and recipes, always the same; `PYTHONPATH=tests python -m faults.fuzz 100000` for others and more."""

from __future__ import annotations

import pytest
from faults.fuzz import READERS, fuzz


@pytest.mark.parametrize("which", READERS)
def test_readers_raise_nothing_but_their_own_errors(which: str) -> None:
    ends = fuzz(600, which)
    assert ends.total() >= 600
    assert ends["refused"] > 100
    assert ends["taken"] > 20, "what is nearly right is right often enough to mean something"
