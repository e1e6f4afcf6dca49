"""Token windows: one tokenisation of the whole text, cut without overlap, an incomplete last window dropped.

Shapes: N = windows, L = tokens of a window.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmprune.data.sources import BUFFER, Text, TextSource, find_source, pieces, read_text
from llmprune.errors import RequestError
from llmprune.model.pictures import Pictures, Seen

WHOLE = 16 << 20  # bytes; a larger file is drawn from piece by piece
PIECE = 4 << 20  # characters


@dataclass(frozen=True)
class Windows:
    """Token ids [N, L] with the name of their text. drawn_from: among how many, by which seed; empty for the first windows. seen: the pictures of
    each window, empty for text alone; left_out: rows with pictures that are in no window.
    """

    ids_NL: Tensor
    dataset: str
    split: str
    drawn_from: str = ""
    seen: tuple[Seen | None, ...] = ()
    left_out: int = 0

    def first(self, count: int) -> Windows:
        return replace(self, ids_NL=self.ids_NL[:count], seen=self.seen[:count])

    def after(self, count: int) -> Windows:
        return replace(self, ids_NL=self.ids_NL[count:], seen=self.seen[count:], split=f"{self.split}, held back")

    def held_back(self, most: int) -> tuple[Windows, Windows | None]:
        """(all but the last, the last ones: an eighth, or ``most``); a single window is not divided."""
        count = min(most, max(1, len(self.ids_NL) // 8))
        rest = len(self.ids_NL) - count
        return (self.first(rest), self.after(rest)) if rest else (self, None)

    def shuffled(self, seed: int) -> Windows:
        order = torch.randperm(len(self.ids_NL), generator=torch.Generator().manual_seed(seed))
        return replace(self, ids_NL=self.ids_NL[order], drawn_from=f"{len(order):,} windows, seed {seed}")

    @property
    def sha256(self) -> str:
        """Of the token ids, and of everything that is seen with them."""
        found = hashlib.sha256(self.ids_NL.contiguous().numpy().tobytes())
        for number, seen in enumerate(self.seen):
            for name, tensor in sorted(seen.inputs.items()) if seen else ():
                found.update(f"{number} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()

    @property
    def pictures(self) -> int:
        return sum(seen.count for seen in self.seen if seen)


@dataclass(frozen=True)
class RunData:
    """All windows of a run. held: of the calibration text, for trials, never used to calibrate; None if no trial needs them. identities: of the
    files and data sets that all are made from, None where it is unknown.
    """

    calibration: Windows
    evaluation: tuple[Windows, ...] = ()
    held: Windows | None = None
    identities: dict[str, str | None] = field(default_factory=dict)

    def all(self) -> tuple[Windows, ...]:
        return (self.calibration, *self.evaluation, *((self.held,) if self.held else ()))

    @property
    def pictures(self) -> Pictures:
        """What is seen with the windows."""
        return Pictures((ids_L, seen) for w in self.all() for ids_L, seen in zip(w.ids_NL, w.seen, strict=False) if seen)

    def text(self, most: int) -> Tensor:
        """[1, L]: the first tokens of the first window, a token of text in the place of those that stand for pictures."""
        ids_L = self.calibration.ids_NL[0]
        return ids_L.masked_fill(self.pictures.stands_in(ids_L), int(ids_L[-1]))[None, :most]


def cut(text: Text, tokenizer: Any, length: int) -> Windows:
    """Tokenise a whole text by the tokenizer's default call and cut it into windows of ``length``."""
    ids = tokenizer(text.text, verbose=False)["input_ids"]
    count = len(ids) // length
    return Windows(torch.tensor(ids[: count * length], dtype=torch.long).view(count, length), text.dataset, text.split)


def read_windows(spec: str, purpose: str, tokenizer: Any, length: int, wanted: int | None, *, draw: int | None = None) -> Windows:
    """``windows_of`` what a spec names."""
    return windows_of(find_source(spec, purpose), tokenizer, length, wanted, draw=draw)


def windows_of(source: TextSource, tokenizer: Any, length: int, wanted: int | None, *, draw: int | None = None) -> Windows:
    """All windows of a text, or enough of a large source for ``wanted``. draw: a seed by which they are drawn from all of the source, of a stream
    through a buffer; else they are the first.

    Raises RequestError when the source cannot be read, or its text is shorter than one window.
    """
    if draw is not None and wanted is not None and source.file is not None and source.file.stat().st_size > WHOLE:
        return drawn(source, tokenizer, length, wanted, draw)
    characters = 8 * length * wanted if wanted and (draw is None or source.file is None) else None
    while True:
        text = read_text(source, characters, draw)
        windows = cut(text, tokenizer, length)
        if text.complete or wanted is None or len(windows.ids_NL) >= wanted:
            break
        assert characters is not None
        characters *= 2
    if not len(windows.ids_NL):
        tokens = len(tokenizer(text.text, verbose=False)["input_ids"])
        raise RequestError(f"{text.dataset}: {tokens} tokens, less than one window of {length}", "give more text, or a smaller --sequence-length")
    if draw is None:
        return windows
    windows = windows.shuffled(draw)
    return windows if source.file else replace(windows, drawn_from=f"a stream shuffled in a buffer of {BUFFER:,} rows, seed {draw}")


def drawn(source: TextSource, tokenizer: Any, length: int, wanted: int, seed: int) -> Windows:
    """``wanted`` windows drawn uniformly from all of a large file, in random order: those with the smallest of random keys. Only they and one
    piece are in memory. An incomplete last window of every piece is dropped. Raises RequestError.
    """
    generator = torch.Generator().manual_seed(seed)
    ids_NL, keys_N, count = torch.empty(0, length, dtype=torch.long), torch.empty(0, dtype=torch.float64), 0
    for text in pieces(source, PIECE):
        new_NL = cut(text, tokenizer, length).ids_NL
        count += len(new_NL)
        keys_N = torch.cat([keys_N, torch.rand(len(new_NL), generator=generator, dtype=torch.float64)])
        order_N = keys_N.argsort()[:wanted]
        ids_NL, keys_N = torch.cat([ids_NL, new_NL])[order_N], keys_N[order_N]
    if not count:
        raise RequestError(f"{source.dataset}: less than one window of {length}", "give a smaller --sequence-length")
    return Windows(ids_NL, source.dataset, source.split, f"{count:,} windows, seed {seed}")
