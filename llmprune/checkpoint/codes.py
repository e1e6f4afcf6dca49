"""A weight that is stored as codes and scales, and its dequantisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Code:
    """The names of the tensors that a weight is stored in, the codes first, its shape, and the function that dequantises them."""

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    decode: Callable[..., Tensor]
