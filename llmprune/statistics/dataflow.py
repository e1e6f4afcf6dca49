"""What feeds what inside a block, read off one forward, without knowing any architecture.

Every tensor gets a depth and its origins: 0 and none for what enters the block, one more than its input's and the matrix itself for the
output of each watched matrix; any other operation passes on the greatest depth and all origins of its operands. Matrices whose inputs have
equal depth do not feed each other: they form a stage (q, k, v | o | gate, up | down). A sum W x + p, where p does not come from W x, has p as
the partner of W: for the matrices that write into the residual stream, p is the residual.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

# The marks are attributes of the tensors themselves, so they are freed with the tensors.
DEPTH = "_llmprune_depth"
ORIGINS = "_llmprune_origins"  # frozenset of the matrices that a tensor comes from
PLACE = "_llmprune_place"
DIRECT = "_llmprune_direct"  # frozenset of the last matrices on the paths to a tensor: it is made of their products
SUMS = "_llmprune_sums"  # frozenset of the matrices W of which a tensor is W x + partners
NONE: frozenset[str] = frozenset()
IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__"}
Place: TypeAlias = tuple[int, int]  # (number of the operation that made or last changed a tensor, which of its tensors); -1: what entered
ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}


class Follow:
    """Marks tensors while a block runs. Its state covers the forward since ``start``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []  # (matrix, depth of its input), in the order of use
        self.products: list[tuple[str, int]] = []  # (matrix, number of the operation), in the order of use
        self.partners: dict[str, list[tuple[Place, Tensor]]] = {}
        self.made_of: dict[str, frozenset[str]] = {}  # matrix -> those whose products its input is made of
        self.operations = 0
        self._deepest = 0

    def start(self) -> None:
        self.calls.clear()
        self.products.clear()
        self.partners.clear()
        self.made_of.clear()
        self.operations = 0
        self._deepest = 0

    def product(self, matrices: list[str], value: Any, out: Tensor, single: bool) -> None:
        """``out`` is the product of one matrix with ``value``; or, if not ``single``, of a stack of experts, of parts of a matrix, or of
        one on the left, with some of ``value``.
        """
        self.products += [(matrix, self.operations) for matrix in matrices]
        entering = list(tensors(value))
        depth = max(self._depth(t) for t in entering)
        self.calls += [(matrix, depth) for matrix in matrices]
        direct = NONE.union(*(_direct(t) for t in entering))
        self.made_of |= {matrix: direct | self.made_of.get(matrix, NONE) for matrix in matrices}
        own = frozenset(matrices)
        self._mark([out], depth + 1, own.union(*(_origins(t) for t in entering)), own, own if single else NONE)

    def other(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        operands = list(tensors((args, kwargs)))
        depth = max((self._depth(t) for t in operands), default=0)
        origins = NONE.union(*(_origins(t) for t in operands))
        sums = self._add(operands) if func in ADDITIONS else self._same(operands, out)
        direct = NONE.union(*(_direct(t) for t in operands))
        self._mark(changed(func, args, out), depth, origins, direct, sums)

    def enter(self, value: Any) -> None:
        """What enters the block has depth 0."""
        self.operations = -1
        self._mark(value, 0, NONE, NONE, NONE)

    def _depth(self, tensor: Tensor) -> int:
        """A tensor of unknown origin may come from anything so far; parameters have no origin."""
        return tensor.__dict__.get(DEPTH, 0 if isinstance(tensor, torch.nn.Parameter) else self._deepest)

    def _mark(self, value: Any, depth: int, origins: frozenset[str], direct: frozenset[str], sums: frozenset[str]) -> None:
        for i, tensor in enumerate(tensors(value)):
            tensor.__dict__.update({DEPTH: depth, ORIGINS: origins, DIRECT: direct, PLACE: (self.operations, i), SUMS: sums})
        self._deepest = max(self._deepest, depth)
        self.operations += 1

    def _add(self, operands: list[Tensor]) -> frozenset[str]:
        """The sums that continue in a + b; each operand is a partner of the matrices in the other, unless it comes from them."""
        if len(operands) != 2 or operands[0].shape != operands[1].shape:
            return NONE
        sums = NONE
        for mine, other in (operands, operands[::-1]):
            going_on = mine.__dict__.get(SUMS, NONE) - _origins(other)
            for matrix in going_on:
                self.partners.setdefault(matrix, []).append((other.__dict__.get(PLACE, (self.operations, 0)), other))
            sums |= going_on
        return sums

    @staticmethod
    def _same(operands: list[Tensor], out: Any) -> frozenset[str]:
        """Views and the like carry on the sums of their operand."""
        if len(operands) == 1 and isinstance(out, Tensor) and out.numel() == operands[0].numel() and out.data_ptr() == operands[0].data_ptr():
            return operands[0].__dict__.get(SUMS, NONE)
        return NONE


def _origins(tensor: Tensor) -> frozenset[str]:
    return tensor.__dict__.get(ORIGINS, NONE)


def _direct(tensor: Tensor) -> frozenset[str]:
    return tensor.__dict__.get(DIRECT, NONE)


def _in_place(func: Any) -> bool:
    """Whether torch's naming marks it as in place: add_, __iadd__, __setitem__."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE


def changed(func: Any, args: Any, out: Any) -> Any:
    """The tensors that an operation makes or changes."""
    return [out, args[0]] if _in_place(func) and args else [out]


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


def stages(calls: list[tuple[str, int]], matrices: list[Any]) -> tuple[list[list[Any]], bool]:
    """(the matrices grouped by depth, in order; whether the forward uses them in that order too).

    Experts of one stack share a stage, including those that no token reached; a matrix that was never used is put in the last stage.
    """
    depth: dict[str, int] = {}
    for name, at in calls:
        depth[name] = max(at, depth.get(name, 0))
    by_parameter: dict[str, int] = {}
    for m in matrices:
        if m.name in depth:
            by_parameter[m.parameter] = max(depth[m.name], by_parameter.get(m.parameter, 0))
    last = max(by_parameter.values(), default=0)
    grouped: dict[int, list[Any]] = {}
    for m in matrices:
        grouped.setdefault(by_parameter.get(m.parameter, last), []).append(m)
    order = [at for name, at in calls if name in {m.name for m in matrices}]
    return [grouped[at] for at in sorted(grouped)], order == sorted(order)
