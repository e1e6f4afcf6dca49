"""Forwards of micro-batches through a straight block (statistics/straight.py), with a halt at each of its stages.

Shapes: C = input columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Protocol, TypeAlias

from torch import Tensor, nn

from llmprune.statistics.products import Products
from llmprune.statistics.straight import Paused, Program, Trace
from llmprune.statistics.sums import Reached
from llmprune.stream.flow import Flow

Arrive: TypeAlias = Callable[[int, Tensor, dict[str, Tensor]], None]


def traced(flow: Flow, index: int, block: nn.Module, batch: int, program: Program, products: Products, arrive: Arrive) -> Tensor:
    hidden_NLD, call = flow.entering(index, batch)
    trace = Trace(program, products, (hidden_NLD, call.args, call.kwargs), arrive)
    with trace:
        left_NLD = flow.stream.walk.replay(block, hidden_NLD, call)
    trace.close()
    return left_NLD


class Passage(Protocol):
    """One micro-batch's forward through a straight block."""

    def to(self, stage: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Advance to the next stage: its input, and the partners of its matrices."""
        ...

    def reorder(self, order_C: Tensor) -> None:
        """Reorder the channels of the present stage's input, as their writers would by now."""
        ...

    def out(self) -> Tensor:
        """The block's output."""
        ...

    def end(self) -> None: ...


class Waiting:
    """A forward that pauses at every stage. All micro-batches of a block are paused side by side, with the tensors they hold."""

    def __init__(self, flow: Flow, index: int, block: nn.Module, batch: int, program: Program, products: Products) -> None:
        self._arrived: tuple[Tensor, dict[str, Tensor]] | None = None
        self._left: Tensor | None = None

        def work(pause: Callable[[], None]) -> None:
            def arrive(stage: int, value: Tensor, partners: dict[str, Tensor]) -> None:
                self._arrived = (value, partners)
                pause()

            self._left = traced(flow, index, block, batch, program, products, arrive)

        self._paused = Paused(work)

    def to(self, stage: int) -> tuple[Tensor, dict[str, Tensor]]:
        self._arrived = None
        self._paused.go_on()
        assert self._arrived is not None
        return self._arrived

    def reorder(self, order_C: Tensor) -> None:
        assert self._arrived is not None
        value = self._arrived[0]
        value.copy_(value[..., order_C])

    def out(self) -> Tensor:
        self._arrived = None
        self._paused.go_on()
        assert self._left is not None
        return self._left

    def end(self) -> None:
        self._paused.end()
        self._left = self._arrived = None


class Repeated:
    """A forward that is restarted for every stage: for blocks whose micro-batches do not all fit in memory."""

    def __init__(self, flow: Flow, index: int, block: nn.Module, batch: int, program: Program, products: Products) -> None:
        self._run = partial(traced, flow, index, block, batch, program, products)

    def to(self, stage: int) -> tuple[Tensor, dict[str, Tensor]]:
        found: list[tuple[Tensor, dict[str, Tensor]]] = []

        def arrive(at: int, value: Tensor, partners: dict[str, Tensor]) -> None:
            if at == stage:
                found.append((value, partners))
                raise Reached

        with suppress(Reached):
            self._run(arrive)
        return found[0]

    def reorder(self, order_C: Tensor) -> None:
        pass

    def out(self) -> Tensor:
        return self._run(lambda at, value, partners: None)

    def end(self) -> None:
        pass
