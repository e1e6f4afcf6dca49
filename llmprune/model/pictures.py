"""What the forward of an image-text model takes beside token ids: its processor's tensors for the pictures of a window.

Windows are known by their tokens, all but the last, which a check replaces. So whatever runs some of the windows of a run, in any order, runs
them with their pictures.

Shapes: N = windows, L = tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # the target that torch's cross entropy leaves out


@dataclass(frozen=True)
class Seen:
    """The pictures of one window. inputs: further arguments of the forward, as the model's processor makes them; stands_in_L: True for tokens that
    are placeholders of pictures.
    """

    inputs: dict[str, Tensor]
    stands_in_L: Tensor
    count: int


class Pictures:
    """The pictures of windows, by the windows' tokens. windows: (token ids [L], what is seen with them)."""

    def __init__(self, windows: Iterable[tuple[Tensor, Seen]] = ()) -> None:
        self._of = {_key(ids_L): seen for ids_L, seen in windows}

    def with_any(self, ids_NL: Tensor) -> bool:
        """Whether one of the windows has pictures."""
        return bool(self._of) and any(_key(ids_L) in self._of for ids_L in ids_NL)

    def inputs(self, ids_NL: Tensor) -> dict[str, Tensor]:
        """The further arguments for a micro-batch. A window with pictures comes alone."""
        seen = self._of.get(_key(ids_NL[0])) if len(ids_NL) == 1 and self._of else None
        return seen.inputs if seen else {}

    def stands_in(self, ids_L: Tensor) -> Tensor:
        """[L]: True for the tokens of a window that are placeholders of pictures."""
        seen = self._of.get(_key(ids_L)) if self._of else None
        return torch.zeros_like(ids_L, dtype=torch.bool) if seen is None else seen.stands_in_L.to(ids_L.device)

    def targets(self, ids_L: Tensor) -> Tensor:
        """[L-1]: the tokens that a window's predictions are held against, ``IGNORED`` for placeholders of pictures."""
        return ids_L.masked_fill(self.stands_in(ids_L), IGNORED)[1:]


def _key(ids_L: Tensor) -> bytes:
    return ids_L[:-1].cpu().numpy().tobytes()
