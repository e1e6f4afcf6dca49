"""The windows that a recovery trains on, and those that decide.

Shapes: N = windows, L = tokens of a window.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmprune.data.chat import chat_windows
from llmprune.data.documents import form_of
from llmprune.data.reading import mixing, part_of, windows_of
from llmprune.data.sources import TextSource
from llmprune.data.windows import Windows
from llmprune.errors import RequestError
from llmprune.training.losses import NOT_LEARNED

HELD_BACK = 32  # windows, at most; never more than an eighth


@dataclass(frozen=True)
class Packs:
    """Windows that are packed without padding. learn_NL: True for tokens that are learned; None: all of them."""

    windows: Windows
    learn_NL: Tensor | None = None

    @property
    def labels_NL(self) -> Tensor:
        """The token ids, and ``NOT_LEARNED`` in place of those that are not learned."""
        ids_NL = self.windows.ids_NL
        return ids_NL if self.learn_NL is None else ids_NL.where(self.learn_NL, NOT_LEARNED)

    @property
    def learned(self) -> int:
        """Tokens that are learned; the first one of a window is never a target."""
        return int((self.labels_NL[:, 1:] != NOT_LEARNED).sum())

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.labels_NL.contiguous().numpy().tobytes() + self.windows.ids_NL.contiguous().numpy().tobytes()).hexdigest()

    def part(self, begin: int, end: int | None, said: str = "") -> Packs:
        ids_NL = self.windows.ids_NL[begin:end]
        learn_NL = None if self.learn_NL is None else self.learn_NL[begin:end]
        return Packs(replace(self.windows, ids_NL=ids_NL, split=self.windows.split + said), learn_NL)

    def learnable(self) -> Packs:
        """Without the windows in which there is nothing to learn. Raises RequestError where none is left."""
        if self.learn_NL is None:
            return self
        some_N = self.learn_NL[:, 1:].any(1)
        if not some_N.any():
            raise RequestError(f"{self.windows.dataset}: no token to learn in {len(self)} windows", "give dialogues with longer answers")
        return Packs(replace(self.windows, ids_NL=self.windows.ids_NL[some_N]), self.learn_NL[some_N])

    def __len__(self) -> int:
        return len(self.windows.ids_NL)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One window as transformers' Trainer takes it."""
        return {"input_ids": self.windows.ids_NL[index], "labels": self.labels_of(index)}

    def labels_of(self, index: int) -> Tensor:
        ids_L = self.windows.ids_NL[index]
        return ids_L if self.learn_NL is None else ids_L.where(self.learn_NL[index], NOT_LEARNED)


def packs_of(source: TextSource | Tensor, tokenizer: Any, length: int, wanted: int | None, bos: bool = False) -> Packs:
    """Packed windows of a text or of dialogues, whose answers are learned. Raises RequestError when it cannot be read, or is less than one window."""
    if isinstance(source, Tensor):
        return Packs(Windows(source, "given token ids", "all"))
    if source.parts:
        return _mixed(source, [packs_of(part, tokenizer, length, part_of(wanted, share), bos) for share, part in source.parts], wanted)
    form = form_of(source)
    if form.dialogues:
        windows, learn_NL = chat_windows(source, form, tokenizer, length, wanted, bos=bos, learns=True)
        return Packs(replace(windows, documents=None), learn_NL)
    return Packs(windows_of(source, tokenizer, length, wanted, bos=bos))


def _mixed(source: TextSource, parts: list[Packs], wanted: int | None) -> Packs:
    """The windows of a mixture by their shares."""
    order = mixing(source, [len(part) for part in parts], wanted)
    learn = [torch.ones_like(part.windows.ids_NL, dtype=torch.bool) if part.learn_NL is None else part.learn_NL for part in parts]
    ids_NL, learn_NL = (torch.stack([each[k][n] for k, n in order]) for each in ([part.windows.ids_NL for part in parts], learn))
    first = parts[0].windows
    skipped = sum(part.windows.skipped for part in parts)
    return Packs(Windows(ids_NL, source.dataset, source.split, bos=first.bos, skipped=skipped), learn_NL)


def divided(packs: Packs) -> tuple[Packs, Packs]:
    """(to train on, held back): the last eighth of the windows, or ``HELD_BACK`` of them. Raises RequestError where nothing can be held back."""
    held = min(HELD_BACK, len(packs) // 8)
    if not held:
        raise RequestError(
            f"{packs.windows.dataset}: {len(packs)} windows of {packs.windows.ids_NL.shape[1]}, of which none can be held back to decide",
            "give more text, a smaller --sequence-length, or --held-out with another text",
        )
    return packs.part(0, len(packs) - held), packs.part(len(packs) - held, None, ", held back")


def collated(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Windows as a batch; all are equally long."""
    return {name: torch.stack([one[name] for one in batch]) for name in batch[0]}
