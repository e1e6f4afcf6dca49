"""Token windows: one tokenisation of the whole text, cut without overlap, the tail dropped.

Shapes: N = windows, L = tokens of a window.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmprune.data.sources import Text, read_text
from llmprune.errors import RequestError


@dataclass(frozen=True)
class Windows:
    """Token ids [N, L] with the name of the text they were cut from."""

    ids_NL: Tensor
    dataset: str
    split: str

    def first(self, count: int) -> Windows:
        return replace(self, ids_NL=self.ids_NL[:count])

    def after(self, count: int) -> Windows:
        return replace(self, ids_NL=self.ids_NL[count:], split=f"{self.split}, held back")

    def held_back(self, most: int) -> tuple[Windows, Windows | None]:
        """(all but the last, the last ones: an eighth, or ``most``); a single window is not divided."""
        count = min(most, max(1, len(self.ids_NL) // 8))
        rest = len(self.ids_NL) - count
        return (self.first(rest), self.after(rest)) if rest else (self, None)

    def shuffled(self, seed: int) -> Windows:
        order = torch.randperm(len(self.ids_NL), generator=torch.Generator().manual_seed(seed))
        return replace(self, ids_NL=self.ids_NL[order])

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids_NL.contiguous().numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class RunData:
    """All windows of a run. held: of the calibration text, for trials, on which nothing is calibrated; None where there are none."""

    calibration: Windows
    evaluation: tuple[Windows, ...] = ()
    held: Windows | None = None

    def all(self) -> tuple[Windows, ...]:
        return (self.calibration, *self.evaluation, *((self.held,) if self.held else ()))


def cut(text: Text, tokenizer: Any, length: int) -> Windows:
    """Tokenise a whole text by the tokenizer's default call and cut it into windows of ``length``."""
    ids = tokenizer(text.text, verbose=False)["input_ids"]
    count = len(ids) // length
    return Windows(torch.tensor(ids[: count * length], dtype=torch.long).view(count, length), text.dataset, text.split)


def read_windows(spec: str, purpose: str, tokenizer: Any, length: int, wanted: int | None, seed: int) -> Windows:
    """All windows of a text, or enough of a large source for ``wanted``.

    Raises RequestError when the source cannot be read, or its text gives not one window.
    """
    characters = 8 * length * wanted if wanted else None
    while True:
        text = read_text(spec, purpose, characters, seed)
        windows = cut(text, tokenizer, length)
        if text.complete or wanted is None or len(windows.ids_NL) >= wanted:
            break
        assert characters is not None
        characters *= 2
    if not len(windows.ids_NL):
        tokens = len(tokenizer(text.text, verbose=False)["input_ids"])
        raise RequestError(f"{text.dataset}: {tokens} tokens, not one window of {length}", "give more text, or a smaller --sequence-length")
    return windows
