"""The parts of a page: sections, and their tables, whose cells show a rounded text and carry the number itself."""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.results import Divergence, Perplexity

NUMBERS = "the numbers"


@dataclass(frozen=True)
class Cell:
    """``value`` is the number as llmprune.json has it (or a sum or share over its rows); None for a text."""

    text: str
    value: float | int | None = None


@dataclass(frozen=True)
class PageTable:
    """Rows of cells under their heads. ``note`` defines the numbers."""

    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """One number that counts."""

    label: str
    cell: Cell
    said: str


@dataclass(frozen=True)
class Section:
    """``picture`` is trusted markup; everything else is text. ``texts``: heads and texts side by side. ``folds``: stands for the table until that is
    opened.
    """

    id: str
    title: str
    said: tuple[str, ...] = ()
    picture: str = ""
    table: PageTable | None = None
    texts: tuple[tuple[str, str], ...] = ()
    lines: tuple[str, ...] = ()
    folds: str = ""


def say(value: object) -> Cell:
    """A text, or nothing."""
    return Cell("" if value is None else str(value))


def number(value: float | None, digits: int = 4) -> Cell:
    return Cell("") if value is None else Cell(f"{value:.{digits}g}", value)


def count(value: int | None) -> Cell:
    return Cell("") if value is None else Cell(f"{value:,}", value)


def percent(value: float, digits: int = 2) -> Cell:
    return Cell(f"{value:.{digits}%}", value)


def size(value: int | None) -> Cell:
    """Bytes."""
    if value is None:
        return Cell("not measured")
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if value >= scale:
            return Cell(f"{value / scale:,.2f} {unit}", value)
    return Cell(f"{value:,} bytes", value)


def seconds(value: float) -> Cell:
    if value < 1:
        return Cell(f"{value * 1e3:,.1f} ms", value)
    return Cell(f"{value:,.2f} s" if value < 100 else f"{value:,.0f} s", value)


def ratio(value: float) -> Cell:
    return Cell(f"{value:.3g} ×", value)


def definition(value: Perplexity | Divergence) -> str:
    """What it was measured on."""
    windows = f"{value.windows} windows of {value.window}, stride {value.window}"
    return f"{value.dataset} ({value.split}), {windows}, {value.tokens:,} predictions, {value.dtype}"
