from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _quick(pictures_once: None) -> None:
    """The runs of a test of this folder differ in what befalls them, not in their pictures."""
