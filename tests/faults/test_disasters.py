"""Each planted disaster once, with methods by turns; `PYTHONPATH=tests python -m faults.disasters` for every disaster with every method."""

from __future__ import annotations

import pytest
from faults.disasters import DISASTERS, cases, ended

QUICK = ("wanda", "sparsegpt", "alps 2:4", "fast channels")
CHOSEN = [(name, next(m for m in (*QUICK[i % 4 :], *QUICK) if (name, m) in cases())) for i, name in enumerate(DISASTERS)]


@pytest.mark.parametrize(("name", "method"), CHOSEN)
def test_a_disaster_stops_the_run_or_is_recovered_from_and_recorded(tmp_path, name: str, method: str) -> None:
    found, wanted = ended(name, method, tmp_path)
    assert found == wanted
