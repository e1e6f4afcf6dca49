"""What a checkpoint holds: exact zeros of every matrix, and which N:M patterns every group keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.checkpoint.source import Source
from llmprune.model.matrices import Selection
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.selected import selected

COMMON = ((2, 4), (4, 8), (1, 4))


@dataclass(frozen=True)
class Inspected:
    """One matrix: its zeros, and the common N:M patterns that hold in all its groups."""

    matrix: str
    rows: int
    columns: int
    zeros: int
    patterns: tuple[str, ...]
    broken: int | None  # groups that break the pattern asked about; None when none was asked about

    @property
    def sparsity(self) -> float:
        return self.zeros / (self.rows * self.columns)


def broken_groups(weight_RC: Tensor, n: int, m: int) -> int:
    """Groups of M consecutive inputs with more than N non-zeros; a width that M does not divide breaks every row's last group."""
    rows, columns = weight_RC.shape
    whole = columns - columns % m
    groups = (weight_RC[:, :whole] != 0).view(rows, -1, m).sum(-1) if whole else weight_RC.new_zeros(0)
    return int((groups > n).sum()) + (rows if columns % m else 0)


@torch.no_grad()
def inspect(source: Source, selection: Selection, asked: tuple[int, int] | None = None) -> list[Inspected]:
    """Every selected block matrix of a checkpoint, read block by block in its own dtype."""
    stream = CheckpointStream(source, torch.float32, torch.device("cpu"))
    found = []
    for index, matrices in selected(stream, selection).items():
        with stream.block(index) as block:
            for matrix in matrices:
                view_RC = matrix.view(block)
                held = tuple(f"{n}:{m}" for n, m in COMMON if not broken_groups(view_RC, n, m))
                broken = broken_groups(view_RC, *asked) if asked else None
                zeros = int((view_RC == 0).sum())
                found.append(Inspected(f"{stream.path_of(index)}.{matrix.name}", matrix.rows, matrix.columns, zeros, held, broken))
    return found
