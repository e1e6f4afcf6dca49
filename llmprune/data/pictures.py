"""Calibration on pictures and text: rows of a data set become windows through the model's own processor.

A row has its pictures in ``images`` or ``image`` (paths, bytes, or what ``datasets`` decodes) and its words in ``messages`` or a column of text.
Rows follow each other in a window as texts do. Pictures are never cut: where those of a row do not fit any more, its words alone go on, and the row
begins the next window.

Shapes: N = windows, L = tokens of a window.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune.data.rows import rows
from llmprune.data.sources import TextSource
from llmprune.data.tokenizer import UNRENDERED
from llmprune.data.windows import Windows
from llmprune.errors import RequestError, first_line
from llmprune.model.pictures import Seen

PICTURES, MESSAGES = ("images", "image"), "messages"
APART = "\n\n"  # between rows without a chat template
ADDED = 2  # tokens that begin and end a text, which rows of one window share
BUFFER = 1000  # rows among which the next one is drawn
HINT_ROWS = "give rows with images (or image) and messages (or text)"


def has_pictures(source: TextSource) -> bool:
    """Whether the first row of a data set has a column of pictures."""
    if source.parts:
        return any(has_pictures(part) for _, part in source.parts)
    return not source.plain and not {*PICTURES}.isdisjoint(next(rows(source), {}))


def load_processor(folder: Path) -> Any:
    """The processor of an image-text model, which reads pictures and text. Raises RequestError when there is none, or it cannot be used."""
    from transformers import AutoProcessor

    try:
        found = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except UNRENDERED as error:
        said = first_line(error).replace(str(folder), folder.name)
        raise RequestError(f"{folder.name}: its processor cannot be used ({said[:160]})", "add its files, or calibrate on text") from None
    if not is_processor(found):
        raise RequestError(f"{folder.name}: has no processor of pictures and text", "add its files, or calibrate on text")
    return found


def is_processor(value: Any) -> bool:
    """Whether a value is a transformers processor of several modalities, rather than a tokenizer."""
    from transformers import ProcessorMixin

    return isinstance(value, ProcessorMixin)


@dataclass(frozen=True)
class Row:
    """A row as the processor takes it. words: its text without its pictures; tokens: of the whole; until: of it up to its last picture."""

    text: str
    words: str
    pictures: list[Any]
    tokens: int = 0
    until: int = 0


def picture_windows(source: TextSource, processor: Any, length: int, wanted: int, draw: int | None = None) -> Windows:
    """The first windows of a data set with pictures, as many as ``wanted`` or all. draw: a seed by which rows are shuffled in a buffer.

    Rows whose pictures alone fill a window, and those of a window with the tokens of another one, are left out, and counted.
    Raises RequestError for rows without pictures or text, and when there is no whole window.
    """
    reader = Reader(processor, source)
    found: dict[bytes, tuple[Tensor, Seen | None]] = {}
    for parts in packed(reader.rows(length, draw), reader, length):
        try:
            window = reader.window(parts, length)
        except UNRENDERED as error:
            raise RequestError(f"{source.dataset}, {len(parts)} rows together: {first_line(error)[:200]}", HINT_ROWS) from None
        key = b"" if window is None else window[0][:-1].numpy().tobytes()
        if window is None or key in found:  # windows are known by their tokens
            reader.left_out += len(parts)
        else:
            found[key] = window
        if len(found) == wanted:
            break
    if not found:
        raise RequestError(
            f"{source.dataset}: no whole window of {length} tokens ({reader.left_out} rows are left out)",
            "give more rows, or another --sequence-length",
        )
    drawn = "" if draw is None else f"rows shuffled in a buffer of {BUFFER:,}, seed {draw}"
    ids, seen = zip(*found.values(), strict=True)
    return Windows(torch.stack(ids), source.dataset, source.split, drawn, seen, reader.left_out)


def packed(rows: Iterator[Row], reader: Reader, length: int) -> Iterator[list[Row]]:
    """The rows of one window after another, with a little more than ``length`` tokens; the last, unfinished window is dropped."""
    again: deque[Row] = deque()
    parts: list[Row] = []
    late: list[Row] = []
    filled = 0
    while row := again.popleft() if again else next(rows, None):
        if filled + row.until >= length:
            late.append(row)
            row = reader.words_of(row)
        parts.append(row)
        filled += row.tokens
        if filled >= length + ADDED * len(parts):
            yield parts
            again.extendleft(reversed(late))
            parts, late, filled = [], [], 0


class Reader:
    """Rows through a processor. left_out: rows that are in no window."""

    def __init__(self, processor: Any, source: TextSource) -> None:
        self.processor, self.source = processor, source
        self.templated = processor.chat_template is not None
        self.left_out = 0

    def rows(self, length: int, draw: int | None) -> Iterator[Row]:
        folder = self.source.files[0].parent if self.source.files else None
        for number, row in enumerate(rows(self.source, draw, BUFFER), 1):
            try:
                counted = self.counted(self.read(row, folder))
            except UNRENDERED as error:
                raise RequestError(f"{self.source.dataset}, row {number}: {first_line(error)[:200]}", HINT_ROWS) from None
            if counted.until < length:
                yield counted
            else:
                self.left_out += 1

    def read(self, row: dict[str, Any], folder: Path | None) -> Row:
        """One row. Raises one of UNRENDERED for what cannot be read."""
        given: Any = next((row[name] for name in PICTURES if row.get(name) is not None), [])
        pictures = [opened(one, folder) for one in (given if isinstance(given, list) else [given])]
        if row.get(MESSAGES):
            if not self.templated:
                raise ValueError("its messages need a chat template, which this processor does not have")
            turns = [{"role": turn["role"], "content": parts_of(turn["content"])} for turn in row[MESSAGES]]
        else:
            said = row.get(self.source.column or _column_of(row))
            if not isinstance(said, str):
                raise ValueError("holds no text")
            if not self.templated or self.processor.image_token in said:
                return self.plain(said, pictures)
            turns = [{"role": "user", "content": [{"type": "text", "text": said}]}]
        places = sum(part["type"] == "image" for turn in turns for part in turn["content"])
        if not places:
            turns[0]["content"][:0] = [{"type": "image"}] * len(pictures)
        elif places != len(pictures):
            raise ValueError(f"{places} places for {len(pictures)} pictures")
        alone = [{**turn, "content": [part for part in turn["content"] if part["type"] == "text"]} for turn in turns]
        return Row(self.rendered(turns), self.rendered(alone), pictures)

    def rendered(self, turns: list[dict[str, Any]]) -> str:
        return self.processor.apply_chat_template(turns, tokenize=False)

    def plain(self, said: str, pictures: list[Any]) -> Row:
        """A text that stands for itself: its pictures are where it has places for them, or before it."""
        place = self.processor.image_token
        places = said.count(place)
        if places not in (0, len(pictures)):
            raise ValueError(f"{places} places ({place}) for {len(pictures)} pictures")
        return Row(said if places else place * len(pictures) + said, said.replace(place, ""), pictures)

    def counted(self, row: Row) -> Row:
        ids_L, stands_in_L, _ = self.encoded(row.text, row.pictures)
        places = stands_in_L.nonzero().flatten().tolist()
        return Row(row.text, row.words, row.pictures, len(ids_L), places[-1] + 1 if places else 0)

    def words_of(self, row: Row) -> Row:
        return self.counted(Row(row.words, row.words, []))

    def window(self, parts: list[Row], length: int) -> tuple[Tensor, Seen | None] | None:
        """(token ids [L], what is seen with them) of the joined rows; None where their tokens are not as many as those of each."""
        pictures = [picture for part in parts for picture in part.pictures]
        ids_L, stands_in_L, inputs = self.encoded(("" if self.templated else APART).join(part.text for part in parts), pictures)
        if len(ids_L) < length or stands_in_L[length - 1 :].any():
            return None
        cut = {name: t[:, :length] if t.shape[:2] == (1, len(ids_L)) else t for name, t in inputs.items()}
        return ids_L[:length], Seen(cut, stands_in_L[:length], len(pictures)) if pictures else None

    def encoded(self, text: str, pictures: list[Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(token ids [L], which of them are placeholders [L], the other arguments of the forward)."""
        made = self.processor(text=[text], images=[pictures] if pictures else None, add_special_tokens=not self.templated, return_tensors="pt")
        ids_1L: Tensor = made.pop("input_ids")
        made.pop("attention_mask", None)  # all ones
        return ids_1L[0], torch.isin(ids_1L[0], torch.tensor(self.processor.image_token_ids)), dict(made)


def _column_of(row: dict[str, Any]) -> str:
    """The column of text: ``text``, or the only one of strings. Raises ValueError when there is none."""
    columns = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row or len(columns) == 1:
        return "text" if "text" in row else columns[0]
    raise ValueError(f"no column 'text' among {', '.join(row)}")


def opened(picture: Any, folder: Path | None) -> Any:
    """A picture in RGB. Paths are those of local files, relative to ``folder``. Raises ValueError or OSError for what is none."""
    from PIL import Image

    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, bytes):
        picture = Image.open(io.BytesIO(picture))
    elif isinstance(picture, str):
        if "://" in picture or folder is None:
            raise ValueError(f"picture {picture[:80]!r} is not a local file")
        picture = Image.open(folder / picture)
    if not isinstance(picture, Image.Image):
        raise ValueError(f"a picture is given as {type(picture).__name__}")
    try:
        return picture.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(first_line(error)) from None


def parts_of(content: Any) -> list[dict[str, str]]:
    """The parts of a turn: text, and places of pictures. Raises ValueError for any other."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts: list[dict[str, str]] = []
    for part in content:
        if part.get("type") not in ("text", "image"):
            raise ValueError(f"a turn has a part of type {part.get('type')!r}")
        parts.append({"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]})
    return parts
