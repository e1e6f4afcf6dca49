"""The matrices of a stream that are pruned: the checkpoint's own tensors, also where the model puts several of them into one parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from llmprune.checkpoint.source import FIRST_NUMBER
from llmprune.errors import RequestError
from llmprune.model.matrices import Matrix, Selection, block_matrices
from llmprune.stream.stream import Stream

ROWS = 1 << 32  # more than any matrix has: row r of matrix i has the number i * ROWS + r


def selected(stream: Stream, selection: Selection) -> dict[int, list[Matrix]]:
    """The matrices that are pruned, block by block; the head comes after the last block, if ``only`` names it. Raises RequestError as check_skip."""
    check_skip(stream, selection)
    blocks = enumerate(zip(stream.names, stream.walk.blocks, strict=True))
    found = {i: [m for m in stored_matrices(stream, i, block) if selection.takes(f"{name}.{m.name}")] for i, (name, block) in blocks}
    if stream.walk.head_free and selection.names(f"{stream.walk.head_path}.weight"):
        found[len(stream.names)] = block_matrices(stream.walk.head)
    return found


def check_skip(stream: Stream, selection: Selection) -> None:
    """Raises RequestError for a ``skip`` that matches no parameter of the model, by its own or by the checkpoint's names: it would spare nothing."""
    if not selection.skip or any(selection.skips(name) for name, _ in stream.walk.model.named_parameters(remove_duplicate=False)):
        return
    for i, (name, block) in enumerate(zip(stream.names, stream.walk.blocks, strict=True)):
        if any(selection.skips(f"{name}.{m.name}") for m in stored_matrices(stream, i, block)):
            return
    raise RequestError(f"skip {selection.skip!r}: matches no parameter", "llmprune inspect lists the names")


def stored_matrices(stream: Stream, index: int, block: nn.Module) -> list[Matrix]:
    """The matrices of a block: those that the model multiplies, each taken apart into what checkpoints store as tensors of their own."""
    wholes = block_matrices(block)
    found = [part for key, rows in stream.stored_rows(numbered(stream.path_of(index), wholes)).items() for part in parts_in(rows, key, index, wholes)]
    parts: dict[str, list[Matrix]] = {}
    for part in sorted(found, key=lambda part: part.first or 0):
        parts.setdefault(part.whole, []).append(part)
    covered = {whole.whole for whole in wholes if sum(part.rows for part in parts.get(whole.whole, ())) == whole.rows}
    return [part for whole in wholes for part in (parts[whole.whole] if whole.whole in covered else [whole])]


def numbered(path: str, wholes: list[Matrix]) -> dict[str, Tensor]:
    """By full name, the parameters with the number of each row in its place, and a single column."""
    rows: dict[str, list[Tensor]] = {}
    for i, whole in enumerate(wholes):
        row_R1 = torch.arange(i * ROWS, i * ROWS + whole.rows).unsqueeze(1)
        rows.setdefault(f"{path}.{whole.parameter}", []).append(row_R1.T if whole.transposed else row_R1)
    stacks = {f"{path}.{whole.parameter}" for whole in wholes if whole.expert is not None}
    return {name: torch.stack(found) if name in stacks else found[0] for name, found in rows.items()}


def parts_in(rows: Tensor, key: str, index: int, wholes: list[Matrix]) -> Iterator[Matrix]:
    """The matrices whose numbered rows a checkpoint's tensor holds: a run of rows of each; none where it has them in another order."""
    numbers = rows.flatten()
    ends = [-1, *(numbers.diff() != 1).nonzero().flatten().tolist(), len(numbers) - 1]
    runs = [(int(numbers[before + 1]), end - before) for before, end in pairwise(ends)]
    owners = [number // ROWS for number, _ in runs]
    if len(set(owners)) < len(owners):
        return
    found = FIRST_NUMBER.match(key)
    own = key[found.end() :] if found and int(found[2]) == index else ""
    for (number, count), owner in zip(runs, owners, strict=True):
        whole, first = wholes[owner], number % ROWS
        name = f"{whole.name}[{first}:{first + count}]" if not own else own if len(owners) == 1 else f"{own}[{whole.expert}]"
        yield replace(whole, name=name, rows=count, first=None if count == whole.rows else first)
