"""``llmprune recipe``: commands for recipe files. Interface only, as in cli/main.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llmprune.cli.console import Text, out
from llmprune.cli.options import takes_recipe
from llmprune.errors import RequestError
from llmprune.recipe.reading import keys

recipe_app = typer.Typer(rich_markup_mode=None, help="Check, start and describe recipe files.")


def check(files: Annotated[list[str], typer.Argument(help="recipe files", metavar="PATH")]) -> None:
    """Read recipes as a run would, and print whether each is fine; exit code 2 if any is not. No model is read."""
    from llmprune.recipe.files import problem

    found = {file: problem(Path(file).expanduser()) for file in files}
    for file, said in found.items():
        out.print(f"{file}: {said or 'fine'}", markup=False, soft_wrap=True)
    bad = [file for file, said in found.items() if said]
    if bad:
        raise RequestError(f"{len(bad)} of {len(found)} recipes would be refused, first {Path(bad[0]).name}", "the lines above say why")


@takes_recipe(keys())
def new(
    given: dict[str, Any],
    file: Annotated[Text, typer.Argument(help="file to write; without it, the recipe is printed", metavar="PATH")] = None,
) -> None:
    """Start a recipe: the options given here, and every other key as a comment that describes it."""
    from llmprune.recipe.files import draft, write_draft

    if file is None:
        print(draft(given), end="")
        return
    write_draft(Path(file).expanduser(), given)
    out.print(f"saved: {file}", markup=False, soft_wrap=True)


def schema() -> None:
    """Print the JSON schema of recipe files, for editors."""
    from llmprune.recipe.files import schema as of_recipes

    print(json.dumps(of_recipes(), indent=1))
