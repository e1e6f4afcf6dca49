"""A checked request as values: what the pruners need to prune any model.

Shapes: N = windows, L = tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.model.matrices import Matrix
from llmprune.statistics.gradients import LossGradients
from llmprune.stream.stream import Stream
from llmprune.structured.structure import Structure
from llmprune.types import Allocation, BlockSolver, Criterion, Pattern, Solver, Stat, TriedAllocation


@dataclass(frozen=True)
class Plan:
    """How a model is pruned. Exactly one of ``pattern`` (shapes of zeros) and ``structure`` (units that are cut out) is given."""

    criterion: Criterion | None
    pattern: Pattern | None
    solver: Solver
    allocation: Allocation | TriedAllocation
    sparsity: float
    structure: Structure | None = None
    asymmetric: bool = False  # prune towards the dense path's outputs, stage by stage (llmprune.maths.asymmetric_target)
    reconstruct: BlockSolver | None = None  # trains every block once its matrices are pruned
    permute: bool = False  # reorder input channels so that N:M holds more
    polish_steps: int = 0  # of distillation of the whole pruned model
    mixed_precision: bool = True  # of training steps, where the device is faster so (llmprune.maths.mixed_precision)
    accept_damage: bool = False
    mean_bias: bool = False  # biases compensate for the means of dropped inputs
    seed: int = 0  # of everything that is drawn at random
    ours: bool = True  # not a paper's own recipe: statistics of few tokens are trusted less

    @property
    def needs(self) -> frozenset[Stat]:
        own: frozenset[Stat] = self.criterion.needs if self.criterion else frozenset()
        target: frozenset[Stat] = frozenset({"gram"} if self.asymmetric else ())
        means: frozenset[Stat] = frozenset({"input_sum"} if self.mean_bias else ())
        return own | self.solver.needs | target | means

    @property
    def output_metric(self) -> bool:
        """Whether blocks are trained in the metric of the loss's gradients at their outputs: where such gradients are taken anyway."""
        return self.reconstruct is not None and "grad_out_gram" in self.needs

    def pattern_of(self, matrix: str, ratio: float) -> Pattern:
        """The pattern of one matrix, by its full name, at a ratio: units of one structure differ from matrix to matrix."""
        if self.structure is not None:
            return self.structure.units_of(matrix)
        assert self.pattern is not None
        return self.pattern.at(ratio)


@dataclass(frozen=True)
class Work:
    """One model, its calibration windows, and how it is pruned.

    matrices: of each block, and of the head, that are pruned; for a structure those that read units. gradients: of the dense model, where the plan
    or its allocation asks for some.
    """

    stream: Stream
    windows_NL: Tensor
    plan: Plan
    matrices: dict[int, list[Matrix]]
    gradients: LossGradients | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The base of each ratio, by full name: weights of a matrix, or parameters of the units of a structure."""
        if self.plan.structure is not None:
            return self.plan.structure.sizes
        return {self.name_of(i, m): m.rows * m.columns for i, ms in self.matrices.items() for m in ms}

    def name_of(self, index: int, matrix: Matrix) -> str:
        """The full name of a matrix."""
        return f"{self.stream.path_of(index)}.{matrix.name}"
