"""Experts: those that add least to the tokens that are routed to them are dropped, in every block as many as its ratio says.

Score of an expert: the mean over its tokens of gate weight times ||expert(x)||_2. Lasby et al., REAP the Experts, https://arxiv.org/abs/2510.13999;
there on the unpruned model, here on the outputs of the blocks already pruned.

Shapes: T = tokens, E = experts, P = experts per token, D = hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.maths.linalg import drop_smallest
from llmprune.maths.scores import Mean, routed_norm
from llmprune.methods import trait
from llmprune.pruners.block_pruner import PrunedBlock, run_again
from llmprune.pruners.gate_scale import gate_scale, writers_of
from llmprune.pruners.plan import Plan, Work
from llmprune.results import BlockReport, Row
from llmprune.stream.clock import Clock
from llmprune.stream.flow import Flow
from llmprune.stream.reshaped import Reshaped
from llmprune.structured.spaces import Space
from llmprune.structured.structure import Cuttable
from llmprune.types import Listener, Records

FEW = 64  # tokens of an expert, below which its score is uncertain


class Routed:
    """While active, records what each expert of a stack adds to its tokens."""

    def __init__(self, experts: nn.Module, count: int) -> None:
        self._experts = experts
        self.means = [Mean() for _ in range(count)]
        self.tokens = 0
        self._handle: Any = None

    def __enter__(self) -> Routed:
        self._handle = self._experts.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _note(self, experts: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        hidden, index_TP, gate_TP = (*args, *kwargs.values())
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        self.tokens += len(hidden_TD)
        self._handle.remove()  # the experts run once more, each with its own tokens
        for expert in range(len(self.means)):
            token_N, place_N = torch.where(index_TP == expert)
            if len(token_N):
                # some families' gates have a column for every expert, others one for every choice
                gate_N = gate_TP[token_N, place_N if gate_TP.shape == index_TP.shape else expert]
                self.means[expert] += routed_norm(gate_N, self._alone(expert, hidden_TD[token_N]))
        self.__enter__()

    def _alone(self, expert: int, hidden_ND: Tensor) -> Tensor:
        index_N1 = torch.full((len(hidden_ND), 1), expert, device=hidden_ND.device)
        out: Tensor = self._experts(hidden_ND, index_N1, torch.ones_like(index_N1, dtype=hidden_ND.dtype))
        return out.reshape(hidden_ND.shape)

    @property
    def score_E(self) -> Tensor:
        return torch.tensor([mean.value for mean in self.means], dtype=torch.float64)


def expert_pruner(work: Work, stream: Reshaped, asked: dict[str, float], criterion: str, records: Records, listen: Listener) -> ExpertPruner:
    """The pruner; ``stream`` shows the model without the experts that it has dropped."""
    return ExpertPruner(work.plan, stream, asked)


@dataclass(frozen=True)
class ExpertPruner:
    """Chooses the experts that are kept in every block, and has the stream show the block without the others to the next one.

    asked: the ratio of each stack of experts, by full name.
    """

    plan: Plan
    stream: Reshaped
    asked: dict[str, float]

    @property
    def places(self) -> Sequence[int]:
        return range(len(self.stream.names))

    @property
    def wants_dense(self) -> bool:
        return False

    @property
    def accept_damage(self) -> bool:
        return self.plan.accept_damage

    def take_over(self, index: int, report: BlockReport) -> None:
        self._show(index, report.rows)

    def prune(self, flow: Flow, dense: Flow | None, index: int, block: nn.Module, clock: Clock) -> PrunedBlock:
        cuts = {name: cut for name, cut in self.stream.structure.cut.items() if cut.block == index}
        rows = [choose(flow, index, block, cut.space, name, self.asked[name], cut.size) for name, cut in cuts.items()]
        clock.lap("solve")
        if not rows:
            flow.through(index, block)
            return PrunedBlock((), (), (), ())
        self._show(index, rows)
        if index not in self.stream.keeps:
            return PrunedBlock(rows, (), (), run_again(flow, None, index, block))
        changed: list[str] = []
        if trait(self.plan.solver, "repairs"):
            rows, changed = self._rescaled(flow, index, block, rows, cuts)
            clock.lap("solve")
        return PrunedBlock(rows, changed, changed, run_again(flow, None, index, self.stream.rebuilt(index, block)))

    def _rescaled(self, flow: Flow, index: int, block: nn.Module, rows: list[Row], cuts: dict[str, Cuttable]) -> tuple[list[Row], list[str]]:
        """(the rows with the scales of their stacks' gates, names of the parameters that these are folded into)."""
        smaller, changed, noted = self.stream.rebuilt(index, block), list[str](), list[Row]()
        for row in rows:
            stack = cuts[row.matrix].space.name
            if stack not in self.stream.keeps[index]:
                noted.append(row)
                continue
            scale = gate_scale(flow, index, block, smaller, stack)
            experts = block.get_submodule(stack)
            names = writers_of(experts, row.matrix, flow.hidden[0].shape[-1])
            for name in names:
                weight = experts.get_parameter(name)
                stored = self.stream.stored_dtype(index, f"{stack}.{name}")
                weight.data.copy_((weight.data.float() * scale).to(stored))
            changed += [f"{stack}.{name}" for name in names]
            noted.append(replace(row, notes=(*row.notes, f"gates scaled by {scale:.4g}, folded into {names[0]}")))
        return noted, changed

    def finish(self, dense: Flow | None, listen: Listener) -> None:
        """Nothing remains to be done."""

    def _show(self, index: int, rows: Sequence[Row]) -> None:
        keeps = self.stream.structure.keeps(rows)[index]
        if keeps:
            self.stream.keeps[index] = keeps


def choose(flow: Flow, index: int, block: nn.Module, space: Space, name: str, ratio: float, size: int) -> Row:
    """The kept experts of one stack. The outputs of the whole block are left in ``flow.outputs``."""
    routed = ranked(flow, index, block, space)
    drop = round(ratio * space.units)
    kept = tuple(kept_after(routed.score_E, space, drop).tolist())
    notes = few_tokens([mean.tokens for mean in routed.means]) if drop else ()
    return Row(name, space.units, size // space.units, ratio, 0, None, routed.tokens, notes, None, "experts", space.units, kept, size)


def ranked(flow: Flow, index: int, block: nn.Module, space: Space) -> Routed:
    """What each expert of a stack adds to its tokens. The outputs of the whole block are left in ``flow.outputs``."""
    with Routed(block.get_submodule(space.name), space.units) as routed:
        for batch in range(len(flow)):
            flow.outputs[batch] = flow.run(index, block, batch)
    return routed


def kept_after(score_E: Tensor, space: Space, drop: int) -> Tensor:
    """Numbers of the experts that are kept when the ``drop`` least are dropped, equally many from each group."""
    return drop_smallest(score_E.view(space.groups, -1), drop // space.groups).flatten().nonzero().flatten()


def few_tokens(tokens_E: list[int]) -> tuple[str, ...]:
    """Notes about experts whose scores rest on little. tokens: that calibration has routed to each."""
    silent, few = tokens_E.count(0), [tokens for tokens in tokens_E if 0 < tokens < FEW]
    notes = [f"{silent} of {len(tokens_E)} experts were never chosen: they are dropped first"] if silent else []
    if few:
        notes.append(f"{len(few)} of {len(tokens_E)} experts saw fewer than {FEW} tokens, the least {min(few)}: give more --samples")
    return tuple(notes)
