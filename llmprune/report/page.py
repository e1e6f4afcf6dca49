"""report.html: one file that needs nothing else, made from the content of llmprune.json (and of a benchmark) alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from llmprune.report.sections import sections, tiles


def page(report: Mapping[str, Any], bench: Mapping[str, Any] | None = None) -> str:
    """The whole page. Equal runs give equal bytes but for the section ``timings``, as llmprune.json does but for the field of that name."""
    content, measured = dict(report), dict(bench) if bench else None
    recipe = content["recipe"]
    how = " · ".join(str(v) for v in (recipe["pattern"], recipe["method"] or recipe["quality"], f"{content['sparsity']['asked']:.4g} sparsity") if v)
    return render(
        title=f"{content['source']['name']}, pruned",
        subtitle=how,
        tiles=list(tiles(content)),
        sections=list(sections(content, measured)),
        version=content["environment"].get("llmprune", ""),
    )


def render(**content: Any) -> str:
    """The template escapes every text; only pictures, which are made here, go in as they are."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["picture"] = Markup
    return environment.get_template("report.html.j2").render(**content)
