"""Commands about training. Interface only, as in cli/main.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from llmprune.cli.console import AsJson, Count, Text, announce, out
from llmprune.recipe.flags import DATA, OUTPUT


def init_mask(
    model: Annotated[str, typer.Argument(help="config.json, or a folder without weights, to be initialised; or a model", metavar="PATH|ID")],
    sparsity: Annotated[Optional[float], typer.Option(help="share of the weights that is masked", metavar="FLOAT")] = None,
    pattern: Annotated[str, typer.Option(help="unstructured, N:M or block:RxC", metavar="NAME")] = "unstructured",
    criterion: Annotated[str, typer.Option(help="magnitude, random, snip, grasp or synflow", metavar="NAME")] = "snip",
    allocation: Annotated[
        Text, typer.Option(help="erk (by shape), uniform, or threshold (one for all scores) [default: erk, of magnitude uniform]", metavar="NAME")
    ] = None,
    data: Annotated[Text, typer.Option(help="text for the loss of snip and grasp", metavar="PATH|ID", rich_help_panel=DATA)] = None,
    samples: Annotated[Count, typer.Option(help="windows of that text [default: 32]", metavar="INT", rich_help_panel=DATA)] = None,
    sequence_length: Annotated[Count, typer.Option(help="tokens of each [default: 256]", metavar="INT", rich_help_panel=DATA)] = None,
    seed: Annotated[int, typer.Option(help="of the initialisation and of everything that is drawn", metavar="INT")] = 0,
    skip: Annotated[Text, typer.Option(help="regular expression: matrices that are not masked", metavar="REGEX")] = None,
    only: Annotated[Text, typer.Option(help="regular expression: the only matrices that are masked", metavar="REGEX")] = None,
    output: Annotated[Text, typer.Option(help="result folder [default: ./MODEL-initial-PATTERN]", metavar="PATH", rich_help_panel=OUTPUT)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output at the end", rich_help_panel=OUTPUT)] = False,
    as_json: AsJson = False,
) -> None:
    """Mask a model before it is trained, and save it with its masks."""
    announce(model, as_json)
    from transformers.utils.logging import disable_progress_bar

    from llmprune.run.initial import init_mask as initial

    disable_progress_bar()  # of one file

    named = Path(model).expanduser()
    name = (named.parent if named.suffix == ".json" else named).resolve().name
    folder = output or f"{name}-initial-{pattern.replace(':', 'of').replace('/', '-')}"
    report = initial(
        model,
        sparsity,
        pattern,
        criterion=criterion,
        allocation=allocation,
        data=data,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        skip=skip,
        only=only,
        output=folder,
        overwrite=overwrite,
    )
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        made = f", weights initialised by seed {seed}" if report.recipe["initialised"] else ""
        out.print(f"masks: {report.zeros:,} of {report.weights:,} weights ({report.sparsity:.4%}) by {criterion}{made}", markup=False, soft_wrap=True)
        out.print(f"saved: {folder}", markup=False, soft_wrap=True)
