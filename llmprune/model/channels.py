"""Exact reorderings of a block's inner channels, folded into the weights: columns of the matrix that reads them, rows of those that write them.

Nothing is assumed about an architecture. What may write a matrix's input is read off one marked forward; a layout (the FFN's channels, plain or
fused; the value channels inside a head) is accepted only if the block, with its channels shuffled, still gives the same output.

Pool and Yu, Channel Permutations for N:M Sparsity, https://papers.nips.cc/paper/2021/hash/6e8404c3b93a9527c8db241a1846599a-Abstract.html

Shapes: S = spans (inside one, channels may trade places), K = copies that move together, W = channels of a span, R, C = rows and columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmprune.model.matrices import Matrix

EXACT = 1e-5  # largest difference that rounding in another order may leave, relative to the largest output

APART = 100  # the output must change so many times more when only one side is shuffled


@dataclass(frozen=True)
class Channels:
    """Input channels of one matrix that can be reordered, and everything that has to be reordered with them."""

    reader: Matrix
    columns_SKW: Tensor
    writers: tuple[tuple[Matrix, Tensor], ...]  # (matrix, rows [S, K, W] that produce the channels)

    def apply(self, block: nn.Module, order_SW: Tensor) -> list[str]:
        """Put channel ``order_SW[s, w]`` of every span in place w, in reader, writers and their biases; names of all but the reader's parameter."""
        changed = []
        view_RC = self.reader.view(block)
        view_RC.copy_(view_RC[:, moved(self.columns_SKW, order_SW, view_RC.shape[1])])
        for writer, rows_SKW in self.writers:
            view_RC = writer.view(block)
            rows_R = moved(rows_SKW, order_SW, view_RC.shape[0])
            view_RC.copy_(view_RC[rows_R])
            changed.append(writer.parameter)
            for name, bias_R in biases(block, writer):
                bias_R.copy_(bias_R[rows_R])
                changed.append(name)
        return changed

    def order_C(self, order_SW: Tensor) -> Tensor:
        """The order of the reader's input channels after ``apply``, by their places before."""
        return moved(self.columns_SKW, order_SW, self.reader.columns)


def moved(places_SKW: Tensor, order_SW: Tensor, size: int) -> Tensor:
    """[size]: which index stands at each place when the spans are reordered."""
    index = torch.arange(size, device=places_SKW.device)
    index[places_SKW] = places_SKW.gather(2, order_SW.unsqueeze(1).expand_as(places_SKW))
    return index


def biases(block: nn.Module, matrix: Matrix) -> Iterator[tuple[str, Tensor]]:
    """(name, [R]) of the bias that is added to a matrix's product: a module's own, or one beside a stack of experts."""
    parameters = dict(block.named_parameters())
    for name in (f"{matrix.parameter.removesuffix('weight')}bias", f"{matrix.parameter}_bias"):
        if name in parameters and name != matrix.parameter:
            bias = parameters[name].data
            yield name, bias if matrix.expert is None else bias[matrix.expert]


def find_channels(
    block: nn.Module, readers: list[Matrix], writers: dict[str, list[Matrix]], heads: tuple[int, int], run: Callable[[], Tensor]
) -> dict[str, Channels]:
    """The reorderable input channels among those of ``readers``, by reader; the experts of a stack are accepted or rejected together.

    writers: the matrices that produce each reader's input. heads: (query, key-value). run: the block's output for some input.
    """
    stacks: dict[str, list[list[Channels]]] = {}
    for reader in readers:
        stacks.setdefault(reader.parameter, []).append(list(layouts(reader, writers[reader.name], heads)))
    whole = run()
    found: dict[str, Channels] = {}
    for stack in stacks.values():
        for alike in zip(*stack, strict=False):
            if is_exact(block, alike, whole, run):
                found |= {channels.reader.name: channels for channels in alike}
                break
    return found


def layouts(reader: Matrix, writers: list[Matrix], heads: tuple[int, int]) -> Iterator[Channels]:
    """The possible layouts of a reader's channels in its writers, the likeliest first."""
    width = reader.columns
    all_11W = torch.arange(width).view(1, 1, width)
    same = [w for w in writers if w.expert == reader.expert]
    for parts in (1, 2):
        fused = [w for w in same if w.rows == parts * width]
        if fused and len(fused) == len(same):
            yield Channels(reader, all_11W, tuple((w, torch.arange(parts * width).view(1, parts, width)) for w in fused))  # one after the other
            if parts == 2:
                yield Channels(reader, all_11W, tuple((w, torch.arange(2 * width).view(width, 2).T.reshape(1, 2, width)) for w in fused))
    query, shared = heads
    if reader.expert is None and shared and width % query == 0 and query % shared == 0:
        size, group = width // query, query // shared
        columns_SKW = torch.arange(width).view(shared, group, size)
        for writer in same:
            for rows_SKW in value_rows(writer.rows, shared, group, size):
                yield Channels(reader, columns_SKW, ((writer, rows_SKW),))


def value_rows(rows: int, shared: int, group: int, size: int) -> Iterator[Tensor]:
    """Where the values of every key-value head may be: alone or last in the matrix; last in their head's part of it."""
    each = shared * size
    if rows >= each:
        yield torch.arange(rows - each, rows).view(shared, 1, size)
    if rows == shared * (group + 2) * size:
        yield torch.arange(rows).view(shared, group + 2, size)[:, -1:]


def is_exact(block: nn.Module, alike: tuple[Channels, ...], whole: Tensor, run: Callable[[], Tensor]) -> bool:
    """Whether shuffled channels give the same output, while shuffling the readers alone does not (else the input proves nothing)."""
    spans, _, width = alike[0].columns_SKW.shape
    generator = torch.Generator().manual_seed(0)  # of a check, whatever seed the run has: what is exact is exact in any order
    order_SW = torch.stack([torch.randperm(width, generator=generator) for _ in range(spans)])

    def change(moving: list[Channels]) -> float:
        for channels in moving:
            channels.apply(block, order_SW)
        try:
            return float((run() - whole).abs().max())
        finally:
            for channels in moving:
                channels.apply(block, order_SW.argsort(1))

    together, alone = change(list(alike)), change([replace(channels, writers=()) for channels in alike])
    return together <= EXACT * float(whole.abs().max()) and alone > APART * together
