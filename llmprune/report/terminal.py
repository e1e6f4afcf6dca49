"""Lines and tables on a terminal or in a pipe: no name is lost, no figure is broken, and a pipe has no width."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

FOLDED = 20  # characters of a name on a line, at least, where it is broken over lines
WIDE = 10_000


def say(console: Console, text: object) -> None:
    """One line, as it is."""
    console.print(str(text), markup=False, soft_wrap=True)


def show(console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1, light: bool = False) -> None:
    """A table whose first ``names`` columns are broken over lines where they have to be; the others are figures. Where it does not fit all the same,
    each row is written under its name. light: with a line under the heads alone.
    """
    table = Table(title=escape(title), box=SIMPLE_HEAD if light else HEAVY_HEAD, padding=(0, 1, 0, 0) if light else (0, 1))
    for place, head in enumerate(heads):
        figures = place >= names
        table.add_column(escape(head), justify="right" if figures else "left", no_wrap=figures, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    natural = console.measure(table, options=console.options.update(max_width=WIDE)).maximum
    if not console.is_terminal:
        Console(file=console.file, width=natural, highlight=False).print(table)
        return
    widths = [max(len(cell) for cell in (heads[place], *(row[place] for row in rows))) for place in range(names)]
    if natural - console.width <= sum(max(0, width - FOLDED) for width in widths):
        console.print(table)
    else:
        _records(console, title, heads, rows)


def _records(console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if title:
        say(console, title)
    for row in rows:
        say(console, row[0])
        for head, cell in zip(heads[1:], row[1:], strict=True):
            if cell:
                say(console, f"    {' '.join(head.split())}: {cell}")
