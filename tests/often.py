"""Cases of a test that run every time; its other cases are slow, and run by ``python -m pytest -m slow``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def often(cases: Iterable[Any], *every_time: Any) -> list[Any]:
    """Parameters of all cases, the others marked slow. Raises ValueError where one of ``every_time`` is not among the cases."""
    found = list(cases)
    unknown = [case for case in every_time if case not in found]
    if unknown:
        raise ValueError(f"no such cases: {unknown}")
    return [_parameter(case, () if case in every_time else (pytest.mark.slow,)) for case in found]


def _parameter(case: Any, marks: tuple[Any, ...]) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)
