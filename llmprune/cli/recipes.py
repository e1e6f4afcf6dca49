"""``llmprune recipe``: commands for recipe files. Words only, as in cli/main.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from llmprune.cli.console import Count, Text, app, out
from llmprune.errors import RequestError

recipe_app = typer.Typer(rich_markup_mode=None, help="Recipe files: check them, begin one, describe them to an editor.")
app.add_typer(recipe_app, name="recipe")


@recipe_app.command()
def check(files: Annotated[list[str], typer.Argument(help="recipe files", metavar="FILE...")]) -> None:
    """Read recipes as a run would, and say of each whether it is fine; exit code 2 when one is not. No model is looked at."""
    from llmprune.recipe.files import problem

    found = {file: problem(Path(file).expanduser()) for file in files}
    for file, said in found.items():
        out.print(f"{file}: {said or 'fine'}", markup=False, soft_wrap=True)
    bad = [file for file, said in found.items() if said]
    if bad:
        raise RequestError(f"{len(bad)} of {len(found)} recipes would be refused, first {Path(bad[0]).name}", "the lines above say why")


@recipe_app.command()
def new(
    file: Annotated[Optional[str], typer.Argument(help="where it goes; printed without", metavar="[FILE]")] = None,
    model: Annotated[Text, typer.Option(help="folder, Hub id or alias; llama is the small bundled one")] = None,
    sparsity: Annotated[Text, typer.Option(help="share of the weights that goes, such as 0.5 or 50%")] = None,
    pattern: Annotated[Text, typer.Option(help="unstructured, N:M such as 2:4, block:4x4, channels, layers, experts ...")] = None,
    quality: Annotated[Text, typer.Option(help="fast, balanced or max")] = None,
    method: Annotated[Text, typer.Option(help="a paper's own recipe; see llmprune methods")] = None,
    criterion: Annotated[Text, typer.Option(help="what scores the weights")] = None,
    solver: Annotated[Text, typer.Option(help="what chooses the mask and repairs the rest")] = None,
    allocation: Annotated[Text, typer.Option(help="how the ratio is shared out over the matrices")] = None,
    calibration: Annotated[Text, typer.Option(help="c4, wikitext2, a Hub data set, or a file")] = None,
    samples: Annotated[Count, typer.Option(help="calibration windows")] = None,
) -> None:
    """Begin a recipe: what is given here, and every other key as a comment that says what it does."""
    given = {key: value for key, value in locals().items() if key != "file" and value is not None}
    from llmprune.recipe.files import draft, write_draft

    if file is None:
        print(draft(given), end="")
        return
    write_draft(Path(file).expanduser(), given)
    out.print(f"saved: {file}", markup=False, soft_wrap=True)


@recipe_app.command()
def schema() -> None:
    """Print the JSON schema of recipe files, for editors."""
    from llmprune.recipe.files import schema as of_recipes

    print(json.dumps(of_recipes(), indent=1))
