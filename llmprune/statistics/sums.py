"""Statistics that follow parameters, not modules: every product with a watched weight is seen, whichever module computes it.

C = input columns of a matrix, T = tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmprune.errors import StoppedError
from llmprune.model.matrices import Matrix
from llmprune.statistics.dataflow import Follow
from llmprune.statistics.products import Products
from llmprune.types import Stat, Stats

PANEL = 192  # columns of the Gram matrix summed by one product; only panels up to the diagonal are computed

# statistic -> its [C] of one micro-batch, of what enters a matrix
COLUMN_SUMS: dict[Stat, Callable[[Tensor], Tensor]] = {
    "input_sq": lambda value_TC: value_TC.square().sum(0),
    "input_sum": lambda value_TC: value_TC.sum(0),
}


class Reached(Exception):
    """The forward has reached a matrix after the ones that are watched."""


class Watch(TorchFunctionMode):
    """Accumulates what enters each watched matrix while it is active; inputs that several matrices share once.

    ``stats`` maps each matrix to its sums; matrices with the same input share one object. A matrix that was never used has zero tokens.
    Call ``next_batch`` after each forward and ``close`` after the last one. ``inputs`` holds those of the present forward, each under the
    first matrix that used it; ``own`` each matrix's last input. ``follow`` is called for every operation; ``until`` names matrices whose use
    ends the forward by ``Reached``. path: of the block, for messages.
    """

    def __init__(
        self,
        block: nn.Module,
        matrices: list[Matrix],
        needs: frozenset[Stat],
        follow: Follow | None = None,
        until: list[Matrix] | None = None,
        path: str = "",
    ) -> None:
        super().__init__()
        self._prefix = f"{path}." if path else ""
        self.needs = needs
        self.inputs: dict[str, Tensor] = {}
        self.own: dict[str, Tensor] = {}
        self._follow = follow
        self._until = {m.name for m in until or ()}
        self.seconds = 0.0  # spent on the sums
        self.stats: dict[str, Stats] = {m.name: Stats() for m in matrices}
        self._products = Products(block, [*matrices, *(until or ())])
        self._found: set[str] = set()  # matrices that were used at least once
        self.several: set[str] = set()  # matrices with different inputs in one forward, so that ``own`` is not all that they saw
        self._sharing: set[str] = set()  # those whose sums are those of another one that was used before
        self._tokens = dict.fromkeys(self.stats, 0)
        self._seen: dict[tuple[Any, ...], tuple[Tensor, Stats]] = {}  # inputs of this forward, kept alive so that no address is used again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        used = self._products.uses(func, args, kwargs)
        if any(use.matrix.name in self._until for use in used):
            raise Reached
        for use in used:
            self._accumulate(use.matrix, use.value)
        out = func(*args, **kwargs)
        if self._follow is not None:
            if used:
                alone = used[0].place is None and not used[0].turned
                single = alone and used[0].matrix.first is None
                self._follow.product([use.matrix.name for use in used], used[0].value if alone else (args, kwargs), out, single)
            else:
                self._follow.other(func, args, kwargs, out)
        return out

    def next_batch(self) -> None:
        self._seen.clear()
        self.inputs.clear()
        self.own.clear()

    def _accumulate(self, matrix: Matrix, value: Tensor) -> None:
        tokens = value.numel() // value.shape[-1]
        if tokens == 0:  # an expert without tokens; empty tensors have one address, so they would seem shared
            return
        self._tokens[matrix.name] += tokens
        key = self._key_of(value)
        if matrix.name in self.own and self._key_of(self.own[matrix.name]) != key:
            self.several.add(matrix.name)
        known = self._seen[key][1] if key in self._seen else None
        if matrix.name not in self._found:
            self._found.add(matrix.name)
            if known is not None:
                self.stats[matrix.name] = known
                self._sharing.add(matrix.name)
        if known is None or known is not self.stats[matrix.name]:
            self._part(matrix.name)
            stats = self.stats[matrix.name]
            if known is None:
                self._seen[key] = (value, stats)
                self.inputs[matrix.name] = value
            began = perf_counter()
            accumulate_input(stats, value, self.needs)
            self.seconds += perf_counter() - began
        self.own[matrix.name] = value

    @staticmethod
    def _key_of(value: Tensor) -> tuple[Any, ...]:
        version = 0 if value.is_inference() else value._version  # a change in place makes it another input
        return value.data_ptr(), version, tuple(value.shape), value.stride(), value.dtype

    def _part(self, name: str) -> None:
        """From an input on that the matrix does not share, its sums are no longer those of another."""
        if name in self._sharing:
            self._sharing.remove(name)
            self.stats[name] = deepcopy(self.stats[name])

    def close(self) -> None:
        """Finish the sums; raises StoppedError when matrices that shared an input stopped doing so, or a sum is not finite."""
        self.next_batch()
        for name, stats in self.stats.items():
            if stats.tokens != self._tokens[name]:
                raise StoppedError(
                    f"{self._prefix}{name}: saw {self._tokens[name]} tokens, its shared input {stats.tokens}", "report this architecture"
                )
        for stats in {id(s): s for s in self.stats.values()}.values():
            finish(stats, self._prefix + next(name for name, own in self.stats.items() if own is stats))


def finish(stats: Stats, name: str) -> None:
    """Complete the sums of a matrix's inputs; raises StoppedError when one is not finite, or all inputs are zero."""
    if stats.gram_CC is not None:
        _mirror(stats.gram_CC)
    total = stats.input_sq_C if stats.input_sq_C is not None else stats.gram_CC
    if any(sums is not None and not bool(torch.isfinite(sums).all()) for sums in (total, stats.input_sum_C)):
        raise StoppedError(f"{name}: the calibration inputs are not finite", "compute in --dtype float32, or check the model")
    if total is not None and not bool(total.any()):
        raise StoppedError(f"{name}: all {stats.tokens} calibration inputs are zero", "check the model and the calibration text")


def accumulate_input(stats: Stats, value: Tensor, needs: frozenset[Stat]) -> None:
    """Accumulate what enters a matrix, [..., C], in the sums that are asked for; of the Gram matrix only the panels up to the diagonal."""
    value_TC = value.reshape(-1, value.shape[-1]).float()
    stats.tokens += value_TC.shape[0]
    width = value_TC.shape[1]
    if "gram" in needs:
        if stats.gram_CC is None:
            stats.gram_CC = value_TC.new_zeros(width, width)
        for a in range(0, width, PANEL):  # lower triangle, panel by panel
            b = min(a + PANEL, width)
            stats.gram_CC[a:b, :b].addmm_(value_TC[:, a:b].T, value_TC[:, :b])
    for stat in COLUMN_SUMS.keys() & needs:
        stats.accumulate(f"{stat}_C", COLUMN_SUMS[stat](value_TC))


def _mirror(gram_CC: Tensor) -> None:
    """Fill the upper triangle from the lower one, in place."""
    width = gram_CC.shape[0]
    for a in range(0, width, PANEL):
        b = min(a + PANEL, width)
        diagonal = gram_CC[a:b, a:b]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)
        gram_CC[a:b, b:] = gram_CC[b:, a:b].T
