"""Token windows, and how token ids are cut into them: without overlap, an incomplete last window dropped.

Shapes: N = windows, L = tokens of a window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import RequestError
from llmprune.model.pictures import Pictures, Seen


@dataclass(frozen=True)
class Documents:
    """Dialogues packed into windows. form: the columns that they are read from; begun, cut: how many begin in each window, and how many of those go
    on in the next one.
    """

    form: str
    begun: tuple[int, ...]
    cut: tuple[int, ...]

    def taken(self, order: Sequence[int]) -> Documents:
        return replace(self, begun=tuple(self.begun[n] for n in order), cut=tuple(self.cut[n] for n in order))


@dataclass(frozen=True)
class Windows:
    """Token ids [N, L] with the name of their text. drawn_from: among how many, by which seed; empty for the first windows. seen: the pictures of
    each window, empty for text alone; left_out: rows with pictures that are in no window. bos: whether each begins with BOS. skipped: rows without
    text. documents: of dialogues.
    """

    ids_NL: Tensor
    dataset: str
    split: str
    drawn_from: str = ""
    seen: tuple[Seen | None, ...] = ()
    left_out: int = 0
    bos: bool = False
    skipped: int = 0
    documents: Documents | None = None

    def __len__(self) -> int:
        return len(self.ids_NL)

    def taken(self, order: Sequence[int]) -> Windows:
        """The windows of these numbers."""
        seen = tuple(self.seen[n] for n in order) if self.seen else ()
        return replace(self, ids_NL=self.ids_NL[list(order)], seen=seen, documents=self.documents and self.documents.taken(order))

    def first(self, count: int) -> Windows:
        return self.taken(range(min(count, len(self))))

    def after(self, count: int) -> Windows:
        return replace(self.taken(range(count, len(self))), split=f"{self.split}, held back")

    def held_back(self, most: int) -> tuple[Windows, Windows | None]:
        """(all but the last, the last ones: an eighth, or ``most``); a single window is not divided."""
        count = min(most, max(1, len(self) // 8))
        rest = len(self) - count
        return (self.first(rest), self.after(rest)) if rest else (self, None)

    def shuffled(self, seed: int) -> Windows:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return replace(self.taken(order), drawn_from=f"{len(order):,} windows, seed {seed}")

    @property
    def made(self) -> str:
        """How they are made, where it is not of plain text alone."""
        parts = [f"{self.documents.form} by the chat template"] if self.documents else []
        return ", ".join([*parts, *(["BOS first"] if self.bos else [])])

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


def bos_of(tokenizer: Any) -> int:
    """Raises RequestError for a tokenizer without a token that begins a text."""
    found: int | None = tokenizer.bos_token_id
    if found is None:
        raise RequestError("bos: the tokenizer has no BOS token", "omit it, or give --no-bos")
    return found


def places(ids: Sequence[int], length: int, bos: int | None = None) -> Tensor:
    """[N, L]: the number of the token id that stands in each place of the windows. bos: a token that each is to begin with; -1 where it is added."""
    if bos is None:
        count = len(ids) // length
        return torch.arange(count * length).view(count, length)
    found: list[Tensor] = []
    begin = 0
    while begin < len(ids):
        added = ids[begin] != bos
        end = begin + length - added
        if end > len(ids):
            break
        found.append(torch.cat([torch.full((int(added),), -1), torch.arange(begin, end)]))
        begin = end
    return torch.stack(found) if found else torch.empty(0, length, dtype=torch.long)


def filled(ids: Sequence[int], places_NL: Tensor, bos: int | None = None) -> Tensor:
    """The token ids [N, L] of ``places``."""
    ids_NL = torch.tensor(ids, dtype=torch.long)[places_NL]
    return ids_NL if bos is None else ids_NL.masked_fill(places_NL < 0, bos)
