"""What all commands share: the application, the two consoles, the first line of output."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from typer.core import TyperGroup

from llmprune.errors import RequestError
from llmprune.recipe.flags import DATA, MACHINE, OUTPUT

WIDEST = 120  # of a help text, on a terminal that has so many columns


class Commands(TyperGroup):
    """The commands; a model in the place of one gets a hint."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0]
        if self.get_command(ctx, word) is None and (os.sep in word or Path(word).exists()):
            raise RequestError(f"no command {word!r}", f"of a model: llmprune --model {word}; the commands are in llmprune --help")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": WIDEST, "help_option_names": ["-h", "--help"]},
    help="One-shot pruning of Hugging Face language models.\n\nWithout a command, options mean prune: llmprune --model llama --pattern 2:4",
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Text = Optional[str]
Count = Optional[int]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda ...", metavar="NAME", rich_help_panel=MACHINE)]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON", rich_help_panel=OUTPUT)]
Bos = Annotated[
    Optional[bool],
    typer.Option("--bos/--no-bos", help="whether every window begins with BOS [default: as the model was trained]", rich_help_panel=DATA),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        import llmprune

        print(llmprune.__version__)
        raise typer.Exit


@app.callback()
def of_all_commands(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)] = False,
) -> None:
    """Options of the program itself; its help is above."""


def announce(model: str, as_json: bool) -> None:
    """The first line of output, when the bundled model is used."""
    if model == "llama":
        (err if as_json else out).print(
            "llama: the small bundled Llama (1.8M parameters, a demonstration, not a useful language model); "
            "for another give --model FOLDER, a Hub id such as org/name, or an alias (llmprune methods)",
            soft_wrap=True,
        )
