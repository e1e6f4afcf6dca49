from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _quick(pictures_once: None, reloaded_here: None) -> None:
    """The runs of a test of this folder differ in what befalls them, not in their pictures, nor in the process that loads their output."""
