"""Rows as documents: each is a text, or a dialogue of messages with role and content, whatever its columns are called.

| columns | document |
|---|---|
| ``messages`` (role, content), ``conversations`` (from, value) | a dialogue |
| ``text``, or the only column of strings | a text |
| ``prompt`` and ``completion``, as strings or messages | a dialogue |
| ``instruction``, ``input`` and ``output`` | a dialogue of two turns; the input follows the instruction |

The first that a data set has is read, unless a column is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from llmprune.data.rows import rows
from llmprune.data.sources import TextSource
from llmprune.errors import RequestError

DIALOGUES = ("messages", "conversations")
PAIRS = (("prompt", "completion"), ("instruction", "output"))
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}  # of ``from``
LOOKED_AT = 1000  # rows, for the first one that is not empty

Message = dict[str, Any]
Dialogue = list[Message]


@dataclass(frozen=True)
class Form:
    """Which columns of a data set are read, and whether they hold dialogues."""

    columns: tuple[str, ...]
    dialogues: bool

    def __str__(self) -> str:
        return " + ".join(self.columns)


def form_of(source: TextSource) -> Form:
    """How the rows of a source are read, by the first one that holds something. Raises RequestError where no column can be."""
    if source.plain:
        return Form(("text",), False)
    first: dict[str, Any] = {}
    for row in islice(rows(source), LOOKED_AT):
        first = first or row
        found = _form_of_row(row, source)
        if found:
            return found
    if not first:
        raise RequestError(f"{source.dataset}: has no rows", "give a text")
    if source.column is not None:
        raise RequestError(f"{source.dataset}: column {source.column!r} holds no text", f"its columns are {', '.join(first)}")
    hint = "name the column of text or messages: --column NAME, or call it 'text' or 'messages'"
    strings = [name for name, value in first.items() if isinstance(value, str)]
    if len(strings) > 1:
        raise RequestError(f"{source.dataset}: no column 'text' or 'messages' among {', '.join(first)}", hint)
    raise RequestError(f"{source.dataset}: no text in its first rows, whose columns are {', '.join(first)}", hint)


def _form_of_row(row: dict[str, Any], source: TextSource) -> Form | None:
    if source.column is not None:
        if source.column not in row:
            raise RequestError(f"{source.dataset}: has no column {source.column!r}", f"there are: {', '.join(row)}")
        value = row[source.column]
        return Form((source.column,), isinstance(value, list)) if isinstance(value, str | list) else None
    for name in DIALOGUES:
        if isinstance(row.get(name), list):
            return Form((name,), True)
    if isinstance(row.get("text"), str):
        return Form(("text",), False)
    if "text" in row or not {*DIALOGUES}.isdisjoint(row):
        return None
    for pair in PAIRS:
        if all(isinstance(row.get(name), str | list) for name in pair):
            return Form(pair, True)
    strings = [name for name, value in row.items() if isinstance(value, str)]
    return Form((strings[0],), False) if len(strings) == 1 else None


def texts(source: TextSource, form: Form, draw: int | None = None, lines: bool = False) -> Iterator[str | None]:
    """The text of each row; None for one without text. Raises RequestError where the source cannot be read."""
    for row in rows(source, draw, lines=lines):
        value = row.get(form.columns[0])
        yield value if isinstance(value, str) else None


def dialogues(source: TextSource, form: Form, draw: int | None = None) -> Iterator[tuple[str, Dialogue | None]]:
    """(its name for messages, the dialogue) of each row; None for one without text. Raises RequestError for what is no dialogue."""
    for number, row in enumerate(rows(source, draw), 1):
        name = f"{source.dataset}, row {number}"
        yield name, _dialogue_of(row, form, name)


def _dialogue_of(row: dict[str, Any], form: Form, name: str) -> Dialogue | None:
    values = [row.get(column) for column in form.columns]
    if any(not value or not isinstance(value, str | list) for value in values):
        return None
    if len(values) == 1:
        if not isinstance(values[0], list):
            return None
        turns = values[0]
    else:
        question, answer = values
        if form.columns[0] == "instruction" and isinstance(row.get("input"), str) and row["input"].strip():
            question = f"{question}\n\n{row['input']}"
        turns = [*_turns(question, "user"), *_turns(answer, "assistant")]
    messages = [_message(turn, name) for turn in turns]
    return None if any(message["content"] is None for message in messages) else messages


def _turns(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _message(turn: Any, name: str) -> Message:
    """A turn with role and content; parts of text are joined, and a content that is null stays so."""
    if isinstance(turn, dict) and "from" in turn and "value" in turn and turn.get("role") is None:
        if turn["from"] not in ROLES:
            raise RequestError(f"{name}: a turn from {turn['from']!r}", f"turns are from {', '.join(ROLES)}; leave such rows out")
        turn = {"role": ROLES[turn["from"]], "content": turn["value"]}
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or "content" not in turn:
        raise RequestError(f"{name}: a turn is not a message with role and content", "leave such rows out")
    content = turn["content"]
    if isinstance(content, list) and content and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise RequestError(f"{name}: the content of a turn is not text", "leave such rows out")
    return {**turn, "content": content}
