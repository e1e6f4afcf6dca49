"""A result in a few lines, as a notebook or a Python prompt shows a Report."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Any

from llmprune.report.cells import count, number, percent, seconds, size

if TYPE_CHECKING:
    from rich.table import Table

    from llmprune.report.result import Report


def named(recipe: dict[str, Any]) -> str:
    """The name of what a resolved recipe does: its method, its quality, or the parts that were asked for."""
    return recipe["method"] or recipe["quality"] or " + ".join(p for p in (recipe["criterion"], recipe["solver"]) if p)


def facts(report: Report) -> Iterator[tuple[str, str]]:
    """(label, text) of the main facts; what was not measured is left out."""
    recipe, smaller = report.recipe, report.smaller
    yield "pattern", f"{recipe['pattern']}, by {named(recipe)}"
    yield "sparsity", f"{percent(report.sparsity, 4).text} of the pruned matrices, asked {percent(report.asked, 4).text}"
    for pair in report.perplexity:
        yield f"perplexity, {pair.pruned.dataset}", f"{number(pair.dense.value).text} dense, {number(pair.pruned.value).text} pruned"
    what = "parameters" if smaller or report.model is not None else "non-zero parameters"
    yield what, f"{count(report.left).text} of {count(report.parameters).text}"
    if report.source.bytes is not None:
        dense = report.source.bytes
        yield "size", f"{size(smaller.bytes if smaller else dense).text} of {size(dense).text}"
    if report.timings.seconds is not None:
        yield "time", seconds(report.timings.seconds).text
    if report.output is not None:
        yield "output", report.output.name


def line(report: Report) -> str:
    return f"<Report of {report.source.name}: {'; '.join(f'{label} {text}' for label, text in facts(report))}>"


def table(report: Report) -> Table:
    """For a terminal that knows rich."""
    from rich.markup import escape as plain
    from rich.table import Table

    made = Table("", plain(report.source.name), title="pruned")
    for label, text in facts(report):
        made.add_row(plain(label), plain(text))
    return made


def html(report: Report) -> str:
    """For a notebook: a table of escaped text."""
    rows = "".join(f"<tr><th style='text-align:left'>{escape(label)}</th><td>{escape(text)}</td></tr>" for label, text in facts(report))
    return f"<table><caption>{escape(report.source.name)}, pruned</caption>{rows}</table>"
