"""A model whose blocks come one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from llmprune.model.blocks import Walk


class Stream(Protocol):
    """A model whose blocks come one at a time. Parameters passed to ``keep`` have their new values when a block is loaded again."""

    walk: Walk
    names: list[str]  # path of every block

    @property
    def towers(self) -> dict[str, int]:
        """The parts of a vision-language model that text does not pass: path -> number of weights."""
        ...

    def path_of(self, index: int) -> str:
        """Path of a block, or of the head, which comes after the last one."""
        ...

    def block(self, index: int, dense: bool = False) -> AbstractContextManager[nn.Module]:
        """A block in place (or the head, with everything of ``outer``); as in the source if ``dense``."""
        ...

    def outer(self, towers: bool = False) -> AbstractContextManager[None]:
        """Embeddings, final norm and head in place; towers: with those that text does not pass."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Every block, embeddings, final norm and head in place."""
        ...

    def stored_dtype(self, index: int, parameter: str) -> torch.dtype:
        """The dtype that a block's parameter has on disk (or in the live model)."""
        ...

    def stored_rows(self, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        """How parameters (by full name, a number in the place of each row) lie in the checkpoint that is or would be written: tensor -> its rows'
        numbers, of those that are made of several tensors (checkpoint/names.py).
        """
        ...

    def keep(self, index: int, parameters: Iterable[str], again: bool = False) -> dict[str, str]:
        """Store these changed parameters of a loaded block; hashes of what was written. again: after the whole model has been pruned."""
        ...

    def trial(self) -> AbstractContextManager[None]:
        """Context in which changes are forgotten at the end."""
        ...

    def device_of(self, index: int) -> torch.device: ...

    scratch: Path | None  # folder for hidden states that do not fit in memory
    width: Tensor | None  # the residual channels that come from the embeddings, the others start as zeros; None: all
