"""Places in a matrix, written as runs: the first flat index and the length of each, in turn.

Shapes: n = weights of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune.types import Mask

MOST = 100  # runs that are worth writing down


def runs_of(places: Mask) -> tuple[int, ...] | None:
    """The runs of True in a mask of any shape, by flat index; None where there are more than MOST."""
    edges = torch.nn.functional.pad(places.flatten().to(torch.int8), (1, 1)).diff().nonzero().flatten()
    if len(edges) > 2 * MOST:
        return None
    begins, ends = edges[::2], edges[1::2]
    return tuple(torch.stack([begins, ends - begins], 1).flatten().tolist())


def places_of(runs: Sequence[int], size: int) -> Mask:
    """bool [n]: True in the runs, of ``size`` weights. Raises ValueError for runs that leave them, or that are no pairs."""
    if len(runs) % 2 or any(first < 0 or length < 1 or first + length > size for first, length in zip(runs[::2], runs[1::2], strict=True)):
        raise ValueError(f"runs {list(runs)[:4]} of {size} weights")
    found: Tensor = torch.zeros(size, dtype=torch.bool)
    for first, length in zip(runs[::2], runs[1::2], strict=True):
        found[first : first + length] = True
    return found
