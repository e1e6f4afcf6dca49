"""The sparsity at which this machine computes the model in a given share of the time. Blocks of several sizes are timed; nothing is pruned yet.

What is timed is the forward of one calibration window with the logits of its last token (prefill): every kind of block once, as the checkpoint has
it and cut to size in turns, times the number of its kind. N = windows, L = tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor, nn

from llmprune.errors import RequestError
from llmprune.stream.flow import Flow
from llmprune.stream.reshaped import Reshaped
from llmprune.structured.slicing import Keeps
from llmprune.structured.spaces import closest_count
from llmprune.structured.structure import Structure
from llmprune.types import SILENT, Listener

ROUNDS = 5
STEPS = 8  # of the bisection
MOST = 0.95


@torch.no_grad()
def sparsity_for(stream: Reshaped, ids_NL: Tensor, ratio: float, listen: Listener = SILENT) -> float:
    """The least sparsity whose time is at most ``ratio`` of the dense model's. Raises RequestError where no sparsity reaches it."""
    timer = Timer(stream, ids_NL[:1])
    layers = len(stream.names)
    most = 1 - 1 / layers if stream.structure.name == "layers" else MOST
    least = timer.ratio(most)
    if least > ratio:
        raise RequestError(f"target_latency_ratio {ratio:g}: {least:.3g} is the least that {stream.structure.name} can reach here", "ask for more")
    if stream.structure.name == "layers":
        return next((n / layers for n in range(1, layers) if timer.ratio(n / layers) <= ratio), most)
    low, high = 0.0, MOST
    for step in range(STEPS):
        guess = (low + high) / 2
        low, high = (low, guess) if timer.ratio(guess) <= ratio else (guess, high)
        listen.progress("latency", step + 1, STEPS)
    return high


class Timer:
    """Times a model's blocks, dense and cut."""

    def __init__(self, stream: Reshaped, ids_1L: Tensor) -> None:
        self._stream = stream
        self._structure = stream.structure
        self._flow = Flow(stream, ids_1L)
        self._kinds: dict[tuple[object, ...], list[int]] = {}
        for index in range(len(stream.names)):
            self._kinds.setdefault(kind_of(self._structure, index), []).append(index)
        with stream.outer():
            last_11, hidden_11D = next((ids_1L[:, -1:], hidden_1LD[:, -1:]) for ids_1L, hidden_1LD in self._flow.windows())
            self._outer = min(seconds(lambda: stream.walk.logits(last_11, hidden_11D)) for _ in range(ROUNDS))

    def ratio(self, sparsity: float) -> float:
        """Time of the model at a sparsity relative to the dense one, timed beside it."""
        dense = cut = self._outer
        for indices in self._kinds.values():
            whole, smaller = self._block(indices[0], sparsity)
            dense += whole * len(indices)
            cut += smaller * len(indices)
        if self._structure.name == "layers":
            cut -= (dense - self._outer) * sparsity
        return cut / dense

    def _block(self, index: int, sparsity: float) -> tuple[float, float]:
        with self._stream.block(index) as block:
            keeps = first_units(self._structure, index, sparsity)
            self._stream.keeps[index] = keeps
            cut = self._stream.rebuilt(index, block) if keeps else block
            del self._stream.keeps[index]
            pairs = [(self._seconds(index, block), self._seconds(index, cut)) for _ in range(1 + ROUNDS)][1:]  # the first warms up
        return min(whole for whole, _ in pairs), min(smaller for _, smaller in pairs)  # other processes can only add to a time

    def _seconds(self, index: int, block: nn.Module) -> float:
        return seconds(lambda: self._flow.run(index, block, 0))


def seconds(work: Callable[[], Tensor]) -> float:
    began = perf_counter()
    out = work()
    if out.device.type == "cuda":
        torch.cuda.synchronize(out.device)
    return perf_counter() - began


def kind_of(structure: Structure, index: int) -> tuple[object, ...]:
    """Blocks of one kind take equally long: they have as many parameters, in the same spaces."""
    return (structure.blocks[index], *((space.name, space.units) for space in structure.spaces[index]))


def first_units(structure: Structure, index: int, sparsity: float) -> Keeps:
    """As many units of every space as a sparsity keeps; which ones does not matter here."""
    found = {}
    for cut in structure.cut.values():
        if cut.block == index:
            each = closest_count(list(cut.counts), cut.kept(sparsity)) // cut.space.groups
            units = torch.arange(cut.space.units).view(cut.space.groups, -1)[:, :each].flatten()
            if len(units) < cut.space.units:
                found[cut.space.name] = units
    return found
