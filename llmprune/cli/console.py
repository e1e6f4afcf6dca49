"""What all commands share: the application, the two consoles, the first line of output, progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import typer
from rich.console import Console

WIDEST = 120  # of a help text, on a terminal that has so many columns

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": WIDEST},
    help="One-shot pruning of Hugging Face language models.\n\nWithout a command, options mean prune: llmprune --model llama --pattern 2:4",
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Text = Optional[str]
Count = Optional[int]


def announce(model: str, as_json: bool) -> None:
    """The first line of output, when the bundled model is used."""
    if model == "llama":
        (err if as_json else out).print(
            "llama: the small bundled Llama (1.8M parameters, a demonstration, not a useful language model); "
            "for another give --model FOLDER, a Hub id such as org/name, or an alias (llmprune methods)",
            soft_wrap=True,
        )


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar per step, with the time left, on standard error."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, Any] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in tasks or (bars.tasks[tasks[step]].finished and done < total):
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield progress
