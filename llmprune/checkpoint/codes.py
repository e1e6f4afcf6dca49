"""A weight that is stored as codes and scales, and what turns them back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Code:
    """The names of the tensors that a weight is stored in, the codes first, its own shape, and what turns those tensors into it."""

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    decode: Callable[..., Tensor]
