"""The card of a model that was pruned in memory: where it came from is only known by name."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

import llmprune
from llmprune.checkpoint.files import write_whole
from llmprune.publish.card import CARD, figures, limits, loading, making, method_of, result_of, what_is_left
from llmprune.recipe.recipe import Recipe
from llmprune.report.result import Report


def write_live_card(folder: Path, report: Report, recipe: Recipe) -> None:
    """Write the card of a finished checkpoint into its folder."""
    towers = report.source.towers
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if towers else "text-generation",
        tags=["pruned", "llmprune", recipe.pattern, method_of(recipe)],
        model_name=recipe.default_output,
        eval_results=[result_of(pair) for pair in report.perplexity] or None,
    )
    title = f"# {recipe.default_output}\n\nA model called `{report.source.name}`, pruned in memory by llmprune {llmprune.__version__}"
    parts = (
        f"{title}: {what_is_left(report, recipe)}",
        loading(folder, towers is not None),
        figures(report),
        making(report, recipe),
        limits(recipe),
        "## Licence\n\nThat of the model that was pruned. Find out which it is before you share this one.",
    )
    write_whole(folder / CARD, (f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n").encode())
