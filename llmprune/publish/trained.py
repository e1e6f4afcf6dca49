"""The card of a model that was pruned while it was trained: what is known of it, and no more."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

import llmprune
from llmprune.checkpoint.files import write_whole
from llmprune.publish.card import CARD, loading
from llmprune.report.result import Report


def write_trained_card(folder: Path, report: Report) -> None:
    """Write the card of a finished checkpoint into its folder."""
    recipe = report.recipe
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "llmprune", recipe["pattern"], recipe["method"]],
        model_name=f"{report.source.name}-{recipe['pattern']}",
    )
    parts = (title(report), loading(folder, False), making(report), limits(), licence())
    write_whole(folder / CARD, (f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n").encode())


def title(report: Report) -> str:
    share = f"{report.zeros:,} of the {report.weights:,} weights in the pruned matrices are zero ({report.sparsity:.2%})"
    how = "Trained from `{}` and pruned meanwhile" if report.recipe["steps"] else "`{}`, masked before it is trained,"
    made = f"{how.format(report.source.name)} by llmprune {llmprune.__version__}"
    return f"# {report.source.name}, {report.recipe['pattern']}\n\n{made}: {share}, of {report.parameters:,} parameters in all."


def making(report: Report) -> str:
    asked = "\n".join(f"- {name}: {value}" for name, value in report.recipe.items() if value is not None)
    trained = "The data, the loss and the optimizer were the training's own, and are not recorded here. " if report.recipe["steps"] else ""
    said = f"{trained}Every matrix has a row in `llmprune.json`."
    return f"## How it was made\n\n{asked}\n\n{said}"


def limits() -> str:
    lines = (
        "Speed or size as it is: the zeros are stored explicitly, so the files are no smaller, and dense kernels are no faster.",
        "Ordinary fine-tuning: it fills the zeros again unless the masks are held.",
        "Anything: no quality was measured here.",
    )
    return "## What it is not good for\n\n" + "\n".join(f"- {line}" for line in lines)


def licence() -> str:
    return "## Licence\n\nThat of the model it was trained from, and of the data. Find out which they are before you share this model."
