"""Whole blocks: those without which the model's predictions change least are dropped, measured again after each one.

Shapes: N = windows, L = tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llmprune.errors import RequestError
from llmprune.evaluation.divergence import after_blocks, divergences
from llmprune.maths.counts import least_needed
from llmprune.maths.scores import Mean, block_influence
from llmprune.pruners.block_pruner import PrunedBlock, run_again
from llmprune.pruners.matrix import correct, notes_on_filled, with_notes
from llmprune.pruners.plan import Plan, Work
from llmprune.pruners.weights import stages_of
from llmprune.results import BlockReport, Row
from llmprune.stream.clock import Clock
from llmprune.stream.flow import Flow
from llmprune.stream.reshaped import Reshaped
from llmprune.structured.derived import attends, inexpressible
from llmprune.structured.structure import Structure
from llmprune.types import SILENT, Listener, Records

Order = Literal["measured", "block_influence"]
WINDOWS = 16  # on which the trials without a block are measured


@torch.no_grad()
def choose_layers(stream: Reshaped, windows_NL: Tensor, count: int, order: Order, listen: Listener = SILENT) -> dict[int, float]:
    """The dropped blocks, in order, with the cost of each: mean KL from the dense model without all dropped so far, or (block_influence) how
    far the block turned the hidden states.
    """
    windows_NL = windows_NL[:WINDOWS]
    if order == "block_influence":
        influence = influences(stream, windows_NL)
        chosen: dict[int, float] = {}
        for _ in range(count):
            least = least_of({index: cost for index, cost in influence.items() if index not in chosen}, stream, chosen)
            chosen[least] = influence[least]
        return chosen
    dense = after_blocks(stream, windows_NL) if count else None
    dropped: dict[int, float] = {}
    for _ in range(count):
        assert dense is not None
        costs = without_each(stream, windows_NL, frozenset(dropped), dense)
        least = least_of(costs, stream, dropped)
        dropped[least] = costs[least]
        listen.progress("layers", len(dropped), count)
    return dropped


def least_of(costs: dict[int, float], stream: Reshaped, dropped: Iterable[int]) -> int:
    """The cheapest block without which at least one has attention, and a config can express the rest. Raises RequestError where none is."""
    left = set(range(len(stream.names))) - set(dropped)
    fixed = [index for index in costs if not attends(stream.structure.config, left - {index})]
    wrong = None
    while len(fixed) < len(costs):
        least = least_needed(costs, 1, fixed)[0]
        wrong = inexpressible(stream.walk.model, stream.walk.path, left - {least})
        if wrong is None:
            return least
        fixed.append(least)
    raise RequestError(wrong or "layers: no further block can be dropped", "ask for less sparsity")


def without_each(stream: Reshaped, windows_NL: Tensor, dropped: frozenset[int], dense: Flow) -> dict[int, float]:
    """The divergence from the dense model without ``dropped`` and one more block, for each remaining one. Every block is loaded once."""
    flow = Flow(stream, windows_NL)
    twins: dict[int, Flow] = {}
    for index in range(len(stream.names)):
        if index in dropped:
            continue
        left_out = flow.twin()
        with stream.block(index) as block:
            for other in (flow, *twins.values()):
                other.through(index, block)
        twins[index] = left_out
    return dict(zip(twins, divergences(dense, list(twins.values())), strict=True))


def influences(stream: Reshaped, windows_NL: Tensor) -> dict[int, float]:
    flow = Flow(stream, windows_NL)
    found = {}
    for index in range(len(stream.names)):
        mean = Mean()
        with stream.block(index) as block:
            for batch in range(len(flow)):
                left_NLD = flow.outputs[batch] = flow.run(index, block, batch)
                mean += block_influence(flow.hidden[batch].to(left_NLD.device), left_NLD)
        flow.advance()
        found[index] = mean.value
    return found


def layer_pruner(work: Work, stream: Reshaped, asked: dict[str, float], criterion: str, records: Records, listen: Listener) -> LayerPruner:
    """The pruner of the layers that are chosen now, or were by an earlier process; ``stream`` shows the model without them."""
    structure = stream.structure
    record = records.read("choice")
    if record is None:
        count = structure.layers_to_drop(work.plan.sparsity)
        order: Order = "block_influence" if criterion == "block_influence" else "measured"
        record = {"dropped": [[index, cost] for index, cost in choose_layers(stream, work.windows_NL, count, order, listen).items()]}
        records.write("choice", record)
    dropped = {int(index): cost for index, cost in record["dropped"]}
    stream.dropped = frozenset(dropped)
    return LayerPruner(work.plan, structure, dropped)


@dataclass(frozen=True)
class LayerPruner:
    """Drops whole blocks, and corrects the matrices of later blocks towards the dense path's outputs to compensate.

    dropped: the cost of each dropped block, by its number.
    """

    plan: Plan
    structure: Structure
    dropped: dict[int, float]

    @property
    def places(self) -> Sequence[int]:
        return range(len(self.structure.blocks))

    @property
    def wants_dense(self) -> bool:
        return self.plan.asymmetric and bool(self.dropped)

    @property
    def accept_damage(self) -> bool:
        return self.plan.accept_damage

    def take_over(self, index: int, report: BlockReport) -> None:
        """The stream knows which blocks are dropped."""

    def prune(self, flow: Flow, dense: Flow | None, index: int, block: nn.Module, clock: Clock) -> PrunedBlock:
        rows = [self._row(flow.stream.path_of(index), index)]
        if dense is None:  # nothing is repaired, so neither path has to run
            return PrunedBlock(rows, (), (), ())
        if index in self.dropped:
            with flow.stream.block(index, dense=True) as whole:
                dense.through(index, whole)
            return PrunedBlock(rows, (), (), ())
        if index < min(self.dropped):  # there is nothing to compensate yet
            dense.through(index, block)
            flow.through(index, block)
            return PrunedBlock(rows, (), (), ())
        changed: dict[str, None] = {}
        lost_zeros = weights = 0
        with closing(stages_of(flow, dense, index, block, self.structure.repaired(index, block), self.plan, clock, {})) as stages:
            for stage, statistics in stages:
                lost_zeros += sum(correct(flow.stream, index, block, m, statistics.pop(m.name)) for m in stage)
                weights += sum(m.rows * m.columns for m in stage)
                changed |= dict.fromkeys(m.parameter for m in stage)
                clock.lap("solve")
        rows = with_notes(rows, notes_on_filled(lost_zeros, weights))
        return PrunedBlock(rows, list(changed), list(changed), run_again(flow, dense, index, block))

    def finish(self, dense: Flow | None, listen: Listener) -> None:
        """Nothing remains to be done."""

    def _row(self, path: str, index: int) -> Row:
        """A block is kept or dropped as a whole."""
        size, kept = self.structure.blocks[index], () if index in self.dropped else (0,)
        return Row(path, 1, size, self.plan.sparsity, 0, self.dropped.get(index), 0, (), None, "layers", 1, kept, size)
