"""A report's matrices by layer and kind: the data of the heat map and of the ratios."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.results import BlockReport, Row

NUMBER = re.compile(r"(?<![^.\[])\d+(?![^.\]])")  # a path component, or an expert's index in brackets


@dataclass(frozen=True)
class MatrixGroup:
    """The matrices of one kind in one block: one, or its experts."""

    block: str
    kind: str
    matrices: int
    weights: int
    zeros: int
    asked: tuple[float, float]  # the least and the greatest ratio
    lost: float | None  # squared error added to the outputs, summed over the matrices

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Grid:
    """All of them. ``blocks`` and ``kinds`` are in the order of the model."""

    blocks: tuple[str, ...]
    kinds: tuple[str, ...]
    groups: dict[tuple[str, str], MatrixGroup]

    def __bool__(self) -> bool:
        return bool(self.groups)

    @property
    def ratios_differ(self) -> bool:
        """Whether all ratios are equal: under a uniform allocation they differ by less than a thousandth."""
        ends = [end for group in self.groups.values() for end in group.asked]
        return bool(ends) and max(ends) - min(ends) > 1e-3


def grid_of(blocks: Sequence[BlockReport]) -> Grid:
    rows: dict[tuple[str, str], list[Row]] = {}
    for block in blocks:
        for row in block.rows:
            rows.setdefault((block.block, kind_of(block.block, row.matrix)), []).append(row)
    groups = {key: _group(*key, found) for key, found in rows.items()}
    kinds = tuple(dict.fromkeys(kind for _, kind in groups))
    return Grid(tuple(dict.fromkeys(block for block, _ in groups)), kinds, groups)


def kind_of(block: str, matrix: str) -> str:
    """``mlp.experts.*.up_proj`` of ``model.layers.3.mlp.experts.7.up_proj.weight``; a head is its own kind, and so is a whole block."""
    if matrix == block:
        return "block"
    inside = NUMBER.sub("*", matrix.removeprefix(f"{block}."))
    return inside.removesuffix(".weight") if inside != "weight" else block


def short(names: tuple[str, ...]) -> list[str]:
    """The fewest last components of each name that distinguish it from the others."""
    found = []
    for name in names:
        parts = name.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        found.append(next((e for e in ends if sum(f".{other}".endswith(f".{e}") for other in names) == 1), name))
    return found


def short_blocks(names: tuple[str, ...]) -> list[str]:
    """The number of a block; the name of a head."""
    return [name.rsplit(".", 1)[-1] for name in names]


def _group(block: str, kind: str, rows: list[Row]) -> MatrixGroup:
    asked = [row.asked for row in rows]
    lost = [row.lost for row in rows if row.lost is not None]
    weights, zeros = sum(row.size for row in rows), sum(row.dropped for row in rows)
    return MatrixGroup(block, kind, len(rows), weights, zeros, (min(asked), max(asked)), sum(lost) if lost else None)
