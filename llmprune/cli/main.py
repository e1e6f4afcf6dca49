"""The command line: words only. Nothing heavy is imported until a command has its arguments."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from llmprune.cli import commands, recipes  # noqa: F401  they are added to the application
from llmprune.cli.console import Count, Text, announce, app, err, out, progress_bars
from llmprune.errors import LlmpruneError, RequestError, at_home, first_line, out_of_memory


@app.command()
def prune(
    model: Annotated[Text, typer.Option(help="folder, Hub id or alias; llama is the small bundled one")] = None,
    sparsity: Annotated[Text, typer.Option(help="share of the weights that goes, such as 0.5 or 50%")] = None,
    target_params: Annotated[Text, typer.Option(help="instead: non-zero parameters that may remain in the whole model, such as 900M")] = None,
    target_size: Annotated[Text, typer.Option(help="instead, of structured patterns: bytes on disk that may remain, such as 1.2GB")] = None,
    target_latency_ratio: Annotated[
        Text, typer.Option(help="instead, of structured patterns: time of a prefill to the dense model's on this machine, such as 0.7")
    ] = None,
    max_ppl_increase: Annotated[Text, typer.Option(help="instead: the sparsest model within this increase of the perplexity, such as 5%")] = None,
    pattern: Annotated[
        Text,
        typer.Option(
            help="unstructured, N:M such as 2:4, block:RxC such as block:4x4, row, column, or a smaller model: "
            "channels, heads, kv-groups, kernel, layers, experts, hidden, structured (channels and KV groups)"
        ),
    ] = None,
    round_to: Annotated[Count, typer.Option(help="structured: sizes are multiples of this; 8 for channels and kernel by default")] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="structured: the same sizes in every layer")] = False,
    rotate: Annotated[bool, typer.Option("--rotate", help="hidden: turn the residual stream to its principal axes first, as SliceGPT does")] = False,
    pad: Annotated[bool, typer.Option("--pad", help="structured: zeros up to the widest layer, so that it loads without code of its own")] = False,
    quality: Annotated[Text, typer.Option(help="one of our own recipes: fast, balanced (the default) or max")] = None,
    method: Annotated[Text, typer.Option(help="a paper's own recipe, unimproved, for comparison; see llmprune methods")] = None,
    criterion: Annotated[Text, typer.Option(help="what scores the weights; a function of your own is my.py:score")] = None,
    solver: Annotated[Text, typer.Option(help="what chooses the mask and repairs the rest")] = None,
    target: Annotated[Text, typer.Option(help="what a repair aims at: symmetric (the matrix's own outputs) or asymmetric (the dense path's)")] = None,
    polish: Annotated[Text, typer.Option(help="kd: distillation of the whole pruned model at the end, which has to fit in memory; none")] = None,
    polish_steps: Annotated[Count, typer.Option(help="steps of the polish")] = None,
    permute: Annotated[bool, typer.Option("--permute", help="N:M: reorder inner channels so that the groups hold more")] = False,
    group: Annotated[Text, typer.Option(help="where unstructured weights compete: row or matrix")] = None,
    allocation: Annotated[Text, typer.Option(help="how the ratio is shared out over the matrices; see llmprune methods")] = None,
    calibration: Annotated[
        Text, typer.Option(help="c4, wikitext2, a Hub data set (org/name[:config][@revision]), or a .txt, .jsonl, .parquet file")
    ] = None,
    samples: Annotated[Count, typer.Option(help="calibration windows")] = None,
    sequence_length: Annotated[Count, typer.Option(help="tokens of a window")] = None,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="draw the windows at random instead of taking the first")] = False,
    recipe: Annotated[Text, typer.Option(help="TOML file; flags go on top of it")] = None,
    output: Annotated[Text, typer.Option(help="folder of the result")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output, at the end")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="discard what an interrupted run has left")] = False,
    seed: Annotated[Count, typer.Option(help="of everything drawn at random")] = None,
    device: Annotated[Text, typer.Option(help="auto, cpu, cuda ...")] = None,
    dtype: Annotated[Text, typer.Option(help="compute dtype: auto, float32, bfloat16, float16")] = None,
    skip: Annotated[Text, typer.Option(help="regular expression: matrices that are left alone")] = None,
    only: Annotated[Text, typer.Option(help="regular expression: the only matrices that are pruned")] = None,
    eval: Annotated[Optional[list[str]], typer.Option(help="data to measure the perplexity on; may be repeated")] = None,
    accept_damage: Annotated[bool, typer.Option("--accept-damage", help="go on when a block's output is destroyed")] = False,
    revision: Annotated[Text, typer.Option(help="branch, tag or commit of a Hub model")] = None,
    push: Annotated[Text, typer.Option(help="Hub repository that the result goes to at the end, private, such as me/my-model")] = None,
    public: Annotated[bool, typer.Option("--public", help="with --push: a public repository")] = False,
    existing: Annotated[bool, typer.Option("--existing", help="with --push: the repository may be there, and its model is replaced")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, print the plan, stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Prune a model into a folder that plain transformers loads."""
    from llmprune.recipe.reading import read_recipe
    from llmprune.recipe.recipe import Recipe

    given = {k: v for k, v in locals().items() if k in Recipe.model_fields and not (v is None or v is False or v == [])}
    request = read_recipe(Path(recipe) if recipe else None, given)
    if (public or existing) and not request.push:
        raise RequestError("--public or --existing without --push", "add --push me/my-model")
    announce(request.model, as_json)
    from llmprune.publish.hub import check_destination
    from llmprune.report.tables import print_report
    from llmprune.run.job import run
    from llmprune.run.prepare import prepare
    from llmprune.stream import heap

    if request.push:
        check_destination(request.push, public, existing)
    job = prepare(request, overwrite=overwrite, restart=restart)
    if not as_json:
        out.print(at_home(job), soft_wrap=True, markup=False)
    if dry_run:
        if as_json:
            print(json.dumps({"recipe": job.recipe.resolved(), "matrices": sum(map(len, job.matrices.values()))}))
        return
    heap.steady()
    with progress_bars() as progress:
        report = run(job, progress)
    print(json.dumps(report.to_json(), indent=1)) if as_json else print_report(report, out)
    if request.push:
        pushed = report.push(request.push, public=public, existing=existing)
        (err if as_json else out).print(str(pushed), markup=False, soft_wrap=True)


@app.command()
def sweep(
    methods: Annotated[str, typer.Option(help="methods and qualities, such as wanda,sparsegpt,balanced")],
    output: Annotated[str, typer.Option(help="folder of the table and the plot")],
    model: Annotated[Text, typer.Option(help="folder, Hub id or alias; llama is the small bundled one")] = None,
    sparsities: Annotated[str, typer.Option(help="such as 0.4,0.5,60%; of unstructured sparsity and blocks")] = "",
    patterns: Annotated[str, typer.Option(help="such as unstructured,2:4,block:4x4")] = "unstructured",
    allocation: Annotated[Text, typer.Option(help="how the ratios are shared out over the matrices; else each method's own choice")] = None,
    calibration: Annotated[
        Text, typer.Option(help="c4, wikitext2, a Hub data set (org/name[:config][@revision]), or a .txt, .jsonl, .parquet file")
    ] = None,
    samples: Annotated[Count, typer.Option(help="calibration windows")] = None,
    sequence_length: Annotated[Count, typer.Option(help="tokens of a window")] = None,
    eval: Annotated[Optional[list[str]], typer.Option(help="data to measure the perplexity on; may be repeated")] = None,
    recipe: Annotated[Text, typer.Option(help="TOML file with what all rows have in common")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="all rows in one pass by the dense model's statistics: faster, a little worse")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output, at the end")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="discard what an interrupted sweep has left")] = False,
    device: Annotated[Text, typer.Option(help="auto, cpu, cuda ...")] = None,
    dtype: Annotated[Text, typer.Option(help="compute dtype: auto, float32, bfloat16, float16")] = None,
    skip: Annotated[Text, typer.Option(help="regular expression: matrices that are left alone")] = None,
    only: Annotated[Text, typer.Option(help="regular expression: the only matrices that are pruned")] = None,
    accept_damage: Annotated[bool, typer.Option("--accept-damage", help="go on when a block's output is destroyed")] = False,
    revision: Annotated[Text, typer.Option(help="branch, tag or commit of a Hub model")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """Prune by many methods, patterns and sparsities under one calibration: a table and a plot of perplexity against sparsity."""
    from llmprune.recipe.reading import recipes_of_sweep
    from llmprune.recipe.recipe import Recipe
    from llmprune.recipe.values import listed

    base = {k: v for k, v in locals().items() if k in Recipe.model_fields and k != "output" and not (v is None or v is False or v == [])}
    asked = recipes_of_sweep(Path(recipe) if recipe else None, base, listed(methods), listed(sparsities), listed(patterns))
    announce(asked[0].model, as_json)
    from llmprune.report.tables import print_sweep
    from llmprune.run.sweep import prepare_sweep, run_sweep
    from llmprune.stream import heap

    prepared = prepare_sweep(asked, Path(output).expanduser(), overwrite, restart, quick=quick)
    if not as_json:
        out.print(at_home(prepared), soft_wrap=True, markup=False)
    heap.steady()
    with progress_bars() as progress:
        report = run_sweep(prepared, progress)
    print(json.dumps(report.to_json(), indent=1)) if as_json else print_sweep(report, out)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 0, 1, 2, 3, 130 or 143 and never shows a traceback for what can be expected."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large tensors; torch reads it when it is loaded
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0].startswith("-") and words[0] not in ("--help", "--version"):
        words = ["prune", *words]
    if words == ["--version"]:
        import llmprune

        print(llmprune.__version__)
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would bury the one line that counts
    try:
        code = app(words, prog_name="llmprune", standalone_mode=False) or 0
    except LlmpruneError as error:
        code = _say(error.message, error.hint, error.exit_code)
    except typer.Exit as error:
        code = error.exit_code
    except _Interrupted as error:
        code = _say(f"interrupted by {error.signal.name}", "the same command goes on where it stopped", 128 + error.signal)
    except typer.TyperException as error:
        code = _say(error.format_message(), "see llmprune COMMAND --help", 2)
    except (MemoryError, OSError, RuntimeError) as error:
        code = _broken(error)
    sys.exit(code)


class _Interrupted(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


def _interrupt(number: int, frame: Any) -> None:
    raise _Interrupted(number)


def _say(message: str, hint: str, code: int) -> int:
    err.print(f"error: {at_home(message)}", markup=False, soft_wrap=True)
    if hint:
        err.print(f"hint: {at_home(hint)}", markup=False, soft_wrap=True)
    return code


def _broken(error: BaseException) -> int:
    """The machine ran short of something: one line, and the run can go on. Anything else is a fault of ours and keeps its traceback."""
    text = first_line(error)
    if isinstance(error, OSError):
        return _say(f"{text[:200]}", "once that is mended, the same command goes on from the last finished block", 3)
    if out_of_memory(error):
        return _say(f"out of memory ({text[:120]})", "use fewer --samples or a shorter --sequence-length; nothing is lost", 3)
    raise error
