"""Each planted disaster once, with methods by turns; `PYTHONPATH=tests python -m faults.disasters` for every disaster with every method."""

from __future__ import annotations

import pytest
from families import tiny_windows
from faults.disasters import DISASTERS, cases, ended, planted

import llmprune

QUICK = ("wanda", "sparsegpt", "alps 2:4", "fast channels")
CHOSEN = [(name, next(m for m in (*QUICK[i % 4 :], *QUICK) if (name, m) in cases())) for i, name in enumerate(DISASTERS)]


CHOSEN += [("NaN activations", "magnitude"), ("zero calibration", "magnitude")]  # which looks at outputs alone


@pytest.mark.parametrize(("name", "method"), CHOSEN)
def test_a_disaster_stops_the_run_or_is_recovered_from_and_recorded(tmp_path, name: str, method: str) -> None:
    found, wanted = ended(name, method, tmp_path)
    assert found == wanted


def test_accepted_damage_stands_in_the_report(tmp_path) -> None:
    spoil, _, options, _ = DISASTERS["output destroyed"]
    asked = {name: value for name, value in options.items() if value is not None}
    report = llmprune.prune(
        planted(tmp_path / "m", spoil), 0.5, calibration=tiny_windows(), output=str(tmp_path / "out"), accept_damage=True, **asked
    )
    assert max(block.output_error for block in report.blocks) > 1
