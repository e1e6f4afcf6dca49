"""The peak memory of a run, from metadata alone: printed before it starts, and refused where it cannot fit.

A run has phases, each with its own terms; the plan is that of the largest. Bytes; the libraries themselves are not counted.

Shapes: N = windows, L = tokens of a window, B = windows of a micro-batch, D = hidden width, V = vocabulary, R, C = rows, columns of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmprune.benchmark.memory import resident
from llmprune.data.windows import RunData
from llmprune.errors import RequestError
from llmprune.evaluation.perplexity import TARGETS_AT_ONCE
from llmprune.evaluation.sample import MOST_BYTES
from llmprune.export.check import fits, need
from llmprune.maths.coupled_rows import rows_together
from llmprune.methods import trait
from llmprune.model.kinds import values_per_token
from llmprune.model.matrices import Matrix
from llmprune.model.skeleton import count_parameters
from llmprune.pruners.distillation import BYTES_PER_WEIGHT
from llmprune.pruners.plan import Plan
from llmprune.ratios.measured import needs_of, windows_graded
from llmprune.statistics.gradient_taps import LARGE
from llmprune.statistics.gradients import GRADIENTS, shape_at
from llmprune.statistics.stages import GRAM_SHARE
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.flow import TOKENS_PER_BATCH
from llmprune.stream.hidden_states import memory_of
from llmprune.stream.stream import Stream
from llmprune.stream.whole import WholeStream
from llmprune.types import STATISTICS

FLOAT = 4
STEADY = 60 << 20  # threads, buffers of the libraries' products, the run's own small objects


@dataclass(frozen=True)
class Phase:
    """What is held at one time: terms by name, in bytes."""

    name: str
    terms: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    def largest(self, count: int = 2) -> str:
        """The largest terms, in words."""
        ordered = sorted(self.terms.items(), key=lambda item: -item[1])[:count]
        return " and ".join(f"{name} {in_units(size)}" for name, size in ordered)


@dataclass(frozen=True)
class Footprint:
    """The phases of a run, and the bytes that this process may allocate."""

    phases: tuple[Phase, ...]
    limit: int
    spilled: int  # bytes of hidden states, gradients and the like that are kept in files
    apart: str  # what is not in the phases

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    def __str__(self) -> str:
        spilled = f"; {in_units(self.spilled)} are kept in files" if self.spilled else ""
        return (
            f"memory: {in_units(self.peak.total)} at most, while it {self.peak.name} ({self.peak.largest(3)}); {in_units(self.limit)} free{spilled}; "
            f"not counted: {self.apart}"
        )

    def check(self) -> None:
        """Raises RequestError when the run cannot fit."""
        if self.peak.total > self.limit:
            raise RequestError(
                f"memory: {in_units(self.peak.total)} are needed while it {self.peak.name}, {in_units(self.limit)} are free; "
                f"the largest terms are {self.peak.largest()}",
                "take a method that needs less (wanda, magnitude), shorter windows, or a machine with more memory",
            )


def in_units(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def footprint(stream: Stream, plan: Plan, matrices: dict[int, list[Matrix]], data: RunData) -> Footprint:
    """The plan of a run that starts now."""
    if plan.structure is not None and plan.asymmetric:  # unpruned matrices compensate for the others
        matrices = {i: plan.structure.repaired(i, block) for i, block in enumerate(stream.walk.blocks)}
    return _Estimate(stream, plan, matrices, data, memory_of(stream.device_of(0))).footprint()


@dataclass(frozen=True)
class _Estimate:
    stream: Stream
    plan: Plan
    matrices: dict[int, list[Matrix]]
    data: RunData
    limit: int

    def footprint(self) -> Footprint:
        phases, spilled = [], 0
        steady = {"buffers": STEADY} | ({"pictures": seen} if (seen := self.pictures()) else {})
        for name, terms, waiting in self.phases():
            held = {what: count * size for what, (count, size) in waiting.items() if 4 * size < self.limit}  # as stream.place_hidden decides
            spilled = max(spilled, sum(count * size for count, size in waiting.values()) - sum(held.values()))
            phases.append(Phase(name, steady | terms | held))
        return Footprint(tuple(phases), self.limit, spilled + sum(self.gradients()), self.apart())

    def apart(self) -> str:
        """What this process holds already, and what may hold the whole model."""
        size, dtype = count_parameters(self.stream.walk.model), self.stream.walk.model.dtype
        found = [f"Python and its libraries ({in_units(resident())} now)"]
        if size * dtype.itemsize <= MOST_BYTES:
            found.append(f"the whole model for a sample of text ({in_units(size * dtype.itemsize)})")
        if fits(size, dtype):
            found.append(f"a process that loads the result ({in_units(need(size, dtype))})")
        return ", ".join(found)

    def phases(self) -> Iterator[tuple[str, dict[str, int], dict[str, tuple[int, int]]]]:
        """(name, what has to be in memory, what may be kept in files as (count, size)) of every phase."""
        answers = {"hidden states of the evaluation": (1, self.evaluated())}
        towers = bool(self.pictures())
        yield "reads the embeddings", {"embeddings and head": self.outer(True, towers)}, {"hidden states": (1, self.hidden())}
        yield "measures perplexities", {"embeddings and head": self.outer(), "logits": self.logits()}, answers
        flows = 4 if self.plan.asymmetric else 2
        block = {"a block's weights": self.block(), "activations": self.activations()}
        waiting = answers | {"hidden states": (flows, self.hidden()), "the dense path's inputs": (1, self.kept())}
        yield "prunes a block", block | self.statistics(), waiting
        if needs := needs_of(self.plan) & GRADIENTS:
            backward = {"activations": 4 * self.activations(), "gradients of a block": max(self.gradients(), default=0)}
            windows_NL = self.data.calibration.ids_NL
            hidden = self.hidden() * windows_graded(windows_NL, needs) // len(windows_NL)
            entered = len(self.stream.names) * hidden // 2  # of two, as statistics.gradients places them
            yield "takes gradients", block | backward, answers | {"hidden states": (3, hidden), "inputs of the blocks": (2, entered)}
            yield (
                "takes the loss's gradient",
                {"embeddings and head": self.outer(), "logits": 2 * self.logits()},
                {"hidden states": (1, hidden), "inputs of the blocks": (2, entered)},
            )
        if self.plan.polish_steps:
            yield "distills the whole model", {"weights and their moments": BYTES_PER_WEIGHT * count_parameters(self.stream.walk.model)}, {}

    # what is held -----------------------------------------------------------------------------------------------------------------------------

    @property
    def item(self) -> int:
        return self.stream.walk.model.dtype.itemsize

    @property
    def config(self) -> Any:
        return self.stream.walk.model.config.get_text_config(decoder=True)

    def block(self) -> int:
        if isinstance(self.stream, WholeStream):  # all blocks are there all the time
            return self.item * count_parameters(self.stream.walk.model)
        return self.item * max(sum(p.numel() for p in block.parameters()) for block in self.stream.walk.blocks)

    def outer(self, loading: bool = False, towers: bool = False) -> int:
        """The tensors outside the blocks; while they are read, its largest tensor in both dtypes. towers: with those that text does not pass."""
        inside = {id(p) for p in self.stream.walk.blocks.parameters()}
        apart = tuple(self.stream.towers) if isinstance(self.stream, CheckpointStream) and not towers else ()
        found = self.stream.walk.model.named_parameters()
        sizes = [p.numel() for name, p in found if id(p) not in inside and not name.startswith(apart)]
        return self.item * sum(sizes) + (self.item * max(sizes) if loading else 0)

    def hidden(self) -> int:
        """Hidden states of all calibration windows, once."""
        return self.data.calibration.ids_NL.numel() * values_per_token(self.config) * self.item

    def evaluated(self) -> int:
        return sum(w.ids_NL.numel() for w in self.data.evaluation) * values_per_token(self.config) * self.item

    def pictures(self) -> int:
        """What is seen with all windows."""
        return sum(t.nbytes for w in self.data.all() for seen in w.seen if seen for t in seen.inputs.values())

    def logits(self) -> int:
        """Of one window: the dense model's and the pruned model's, and some targets at a time in float32."""
        length = max(w.ids_NL.shape[1] for w in self.data.all())
        vocabulary = self.config.vocab_size
        return vocabulary * (2 * length * self.item + 4 * FLOAT * min(TARGETS_AT_ONCE, length))

    def tokens_at_once(self) -> int:
        length = self.data.calibration.ids_NL.shape[1]
        device = self.stream.device_of(0).type
        return min(max(1, TOKENS_PER_BATCH.get(device, 2048) // length), len(self.data.calibration.ids_NL)) * length

    def activations(self) -> int:
        """Of one micro-batch in one block: the inputs and outputs of its matrices."""
        widest = max((sum({m.columns for m in ms}) + max(m.rows for m in ms) for ms in self.matrices.values() if ms), default=0)
        return 2 * self.tokens_at_once() * widest * self.item

    def kept(self) -> int:
        """The inputs of every stage of a block on the dense path, and the partners of its outputs."""
        if not self.plan.asymmetric:
            return 0
        tokens = self.data.calibration.ids_NL.numel()
        widest = max((sum(columns for columns, _ in inputs_of(ms)) for ms in self.matrices.values() if ms), default=0)
        return tokens * (widest + 2 * values_per_token(self.config)) * self.item

    def gradients(self) -> list[int]:
        """Of each block's matrices, and of its outputs; one block's are in memory, all are kept in a file."""
        asked = [STATISTICS[stat].name for stat in self.plan.needs & LARGE]
        width = self.config.hidden_size if self.plan.output_metric else 0
        outputs = FLOAT * width * rows_together(width) if width else 0
        return [outputs + FLOAT * sum(math.prod(shape_at(name, m)) for m in ms for name in asked) for ms in self.matrices.values()]

    # statistics and solving -------------------------------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, int]:
        found = [self.statistics_of(ms) for ms in self.matrices.values() if ms]
        return max(found, key=lambda terms: sum(terms.values()), default={})

    def statistics_of(self, matrices: list[Matrix]) -> dict[str, int]:
        inputs = inputs_of(matrices)
        solving = max(self.work(m) for m in matrices)
        if "gram" not in self.plan.needs:
            return {"scores": solving}
        if not self.plan.asymmetric:
            return {"Gram matrices": self.at_most([FLOAT * columns**2 for columns, _ in inputs]), "solver": solving}
        # stage by stage; the experts of a stack are one stage
        stacks: dict[int, list[int]] = {}
        for columns, of_expert in inputs:
            if of_expert:
                stacks.setdefault(columns, []).append(FLOAT * columns**2)
        single = [2 * FLOAT * columns**2 for columns, of_expert in inputs if not of_expert]
        return {"Gram matrices": max([*single, *(self.at_most(sizes) for sizes in stacks.values())]), "solver": solving}

    def at_most(self, sizes: list[int]) -> int:
        """Of Gram matrices that are wanted at the same time; where they are too large, some are left for another forward."""
        return max(max(sizes), min(sum(sizes), self.limit // GRAM_SHARE))

    def work(self, matrix: Matrix) -> int:
        """What the criterion and the solver hold of one matrix beside its Gram matrix."""
        a_square, a_weight = trait(self.plan.solver, "work")
        weights = matrix.rows * matrix.columns * a_weight
        side = max(matrix.columns, rows_together(matrix.rows)) if "grad_out_gram" in self.plan.needs else matrix.columns
        return max(a_square * side**2, KEPT_FACTOR * side**2 * (a_square > 0) + weights)


KEPT_FACTOR = 8  # bytes for every C^2 that are kept of a factorisation


def inputs_of(matrices: list[Matrix]) -> list[tuple[int, bool]]:
    """(columns, whether it is an expert's) of the inputs that the matrices do not share: neighbours in a module share theirs, except for
    the last, which writes into the stream.
    """
    by_module: dict[tuple[str, int | None], list[int]] = {}
    for m in {m.whole: m for m in matrices}.values():
        module = m.parameter if m.expert is not None else m.parameter.rpartition(".")[0].rpartition(".")[0]
        by_module.setdefault((module, m.expert), []).append(m.columns)
    found = []
    for (_, expert), columns in by_module.items():
        found += [(c, expert is not None) for c in (*dict.fromkeys(columns[:-1]), columns[-1])]
    return found
