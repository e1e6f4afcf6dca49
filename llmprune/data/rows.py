"""The rows of a source, streamed by ``datasets``: nothing is copied into a cache."""

from __future__ import annotations

import glob
import random
from collections.abc import Iterable, Iterator
from typing import Any

from llmprune.data.broken import DAMAGED, fault_in
from llmprune.data.sources import TextSource, check_hub
from llmprune.errors import RequestError, first_line

BUFFER = 10_000  # rows of a stream among which the next one is drawn
UNREADABLE: tuple[type[Exception], ...] = (ValueError, *DAMAGED)  # what ``datasets`` raises while it reads; a UnicodeDecodeError is a ValueError
LINED = ("text", "json", "csv")  # formats of lines
LINES: dict[str, Any] = {"encoding": "utf-8-sig", "keep_linebreaks": True, "sample_by": "line"}
WHOLE: dict[str, Any] = {"encoding": "utf-8-sig", "sample_by": "document"}


def rows(source: TextSource, draw: int | None = None, buffer: int = BUFFER, lines: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of a source as they are. draw: a seed, by which they are shuffled, of a stream in a buffer. lines: a row a line of plain text, which
    is else one row a file.

    Raises RequestError when it cannot be opened or read, with the broken line where it is known.
    """
    try:
        yield from _shuffled(_opened(source, lines), draw, buffer)
    except UNREADABLE as error:
        raise RequestError(f"{source.dataset}: {_fault(source, error)}", "repair it, or leave it out") from None


def _fault(source: TextSource, error: Exception) -> str:
    for file in source.files if source.builder in LINED else ():
        found = fault_in(file, source.builder)
        if found:
            return f"{file.name}, {found}" if len(source.files) > 1 else found
    return f"cannot be read ({first_line(error)[:160]})"


def _shuffled(opened: Any, draw: int | None, buffer: int) -> Any:
    if draw is None:
        return opened
    if isinstance(opened, tuple):
        return random.Random(draw).sample(opened, len(opened))
    from datasets import IterableDataset

    return opened.shuffle(seed=draw, buffer_size=buffer) if isinstance(opened, IterableDataset) else opened.shuffle(seed=draw)


def _opened(source: TextSource, lines: bool) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    if source.given is not None:
        return source.given
    if source.files:
        options = {} if not source.plain else LINES if lines else WHOLE
        files = [glob.escape(str(file)) for file in source.files]
        found: Iterable[dict[str, Any]] = load_dataset(source.builder, split="train", streaming=True, data_files={"train": files}, **options)
        return found
    return _from_hub(source)


def _from_hub(source: TextSource) -> Any:
    from datasets import load_dataset

    check_hub(source.builder)
    part = {"data_files": {source.split: source.part}} if source.part else {}
    try:
        return load_dataset(source.builder, source.config, split=source.split, streaming=True, revision=source.revision, **part)
    except (OSError, ValueError) as error:  # also a data set that is not found, and a network that is not there
        hint = "check the name, the split (--split) and your network"
        raise RequestError(f"data set {source.builder!r}: {first_line(error)[:160]}", hint) from None
