"""Units of a block: channels, heads, KV groups, kernels. The columns that read them are dropped as a pattern; then everything else of them is zeroed.

The zeros are cut out of the checkpoint at the end (``llmprune.export``).
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace

from torch import Tensor, nn

from llmprune.maths.least_squares import mean_bias
from llmprune.model.matrices import LEFT_ALONE, Matrix, block_matrices
from llmprune.pruners.block_pruner import InPlacePruner, PrunedBlock, run_again
from llmprune.pruners.distillation import polish
from llmprune.pruners.matrix import correct, notes_on_filled, prune_matrix, with_notes
from llmprune.pruners.plan import Plan
from llmprune.pruners.reconstruction import reconstruct_block
from llmprune.pruners.unit_scores import beside, counts_writers
from llmprune.pruners.weights import aim_of, stages_of
from llmprune.results import Row
from llmprune.statistics.gradients import LossGradients
from llmprune.stream.clock import Clock
from llmprune.stream.flow import Flow
from llmprune.stream.stream import Stream
from llmprune.structured.structure import Structure
from llmprune.types import Listener, Stats


@dataclass(frozen=True)
class UnitPruner(InPlacePruner):
    """Drops whole units. matrices: those of each block that read units. asked: the ratio of each reader, by full name. gradients: of the dense model,
    where the plan asks for some.
    """

    plan: Plan
    structure: Structure
    matrices: dict[int, list[Matrix]]
    asked: dict[str, float]
    gradients: LossGradients | None = None

    def prune(self, flow: Flow, dense: Flow | None, index: int, block: nn.Module, clock: Clock) -> PrunedBlock:
        readers, aim = self.matrices[index], aim_of(self.plan, dense, index, block)
        rows, changed = self._by_stages(flow, aim, index, block, clock)
        changed += self._mask(flow, aim, index, block, rows)
        if self.plan.reconstruct is not None:
            rows, trained = reconstruct_block(flow, aim, index, block, trained_matrices(block, readers), rows, self.plan, self.gradients)
            changed += trained
            clock.lap("solve")
        stored = list(dict.fromkeys([m.parameter for m in readers] + changed))
        others = stored[len({m.parameter for m in readers}) :]
        return PrunedBlock(rows, stored, others, run_again(flow, aim, index, block))

    def finish(self, dense: Flow | None, listen: Listener) -> None:
        if dense is not None and self.plan.polish_steps:
            blocks = dense.stream.walk.blocks
            polish(dense, {i: trained_matrices(blocks[i], ms) for i, ms in self.matrices.items()}, self.plan, listen)

    def _by_stages(self, flow: Flow, aim: Flow | None, index: int, block: nn.Module, clock: Clock) -> tuple[list[Row], list[str]]:
        """(a row for each reader, names of other changed parameters)."""
        path = flow.stream.path_of(index)
        touched = self._touched(index, block)
        rows: dict[str, Row] = {}
        changed: list[str] = []
        lost_zeros = weights = 0
        with closing(stages_of(flow, aim, index, block, touched, self.plan, clock, {})) as stages:
            for stage, statistics in stages:
                repaired = [m for m in stage if f"{path}.{m.name}" not in self.asked]
                lost_zeros += sum(correct(flow.stream, index, block, m, statistics.pop(m.name)) for m in repaired)
                weights += sum(m.rows * m.columns for m in repaired)
                changed += [m.parameter for m in repaired]
                if self.gradients is not None:
                    self.gradients.add_to(index, statistics)
                for m in stage:
                    if m not in repaired:
                        rows[m.name], biases = self._prune_reader(flow.stream, index, block, m, statistics.pop(m.name))
                        changed += biases
                clock.lap("solve")
        return with_notes([rows[m.name] for m in touched if m.name in rows], notes_on_filled(lost_zeros, weights)), changed

    def _touched(self, index: int, block: nn.Module) -> list[Matrix]:
        """The readers; towards the dense path's outputs the other matrices are repaired too, once anything is dropped."""
        return self.structure.repaired(index, block) if self.plan.asymmetric and any(self.asked.values()) else self.matrices[index]

    def _prune_reader(self, stream: Stream, index: int, block: nn.Module, matrix: Matrix, stats: Stats) -> tuple[Row, list[str]]:
        name, plan = f"{stream.path_of(index)}.{matrix.name}", self.plan
        if plan.criterion is not None and counts_writers(plan.criterion):
            stats = replace(stats, beside_C=beside(self.structure, index, block, name, plan.criterion, self.gradients))
        before_RC = matrix.view(block).clone() if plan.mean_bias else None
        row = prune_matrix(stream, index, block, matrix, stats, plan, self.asked[name])
        return row, [make_up(stream, index, block, matrix, before_RC, stats)] if before_RC is not None and row.dropped else []

    def _mask(self, flow: Flow, aim: Flow | None, index: int, block: nn.Module, rows: list[Row]) -> list[str]:
        """Zero everything that belongs to the dropped units of a block; names of the changed parameters."""
        keeps = self.structure.keeps(rows)[index]
        changed = self.structure.mask(index, block, keeps)
        if aim is not None and self.structure.rescales(index, keeps):  # the block's outputs were computed before
            for batch in range(len(flow)):
                flow.outputs[batch] = flow.run(index, block, batch)
        return changed


def trained_matrices(block: nn.Module, readers: list[Matrix]) -> list[Matrix]:
    """The matrices to train: of a block with dropped units all except routers and the like."""
    return [m for m in block_matrices(block) if not LEFT_ALONE.search(m.name)] if readers else []


def make_up(stream: Stream, index: int, block: nn.Module, matrix: Matrix, before_RC: Tensor, stats: Stats) -> str:
    """Add to a matrix's bias the mean that its outputs have lost; the bias's name."""
    bias_R = block.get_parameter(matrix.bias)
    own_R = bias_R.data if matrix.expert is None else bias_R.data[matrix.expert]
    added_R = mean_bias(before_RC.float(), matrix.view(block).float(), stats)
    own_R.copy_((own_R + added_R).to(stream.stored_dtype(index, matrix.bias)))
    return matrix.bias
