"""Expected failures. A message says what failed, where, and the values; the hint gives the remedy."""

from __future__ import annotations

import os
import re


def at_home(text: object) -> str:
    """A text to print, with the home folder as ~, since its name identifies the user and output is shown to others."""
    home = os.path.expanduser("~")  # noqa: PTH111  it gives an answer where there is no home
    return re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", str(text)) if len(home) > 1 else str(text)


# What a mistake in other people's code raises. Anything else keeps its traceback, which points into that code.
MISTAKES: tuple[type[Exception], ...] = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError),
    *(OSError, RuntimeError, SyntaxError, TypeError, ValueError),
)


def mistake(error: BaseException) -> str:
    """A mistake in a line: its kind, and what it says first."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:120]}" if first else type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of a library's error, or at least its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the machine or a device: then nothing is wrong with the request."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in first_line(error).lower())


def _in_a_line(text: str) -> str:
    """With control characters escaped: names and values in a message may come from untrusted files."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class LlmpruneError(Exception):
    """An expected failure: one line of message, one line of hint, and the exit code of the command. As text it is both."""

    exit_code = 3

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = _in_a_line(message), _in_a_line(hint)
        super().__init__(self.message, self.hint)

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class RequestError(LlmpruneError):
    """The request is refused before any long work; nothing was written."""

    exit_code = 2


class StoppedError(LlmpruneError):
    """A run had to stop in the middle; the same command resumes after the last finished block."""

    exit_code = 3


class PromiseError(LlmpruneError):
    """A checked promise does not hold, such as 2:4 in every group."""

    exit_code = 1


class ConversionError(StoppedError):
    """transformers' key conversion does not lead from the checkpoint to the model and back, block by block; a full load may."""
