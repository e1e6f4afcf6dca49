"""``llmprune prune`` and ``sweep``, whose options are the fields of a recipe. Interface only, as in cli/main.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llmprune.cli.console import Text, announce, err, out
from llmprune.cli.options import takes_recipe
from llmprune.cli.progress import progress_shown
from llmprune.errors import RequestError, at_home
from llmprune.recipe.flags import HOW, HUB, OUTPUT, WHAT
from llmprune.recipe.reading import read_recipe, recipes_of_sweep
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.values import listed

# what all rows of a sweep share; the other fields are varied by it, or belong to a checkpoint
SHARED_BY_ROWS = (
    *("model", "revision", "allocation", "calibration", "samples", "sequence_length", "eval"),
    *("column", "split", "bos", "eval_samples"),
    *("device", "dtype", "skip", "only", "accept_damage"),
)


@takes_recipe(Recipe.model_fields)
def prune(
    given: dict[str, Any],
    recipe: Annotated[Text, typer.Option(help="TOML file; flags override it", metavar="PATH", rich_help_panel=WHAT)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output, at the end", rich_help_panel=OUTPUT)] = False,
    restart: Annotated[bool, typer.Option("--restart", help="discard what an interrupted run has left", rich_help_panel=OUTPUT)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, print the plan, stop", rich_help_panel=OUTPUT)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON", rich_help_panel=OUTPUT)] = False,
    public: Annotated[bool, typer.Option("--public", help="with --push: a public repository", rich_help_panel=HUB)] = False,
    existing: Annotated[
        bool, typer.Option("--existing", help="with --push: the repository may exist; its model is replaced", rich_help_panel=HUB)
    ] = False,
) -> None:
    """Prune a model into a folder that plain transformers loads."""
    request = read_recipe(Path(recipe) if recipe else None, given)
    if (public or existing) and not request.push:
        raise RequestError("--public or --existing without --push", "add --push me/my-model")
    announce(request.model, as_json)
    from llmprune.publish.hub import check_destination
    from llmprune.report.tables import print_report
    from llmprune.run.rounds import phases_of, prepare_pruning, runner
    from llmprune.stream import heap
    from llmprune.types import Listener

    if request.push:
        check_destination(request.push, public, existing)
    with progress_shown(passing=True) as progress:
        job = prepare_pruning(request, overwrite=overwrite, restart=restart, listen=Listener(progress=progress))
    if not as_json:
        out.print(at_home(job), soft_wrap=True, markup=False)
    if dry_run:
        if as_json:
            print(json.dumps({"recipe": job.recipe.resolved(), "matrices": sum(map(len, job.matrices.values()))}))
        return
    heap.steady()
    with progress_shown(phases_of(job)) as progress:
        report = runner(job)(job, Listener(progress=progress))
    print(json.dumps(report.to_json(), indent=1)) if as_json else print_report(report, out)
    if request.push:
        pushed = report.push(request.push, public=public, existing=existing)
        (err if as_json else out).print(str(pushed), markup=False, soft_wrap=True)


@takes_recipe(SHARED_BY_ROWS)
def sweep(
    given: dict[str, Any],
    methods: Annotated[str, typer.Option(help="methods and qualities, such as wanda,sparsegpt,balanced", metavar="NAME,...")],
    output: Annotated[str, typer.Option(help="folder of the table and the plot", metavar="PATH")],
    sparsities: Annotated[
        str, typer.Option(help="such as 0.4,0.5,60%; of unstructured sparsity and blocks", metavar="FLOAT,...", show_default=False)
    ] = "",
    patterns: Annotated[str, typer.Option(help="such as unstructured,2:4,block:4x4", metavar="N:M|NAME,...")] = "unstructured",
    recipe: Annotated[Text, typer.Option(help="TOML file with what all rows share", metavar="PATH", rich_help_panel=WHAT)] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="all rows in one pass by the dense model's statistics: faster, a little worse", rich_help_panel=HOW),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output, at the end", rich_help_panel=OUTPUT)] = False,
    restart: Annotated[bool, typer.Option("--restart", help="discard what an interrupted sweep has left", rich_help_panel=OUTPUT)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Prune by many methods, patterns and sparsities.

    All have one calibration; the result is a table and a plot of perplexity against sparsity.
    """
    asked = recipes_of_sweep(Path(recipe) if recipe else None, given, listed(methods), listed(sparsities), listed(patterns))
    announce(asked[0].model, as_json)
    from llmprune.report.tables import print_sweep
    from llmprune.run.sweep import phases_of_sweep, prepare_sweep, run_sweep
    from llmprune.stream import heap
    from llmprune.types import Listener

    with progress_shown(passing=True) as progress:
        prepared = prepare_sweep(asked, Path(output).expanduser(), overwrite, restart, quick=quick, listen=Listener(progress=progress))
    if not as_json:
        out.print(at_home(prepared), soft_wrap=True, markup=False)
    heap.steady()
    with progress_shown(phases_of_sweep(prepared)) as progress:
        report = run_sweep(prepared, Listener(progress=progress))
    print(json.dumps(report.to_json(), indent=1)) if as_json else print_sweep(report, out)
