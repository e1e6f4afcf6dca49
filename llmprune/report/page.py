"""report.html, and the page of a comparison: one self-contained file, made from the content of llmprune.json (and of a
benchmark) alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import llmprune
from llmprune.benchmark.result import Bench
from llmprune.report import compare
from llmprune.report.compare import Result
from llmprune.report.result import Report
from llmprune.report.sections import sections, tiles


def page(report: Report, bench: Bench | None = None) -> str:
    """The whole page. Equal runs give equal bytes except for the section ``timings``, as in llmprune.json except for the field of that name."""
    recipe = report.recipe
    how = " · ".join(str(v) for v in (recipe["pattern"], recipe["method"] or recipe["quality"], f"{report.asked:.4g} sparsity") if v)
    return render(
        title=f"{report.source.name}, pruned",
        subtitle=how,
        tiles=list(tiles(report)),
        sections=list(sections(report, bench)),
        version=report.environment.versions.get("llmprune", ""),
    )


def comparison(found: Sequence[Result]) -> str:
    """The page of ``llmprune compare --html``."""
    title = "Comparison: " + ", ".join(dict.fromkeys(result.source[0] for result in found))
    return render(title=title, subtitle=f"{len(found)} results", tiles=[], sections=list(compare.sections(found)), version=llmprune.__version__)


def render(**content: Any) -> str:
    """The template escapes every text; only pictures, which are made here, are inserted as they are."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["picture"] = Markup
    return environment.get_template("report.html.j2").render(**content)
