"""The card of a recovered model: that of the pruned one, with a section about the training, and its results in the metadata."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from llmprune.checkpoint.files import write_whole
from llmprune.publish.card import CARD, PLACE, result_of_one
from llmprune.report.recovered import Measured, Recovered
from llmprune.report.result import Report

BEFORE = "## What it is not good for"
SECTION = re.compile(r"^## Recovery\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
TAG = "recovered"


def write_recovered_card(folder: Path, report: Report, pruned: Path, name: str = PLACE) -> None:
    """Write the card into ``folder``. pruned: the folder of the pruned model; where its card is gone, the section stands alone. name: by which the
    card loads the pruned model, if it was published.
    """
    path = pruned / CARD
    card = ModelCard(path.read_text(encoding="utf-8") if path.is_file() else f"---\n{{}}\n---\n\n# {report.source.name}, pruned\n\n{BEFORE}\n")
    data: Any = card.data
    data.tags = [*(tag for tag in data.tags or () if tag != TAG), TAG]
    if not report.perplexity:  # else the card's own results are those after the training
        data.eval_results = [result_of_one(one.after, one.dense) for one in report.recovered[-1].measured if not one.decides] or None
    data.model_name = data.model_name or f"{report.source.name}-pruned"
    text = card.text.replace(f'from_pretrained("{name}"', f'from_pretrained("{PLACE}"')  # of one that was published
    card.text = with_section(text, report)
    write_whole(folder / CARD, str(card).encode())


def with_section(text: str, report: Report) -> str:
    """The card's text with one section about all recoveries, before its limits."""
    text = SECTION.sub("", text)
    said = "\n\n".join(section(one) for one in report.recovered)
    made = (
        f"## Recovery\n\nThe figures above are those of the pruning. Afterwards the kept weights were trained; every zero has stayed.\n\n{said}\n\n"
    )
    begin = text.find(BEFORE)
    return text + "\n\n" + made if begin < 0 else text[:begin] + made + text[begin:]


def section(found: Recovered) -> str:
    heads = ["| perplexity on | dense | before | after | definition |", "|---|---:|---:|---:|---|"]
    return f"{found.said[:1].upper()}{found.said[1:]}.\n\n" + "\n".join([*heads, *map(row, found.measured)])


def row(one: Measured) -> str:
    name = f"{one.after.dataset}, {one.after.split}".replace("|", "\\|") + (" (chose the step)" if one.decides else "")
    dense = f"{one.dense.value:.4g}" if one.dense else ""
    return f"| {name} | {dense} | {one.before.value:.4g} | {one.after.value:.4g} | {one.after.definition} |"
