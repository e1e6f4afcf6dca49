"""The main facts of a result as a notebook, a terminal or a Python prompt shows them: pairs of label and text."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from rich.table import Table

Facts: TypeAlias = Iterable[tuple[str, str]]  # (label, text)


def named(recipe: dict[str, Any]) -> str:
    """The name of what a resolved recipe does: its method, its quality, or the parts that were asked for."""
    return recipe["method"] or recipe["quality"] or " + ".join(p for p in (recipe["criterion"], recipe["solver"]) if p)


def line(name: str, facts: Facts) -> str:
    return f"<Report of {name}: {'; '.join(f'{label} {text}' for label, text in facts)}>"


def table(name: str, facts: Facts) -> Table:
    """For a terminal that knows rich."""
    from rich.markup import escape as plain
    from rich.table import Table

    made = Table("", plain(name), title="pruned")
    for label, text in facts:
        made.add_row(plain(label), plain(text))
    return made


def html(name: str, facts: Facts) -> str:
    """For a notebook: a table of escaped text."""
    rows = "".join(f"<tr><th style='text-align:left'>{escape(label)}</th><td>{escape(text)}</td></tr>" for label, text in facts)
    return f"<table><caption>{escape(name)}, pruned</caption>{rows}</table>"
