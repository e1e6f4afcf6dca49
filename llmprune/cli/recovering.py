"""``llmprune recover``. Interface only, as in cli/main.py."""

from __future__ import annotations

import json
from typing import Annotated, Any, Optional

import typer

from llmprune.checkpoint.files import output_folder
from llmprune.cli.console import Bos, Count, Text, out
from llmprune.cli.progress import progress_shown
from llmprune.errors import at_home
from llmprune.recipe.flags import DATA, HOW, MACHINE, OUTPUT

LOSS = "[default: kd where that model is at hand and fits, else ce]"
Number = Optional[float]


def _said(text: str, metavar: str, panel: str | None = None) -> Any:
    return typer.Option(help=text, metavar=metavar, rich_help_panel=panel)


def _switch(flag: str, text: str) -> Any:
    return typer.Option(flag, help=text, rich_help_panel=OUTPUT)


def recover(
    folder: Annotated[str, typer.Argument(help="output of a finished run", metavar="DIR")],
    data: Annotated[str, _said("texts or dialogues to train on: a file, a data set or a mixture", "PATH|ID")],
    output: Annotated[Text, _said("folder of the result [default: ./<DIR>-recovered]", "PATH")] = None,
    steps: Annotated[int, _said("optimizer steps, at most", "INT")] = 300,
    parameters: Annotated[str, _said("all, norms (with biases), or lora (adapters that keep the zeros)", "NAME")] = "all",
    loss: Annotated[Text, _said("kd (dense model's predictions), ce (next token), blocks (dense model's hidden states) " + LOSS, "NAME")] = None,
    dense: Annotated[Text, _said("the dense model [default: the source, where it can be found]", "PATH|ID", DATA)] = None,
    held_out: Annotated[Text, _said("text that chooses the best step [default: a slice of the data]", "PATH|ID", DATA)] = None,
    eval: Annotated[Optional[list[str]], _said("text to measure before and after; may be repeated", "PATH|ID", DATA)] = None,
    column: Annotated[Text, _said("the data's column of texts or messages", "NAME", DATA)] = None,
    split: Annotated[Text, _said("split of the data set [default: train]", "NAME", DATA)] = None,
    bos: Bos = None,
    sequence_length: Annotated[Count, _said("tokens of a window [default: as it was calibrated]", "INT", DATA)] = None,
    batch: Annotated[int, _said("windows of a step", "INT", HOW)] = 8,
    learning_rate: Annotated[Number, _said("at its peak [default: by the parameters and the model's width]", "FLOAT", HOW)] = None,
    temperature: Annotated[float, _said("of loss kd", "FLOAT", HOW)] = 2.0,
    mix: Annotated[float, _said("share of losses kd and blocks, the rest is ce", "FLOAT", HOW)] = 1.0,
    rank: Annotated[int, _said("of lora", "INT", HOW)] = 16,
    alpha: Annotated[float, _said("of lora, whose product is scaled by alpha / rank", "FLOAT", HOW)] = 32.0,
    every: Annotated[Count, _said("steps between evaluations [default: a twelfth of all]", "INT", HOW)] = None,
    patience: Annotated[int, _said("evaluations without improvement after which it stops", "INT", HOW)] = 4,
    seed: Annotated[int, _said("of the order of the windows, and of adapters", "INT", HOW)] = 0,
    device: Annotated[str, _said("auto, cpu, cuda ...", "NAME", MACHINE)] = "auto",
    overwrite: Annotated[bool, _switch("--overwrite", "replace an existing output, at the end")] = False,
    restart: Annotated[bool, _switch("--restart", "discard what an interrupted run has left")] = False,
    dry_run: Annotated[bool, _switch("--dry-run", "check everything, print the plan, stop")] = False,
    as_json: Annotated[bool, _switch("--json", "print the report as JSON")] = False,
) -> None:
    """Train the kept weights of a pruned model.

    Every zero stays. A held-out text chooses the best step, and the start is a candidate.
    """
    given = dict(locals())
    own = {name: given.pop(name) for name in ("overwrite", "restart", "dry_run", "as_json")}
    run(given | {"eval": tuple(eval or ())}, **own)


def run(given: dict[str, Any], overwrite: bool, restart: bool, dry_run: bool, as_json: bool) -> None:
    """given: by the names that a request has for them."""
    output_folder(given["folder"])
    from llmprune.report.tables import print_recovery
    from llmprune.run.recovered import phases, run_recovery
    from llmprune.run.recovery import prepare_recovery
    from llmprune.training.request import Request
    from llmprune.types import Listener

    job = prepare_recovery(Request(**given), overwrite, restart)
    if not as_json:
        out.print(at_home(job), soft_wrap=True, markup=False)
    if dry_run:
        if as_json:
            print(json.dumps(job.resolved))
        return
    with progress_shown(phases(job)) as progress:
        report = run_recovery(job, Listener(progress=progress))
    print(json.dumps(report.to_json(), indent=1)) if as_json else print_recovery(report, out)
