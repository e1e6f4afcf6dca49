"""What stands for the longest parts of a run in tests whose runs are so short that those would be most of it."""

from __future__ import annotations

from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.export.reload import Loaded, Reloader, loaded, parts_of
from llmprune.report import sections

PICTURES = {name: getattr(sections, name) for name in ("bars", "curves", "heat_map")}


def sketch(kind: str, *values: Any, **named: Any) -> str:
    """For a picture: its name and its numbers."""
    return f"<svg><desc>{escape(repr((kind, values, named)))}</desc></svg>"


SKETCHES = {name: partial(sketch, name) for name in PICTURES}


def load_here(self: Reloader, folder: Path, ids_1L: Tensor) -> Loaded:
    """For ``Reloader.load``: in this process, whose imports are there."""
    return loaded(parts_of(self.source), folder, self.dtype, ids_1L)
