"""The text of a source, whole or in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmprune.data.documents import Form, texts
from llmprune.data.sources import TextSource
from llmprune.errors import RequestError


@dataclass(frozen=True)
class Text:
    """A text and its origin. complete: False when a large source was read in part. skipped: rows without text."""

    text: str
    dataset: str
    split: str
    complete: bool = True
    skipped: int = 0


def read_text(source: TextSource, form: Form, characters: int | None = None, draw: int | None = None) -> Text:
    """The text of a source. Files of plain text are read whole; of row sources, rows are joined until there are ``characters`` (None: all of them).
    draw: a seed, by which the rows of a stream are shuffled in a buffer.

    Raises RequestError when it cannot be read, or is empty.
    """
    most = None if source.plain or source.documents else characters
    parts: list[str] = []
    size, skipped, complete = 0, 0, True
    for number, text in enumerate(texts(source, form, None if source.files else draw), 1):
        if text is None:
            skipped += 1
        else:
            parts.append(text)
            size += len(text)
        if (most is not None and size >= most) or number == source.documents:
            complete = source.documents is not None
            break
    text = without_nul(source.joined_by.join(parts), source.dataset)
    if not text.strip():
        raise RequestError(f"{source.dataset}: holds no text{f' in {skipped} rows' if skipped else ''}", "give a text, or name its column: --column")
    return Text(text, source.dataset, source.split, complete, skipped)


def pieces(source: TextSource, form: Form, characters: int) -> Iterator[Text]:
    """The text of a file in pieces of at least so many characters, cut between rows, or between lines of plain text. Raises RequestError."""
    parts: list[str] = []
    size = skipped = 0
    for text in texts(source, form, lines=True):
        if text is None:
            skipped += 1
            continue
        parts.append(text)
        size += len(text)
        if size >= characters:
            yield Text(without_nul(_joint(source).join(parts), source.dataset), source.dataset, source.split, skipped=skipped)
            parts, size, skipped = [], 0, 0
    yield Text(without_nul(_joint(source).join(parts), source.dataset), source.dataset, source.split, skipped=skipped)


def _joint(source: TextSource) -> str:
    """Between the rows of a piece; lines of plain text keep their ends."""
    return "" if source.plain else source.joined_by


def without_nul(text: str, name: str) -> str:
    if "\0" in text:
        raise RequestError(f"{name}: holds NUL characters, so it is not text", "give UTF-8 text")
    return text
