"""The protocol of block pruners, and how both paths reach the next block.

Two flows of hidden states pass through the model: the pruned path, through the pruned blocks, and the dense path beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from llmprune.errors import StoppedError
from llmprune.model.matrices import Matrix
from llmprune.pruners.plan import Plan
from llmprune.results import BlockReport, Row
from llmprune.stream.clock import Clock
from llmprune.stream.flow import Flow
from llmprune.types import Listener

BLOWN_UP = 1.0  # relative squared output error above which a run stops unless damage is accepted


@dataclass(frozen=True)
class PrunedBlock:
    """The result of pruning one block. stored: the parameters to write; changed: those of them that belong to no row. outputs: (unpruned, pruned)
    outputs of every micro-batch, computed while they are read; when all have been read, both paths are at the next block.
    """

    rows: Sequence[Row]
    stored: Sequence[str]
    changed: Sequence[str]
    outputs: Iterable[tuple[Tensor, Tensor]]


class BlockPruner(Protocol):
    """Prunes a model block by block (``llmprune.engine.prune``)."""

    @property
    def places(self) -> Sequence[int]:
        """Numbers of the blocks that are visited, in order; the number after the last block is the head's."""
        ...

    @property
    def wants_dense(self) -> bool:
        """Whether the dense path runs beside the pruned one."""
        ...

    @property
    def accept_damage(self) -> bool:
        """Whether the run continues after a destroyed output."""
        ...

    def take_over(self, index: int, report: BlockReport) -> None:
        """Take over a block that an interrupted run has pruned, from its report."""
        ...

    def prune(self, flow: Flow, dense: Flow | None, index: int, block: nn.Module, clock: Clock) -> PrunedBlock:
        """Prune one loaded block in place. Its inputs are in ``flow.hidden`` and ``dense.hidden``."""
        ...

    def finish(self, dense: Flow | None, listen: Listener) -> None:
        """Work on the whole model once every block is pruned. dense: the dense path after the last block."""
        ...


class InPlacePruner:
    """What block pruners share that leave zeros in the weights of ``matrices`` (block -> its matrices)."""

    plan: Plan
    matrices: dict[int, list[Matrix]]

    @property
    def places(self) -> Sequence[int]:
        return list(self.matrices)

    @property
    def wants_dense(self) -> bool:
        return self.plan.asymmetric or self.plan.polish_steps > 0

    @property
    def accept_damage(self) -> bool:
        return self.plan.accept_damage

    def take_over(self, index: int, report: BlockReport) -> None:
        """Nothing: the zeros are in the weights."""


def run_finished(flow: Flow, dense: Flow | None, index: int) -> None:
    """Run both paths through a block that an interrupted run has pruned already; nothing comes after the head."""
    if index == len(flow.stream.names):
        return
    if dense is not None:
        with flow.stream.block(index, dense=True) as block:
            dense.through(index, block)
    with flow.stream.block(index) as block:
        flow.through(index, block)


def output_error(pairs: Iterable[tuple[Tensor, Tensor]], name: str, accept_damage: bool) -> float:
    """Relative squared error over (unpruned, pruned) outputs; 0 where there are none.

    Raises StoppedError when it is not finite, or above 1: the output is destroyed; and when all unpruned outputs are zero.
    """
    wrong = total = 0.0
    seen = False
    for dense, pruned in pairs:
        seen = True
        dense = dense.to(pruned.device)  # they may have waited in different places
        total += float(dense.float().square().sum(dtype=torch.float64))
        wrong += float((dense.float() - pruned.float()).square().sum(dtype=torch.float64))
    error = wrong / total if total else 0.0
    if seen and not total and not accept_damage:
        raise StoppedError(f"{name}: its unpruned output is zero for every token", "check the model; --accept-damage continues anyway")
    if not math.isfinite(error):
        raise StoppedError(f"{name}: its output is not finite", "compute in --dtype float32")
    if error > BLOWN_UP and not accept_damage:
        raise StoppedError(
            f"{name}: relative output error {error:.3g} after pruning, above {BLOWN_UP:g}",
            "ask for less sparsity or a better method; --accept-damage continues anyway",
        )
    return error


def run_again(flow: Flow, dense: Flow | None, index: int, block: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(unpruned, pruned) outputs of every micro-batch, on the pruned path's inputs or of the two paths; then advance to the next block."""
    for batch in range(len(flow)):
        if dense is None:
            dense_NLD, flow.outputs[batch] = flow.outputs[batch], flow.run(index, block, batch)
            yield dense_NLD, flow.outputs[batch]
        else:  # the pruned block has run already, stage by stage
            yield dense.outputs[batch], flow.outputs[batch]
    flow.advance()
    if dense is not None:
        dense.advance()


def run_head_again(flow: Flow, reference: Flow, head: nn.Module, dense_VD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(unpruned, pruned) logits of every window."""
    weight = head.get_parameter("weight")
    pruned_VD = weight.data
    for (ids_1L, ours_1LD), (_, theirs_1LD) in zip(flow.windows(), reference.windows(), strict=True):
        pruned_1LV = flow.stream.walk.logits(ids_1L, ours_1LD)
        weight.data = dense_VD
        dense_1LV = flow.stream.walk.logits(ids_1L, theirs_1LD)
        weight.data = pruned_VD
        yield dense_1LV, pruned_1LV
