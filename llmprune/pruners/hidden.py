"""The width of the residual stream: channels are dropped from every block, the embeddings, the last norm and the head at once.

They are chosen on the dense model, by the criterion's scores of all matrices that read or write them; then every matrix is corrected towards its
original outputs, on the remaining channels, as in maths/asymmetric_target.py.

Shapes: D = residual channels, R, C = rows and columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.maths.linalg import drop_smallest
from llmprune.model.matrices import Matrix, block_matrices
from llmprune.pruners.block_pruner import PrunedBlock, run_again
from llmprune.pruners.matrix import correct, notes_on_filled, with_notes
from llmprune.pruners.plan import Plan, Work
from llmprune.pruners.weights import stages_of
from llmprune.results import BlockReport, Row
from llmprune.statistics.stages import at_head, at_once
from llmprune.stream.clock import Clock
from llmprune.stream.flow import Flow
from llmprune.stream.reshaped import Reshaped
from llmprune.structured.slicing import Keeps, mask_block
from llmprune.structured.spaces import Space
from llmprune.structured.structure import Structure
from llmprune.types import Listener, Records, Stats

SURVEY_WINDOWS = 64


@torch.no_grad()
def choose_width(work: Work, stream: Reshaped, count: int, listen: Listener) -> dict[str, Any]:
    """``kept``: the ``count`` kept channels, sorted; ``lost``: the share of all scores in the dropped ones."""
    flow = Flow(stream, work.windows_NL[:SURVEY_WINDOWS])
    shares: list[Tensor] = []
    for index in work.matrices:
        with stream.block(index) as block:
            shares += score_shares(work, flow, index, block, stream.structure)
        if index < len(stream.names):
            flow.advance()
        listen.progress("hidden", index + 1, len(work.matrices))
    total_D = torch.stack(shares).sum(0)
    keep_D = drop_smallest(total_D, len(total_D) - count)
    return {"kept": keep_D.nonzero().flatten().tolist(), "lost": float(total_D[~keep_D].sum() / total_D.sum())}


def score_shares(work: Work, flow: Flow, index: int, block: nn.Module, structure: Structure) -> list[Tensor]:
    """[D] of each parameter that reads or writes the stream: the sum of its scores over the column where a channel is read, over the row where
    it is written, as a share of all its scores. So matrices of different sizes and scales count equally.
    """
    criterion, matrices, head = work.plan.criterion, work.matrices[index], index == len(flow.stream.names)
    assert criterion is not None
    space = None if head else space_of(structure, index)
    needs = criterion.needs
    found = at_head(flow, None, block, matrices, needs) if head else at_once(flow, index, block, matrices, needs, Clock())
    if work.gradients is not None:
        work.gradients.add_to(index, found)
    scores: dict[str, Tensor] = {}
    for m in matrices:
        if space is not None and all(axis.parameter != m.parameter for axis in space.axes):  # neither reads nor writes the stream
            continue
        if needs and found[m.name].tokens == 0:  # an expert that no token reached
            continue
        score_RC = criterion.score(m.view(block).float(), found[m.name])
        score_D = score_RC.sum(0 if space is None or reads(space, m) else 1, dtype=torch.float64).cpu()
        scores[m.parameter] = scores.get(m.parameter, 0) + score_D
    return [score_D / score_D.sum() for score_D in scores.values() if float(score_D.sum()) > 0]


def space_of(structure: Structure, index: int) -> Space:
    """The residual channels of a block."""
    return next(space for space in structure.spaces[index] if space.pattern == "hidden")


def reads(space: Space, matrix: Matrix) -> bool:
    """Whether a matrix's columns are residual channels, rather than its rows."""
    columns = (0 if matrix.transposed else 1) + (matrix.expert is not None)
    return any(axis.parameter == matrix.parameter and axis.dim == columns for axis in space.axes)


def width_pruner(work: Work, stream: Reshaped, asked: dict[str, float], criterion: str, records: Records, listen: Listener) -> WidthPruner:
    """The pruner of the channels that are chosen now, or were by an earlier process; ``stream`` shows the model without the others."""
    choice = records.read("choice")
    if choice is None:
        choice = choose_width(work, stream, stream.structure.width_at(asked), listen)
        records.write("choice", choice)
    stream.width = torch.tensor(choice["kept"])
    return WidthPruner(work.plan, stream.structure, work.matrices, asked, choice)


@dataclass(frozen=True)
class WidthPruner:
    """Zeroes the dropped residual channels in every block, and repairs the rest of it; the stream zeroes them outside the blocks.

    matrices: those to repair, block by block, and the head if it is not tied. choice: the result of ``choose_width``.
    """

    plan: Plan
    structure: Structure
    matrices: dict[int, list[Matrix]]
    asked: dict[str, float]
    choice: Mapping[str, Any]

    @property
    def places(self) -> Sequence[int]:
        return list(self.matrices)

    @property
    def wants_dense(self) -> bool:
        return True

    @property
    def accept_damage(self) -> bool:
        return self.plan.accept_damage

    @property
    def _keeps(self) -> Keeps:
        return {"hidden": torch.tensor(self.choice["kept"])}

    def take_over(self, index: int, report: BlockReport) -> None:
        """The stream knows the kept channels."""

    def prune(self, flow: Flow, dense: Flow | None, index: int, block: nn.Module, clock: Clock) -> PrunedBlock:
        assert dense is not None
        path, tokens = flow.stream.path_of(index), sum(ids_NL.numel() for ids_NL in flow.ids)
        outputs: Iterable[tuple[Tensor, Tensor]] = ()
        if index < len(flow.stream.names):
            changed, notes = self._narrow(flow, dense, index, block, clock)
            outputs = run_again(flow, dense, index, block)
        else:
            corrects = self.plan.asymmetric and self.matrices[index]
            changed, notes = self._corrected(flow, dense, index, block, clock) if corrects else ([], ())
        row = row_of(self.structure, path, self.asked, self.choice, tokens)
        return PrunedBlock(with_notes([row], notes), changed, changed, outputs)

    def finish(self, dense: Flow | None, listen: Listener) -> None:
        """Nothing remains to be done."""

    def _narrow(self, flow: Flow, dense: Flow, index: int, block: nn.Module, clock: Clock) -> tuple[list[str], tuple[str, ...]]:
        """Run both paths through a block; its outputs are left in their ``outputs``. (names of the changed parameters, notes)."""
        keeps = self._keeps
        if self.plan.asymmetric:
            changed, notes = self._corrected(flow, dense, index, block, clock)
            return list(dict.fromkeys(changed + self.structure.mask(index, block, keeps))), notes
        for batch in range(len(dense)):
            dense.outputs[batch] = dense.run(index, block, batch)
        changed = self.structure.mask(index, block, keeps)
        for batch in range(len(flow)):
            flow.outputs[batch] = flow.run(index, block, batch)
        return changed, ()

    def _corrected(self, flow: Flow, dense: Flow, index: int, block: nn.Module, clock: Clock) -> tuple[list[str], tuple[str, ...]]:
        """Correct the matrices of a block, or the head, towards the dense path's outputs, stage by stage. (names of their parameters, notes)."""
        changed: list[Matrix] = []
        lost_zeros = 0
        written = written_axes(self.structure, index, block) if index < len(flow.stream.names) else None
        with closing(stages_of(flow, dense, index, block, self.matrices[index], self.plan, clock, {})) as stages:
            for stage, statistics in stages:
                lost_zeros += sum(correct(flow.stream, index, block, m, statistics.pop(m.name, Stats())) for m in stage)
                changed += stage
                # the dense path is done; the pruned one has not reached the writers of the stream. Its readers are still to be corrected, all at once
                if written is not None:
                    mask_block(block, [written], self._keeps)
                clock.lap("solve")
        return [m.parameter for m in changed], notes_on_filled(lost_zeros, sum(m.rows * m.columns for m in changed))


def written_axes(structure: Structure, index: int, block: nn.Module) -> Space:
    """The residual channels of a block, where they are written."""
    space = space_of(structure, index)
    readers = {m.parameter for m in block_matrices(block) if reads(space, m)}
    return replace(space, axes=tuple(axis for axis in space.axes if axis.parameter not in readers))


def row_of(structure: Structure, path: str, asked: dict[str, float], choice: Mapping[str, Any], tokens: int) -> Row:
    """The same channels for all blocks and for the tensors outside them, which the row after the last block represents."""
    name, units, kept = f"{path}.hidden", structure.outer_units, tuple(choice["kept"])
    size = structure.cut[name].size if name in structure.cut else structure.outside
    return Row(name, units, size // units, next(iter(asked.values())), 0, choice["lost"], tokens, (), None, "hidden", units, kept, size)
