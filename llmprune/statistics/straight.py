"""A straight block: every matrix is used exactly once in a forward, always at the same operation. One marked forward shows which; from then on
it is enough to count operations, and a forward can pause before a matrix until that has been pruned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmprune.model.matrices import Matrix
from llmprune.statistics.dataflow import Follow, Place, changed, tensors
from llmprune.statistics.products import Products
from llmprune.statistics.sums import Watch


class Irregular(Exception):
    """A forward performed other operations than the first one."""


@dataclass(frozen=True)
class Program:
    """The operations of a straight block, by number."""

    stages: list[list[Matrix]]  # matrices that share an input, in the order of use
    opens: dict[int, int]  # operation that first uses the input of a stage -> stage
    partners: dict[str, list[Place]]  # what the product of a matrix is added to, as far as it exists when its stage opens
    length: int

    @property
    def kept(self) -> frozenset[Place]:
        return frozenset(place for places in self.partners.values() for place in places)


def read_program(watching: Watch, follow: Follow, matrices: list[Matrix]) -> Program | None:
    """The program of the forward that ``watching`` and ``follow`` have just seen; None if the block is not straight."""
    used = dict(follow.products)
    names = {m.name for m in matrices}
    if any(m.expert is not None for m in matrices) or len(follow.products) != len(used) or used.keys() != names:
        return None
    if not watching.own.keys() >= names:  # one that got no tokens, such as the adapter of another language
        return None
    groups: dict[int, list[Matrix]] = {}
    for m in sorted(matrices, key=lambda m: used[m.name]):
        groups.setdefault(id(watching.stats[m.name]), []).append(m)
    stages = list(groups.values())
    opens = {used[stage[0].name]: number for number, stage in enumerate(stages)}
    partners = {m.name: [p for p, _ in follow.partners.get(m.name, []) if p[0] < used[s[0].name]] for s in stages for m in s}
    return Program(stages, opens, {name: places for name, places in partners.items() if places}, follow.operations)


class Trace(TorchFunctionMode):
    """One forward of a straight block. ``arrive`` is called when a stage opens: with its number, its input and the partners of its matrices.

    ``close`` comes after the forward. Raises Irregular when it is not the program's.
    """

    def __init__(self, program: Program, products: Products, entering: Any, arrive: Callable[[int, Tensor, dict[str, Tensor]], None]) -> None:
        super().__init__()
        self._program = program
        self._products = products
        self._arrive = arrive
        self._operations = 0
        self._wanted = program.kept
        self._numbers = {number for number, _ in self._wanted}
        self._held: dict[Place, Tensor] = {}
        self._hold(-1, entering)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number = self._operations
        self._operations += 1
        stage = self._program.opens.get(number)
        if stage is not None:
            self._open(stage, self._products.uses(func, args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if number in self._numbers:
            self._hold(number, changed(func, args, out))
        return out

    def _open(self, stage: int, uses: list[Any]) -> None:
        first = self._program.stages[stage]
        if not uses or uses[0].matrix.name != first[0].name:
            raise Irregular
        partners = {m.name: total([self._held[p] for p in self._program.partners[m.name]]) for m in first if m.name in self._program.partners}
        self._arrive(stage, uses[0].value, partners)

    def _hold(self, number: int, value: Any) -> None:
        for i, tensor in enumerate(tensors(value)):
            if (number, i) in self._wanted:
                self._held[number, i] = tensor

    def close(self) -> None:
        if self._operations != self._program.length:
            raise Irregular


def total(parts: list[Tensor]) -> Tensor:
    """[T, R]: the sum of partners, which may have their tokens in one axis or in two."""
    flat = [part.reshape(-1, part.shape[-1]) for part in parts]
    return torch.stack(flat).sum(0) if len(flat) > 1 else flat[0]


class Paused:
    """Work in a separate thread, which stops wherever it calls ``pause`` until it is resumed: only one side runs at a time.

    There is no other way to suspend a forward: the calls on its stack are transformers'.
    """

    def __init__(self, work: Callable[[Callable[[], None]], None]) -> None:
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._ending = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work, torch.get_num_threads()), daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Let the work run until its next pause or its end. Raises what the work raises."""
        self._turn.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Abort the work where it is, unless it is done."""
        self._ending = True
        self._turn.release()
        self._thread.join()

    def _run(self, work: Callable[[Callable[[], None]], None], threads: int) -> None:
        torch.set_num_threads(threads)  # OpenMP's setting is per thread
        try:
            self._wait()
            with torch.no_grad():  # this is per thread too
                work(self._pause)
        except _Ended:
            pass
        except BaseException as error:  # of any kind: it is raised again in the waiting thread, as a direct call would have raised it
            self._error = error
        finally:
            self._back.release()

    def _pause(self) -> None:
        self._back.release()
        self._wait()

    def _wait(self) -> None:
        self._turn.acquire()
        if self._ending:
            raise _Ended


class _Ended(BaseException):
    """No one waits for the work any more."""
