"""The command line: interface only. Nothing heavy is imported until a command has its arguments."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import typer

from llmprune.cli.commands import bench, compare, eval, inspect, methods, push, report
from llmprune.cli.console import app, err
from llmprune.cli.options import Panels
from llmprune.cli.pruning import prune, sweep
from llmprune.cli.recipes import check, new, recipe_app, schema
from llmprune.cli.recovering import recover
from llmprune.cli.training import init_mask
from llmprune.errors import LlmpruneError, at_home, first_line, out_of_memory

# as --help lists them
COMMANDS: dict[str, Callable[..., None]] = {
    one.__name__: one for one in (prune, recover, eval, inspect, bench, report, compare, sweep, push, methods)
}
COMMANDS["init-mask"] = init_mask
for name, command in COMMANDS.items():
    app.command(name, cls=Panels)(command)
for command in (check, new, schema):
    recipe_app.command(cls=Panels)(command)
app.add_typer(recipe_app, name="recipe")
OWN = ("-h", "--help", "--version", "--install-completion", "--show-completion")  # options of the program, not of prune


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 0, 1, 2, 3, 130 or 143 and never shows a traceback for an expected failure."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large tensors; torch reads it when it is loaded
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        words = ["--help"]
    elif words[0].startswith("-") and words[0].partition("=")[0] not in OWN:
        words = ["prune", *words]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would hide the one line that matters
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # what it says of a broken file is in that line
    try:
        code = app(words, prog_name="llmprune", standalone_mode=False) or 0
    except LlmpruneError as error:
        code = _say(error.message, error.hint, error.exit_code)
    except typer.Exit as error:
        code = error.exit_code
    except _Interrupted as error:
        code = _say(f"interrupted by {error.signal.name}", "the same command resumes where it stopped", 128 + error.signal)
    except typer.TyperException as error:
        command = words[0] if words[0] in COMMANDS else "COMMAND"
        code = _say(error.format_message(), f"see llmprune {command} --help", 2)
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
    """The machine ran short of something: one line, and the run can be resumed. Anything else is a bug and keeps its traceback."""
    text = first_line(error)
    if isinstance(error, OSError):
        return _say(f"{text[:200]}", "once that is fixed, the same command resumes after the last finished block", 3)
    if out_of_memory(error):
        return _say(f"out of memory ({text[:120]})", "use fewer --samples or a shorter --sequence-length; nothing is lost", 3)
    raise error
