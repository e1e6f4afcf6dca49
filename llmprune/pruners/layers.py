"""Whole blocks that go: those without which the model's predictions change least, measured anew after each.

Shapes: N = windows, L = tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from llmprune.errors import RequestError
from llmprune.evaluation.divergence import after_blocks, divergences
from llmprune.maths.counts import least_needed
from llmprune.maths.scores import Mean, block_influence
from llmprune.pruners.errors import output_error, run_again, run_finished
from llmprune.pruners.weights import prune_block
from llmprune.results import BlockReport, Row
from llmprune.stream.clock import Clock
from llmprune.stream.flow import Flow
from llmprune.stream.reshaped import Reshaped
from llmprune.structured.layers import attends
from llmprune.structured.structure import Structure
from llmprune.types import Plan

Order = Literal["measured", "block_influence"]
WINDOWS = 16  # on which blocks are left out for trial


def layers_to_drop(structure: Structure, sparsity: float, exact: bool) -> int:
    """How many blocks a ratio means. Raises RequestError for none, for all, and for a ratio that no number gives, if it was asked for itself."""
    total = len(structure.blocks)
    count = round(sparsity * total)
    legal = ", ".join(f"{n / total:.4g} ({total - n} stay)" for n in range(1, min(total, 9)))
    if sparsity and (not 0 < count < total or (exact and abs(count - sparsity * total) > 0.01 * total)):
        raise RequestError(f"layers at sparsity {sparsity:g}: {sparsity * total:.4g} of {total} would go", f"legal sparsities: {legal}")
    return count


@torch.no_grad()
def choose_layers(
    stream: Reshaped, windows_NL: Tensor, count: int, order: Order, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[int, float]:
    """The blocks that go, in the order in which they went, with what each has cost: mean KL from the dense model of all that have gone so far, or
    (block_influence) how far the block turned the hidden states.
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
    gone: dict[int, float] = {}
    for _ in range(count):
        assert dense is not None
        costs = without_each(stream, windows_NL, frozenset(gone), dense)
        least = least_of(costs, stream, gone)
        gone[least] = costs[least]
        progress(len(gone), count)
    return gone


def least_of(costs: dict[int, float], stream: Reshaped, gone: Iterable[int]) -> int:
    """The cheapest block whose going leaves one with attention."""
    left = set(range(len(stream.names))) - set(gone)
    fixed = [index for index in costs if not attends(stream.structure.config, left - {index})]
    return least_needed(costs, 1, fixed)[0]


def without_each(stream: Reshaped, windows_NL: Tensor, gone: frozenset[int], dense: Flow) -> dict[int, float]:
    """The divergence from the dense model without ``gone`` and one more block, for each that is left. Every block is loaded once."""
    flow = Flow(stream, windows_NL)
    twins: dict[int, Flow] = {}
    for index in range(len(stream.names)):
        if index in gone:
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
                flow.outputs[batch] = flow.run(index, block, batch)
                mean += block_influence(flow.hidden[batch], flow.outputs[batch])
        flow.advance()
        found[index] = mean.value
    return found


@torch.no_grad()
def repair(
    stream: Reshaped,
    windows_NL: Tensor,
    plan: Plan,
    reports: list[BlockReport],
    finished: Mapping[int, BlockReport] = MappingProxyType({}),
    on_block: Callable[[int, BlockReport, dict[str, str]], None] = lambda index, report, hashes: None,
) -> list[BlockReport]:
    """Bring the matrices of the blocks that stay nearer to the dense path's outputs, so that they make up for those that have gone."""
    flow = Flow(stream, windows_NL)
    dense = flow.twin()
    repaired = []
    for index, report in enumerate(reports):
        if index in stream.gone:
            with stream.block(index, dense=True) as block:
                dense.through(index, block)
            if index not in finished:
                on_block(index, report, {})
        elif index in finished or index < min(stream.gone):  # before the first that goes there is nothing to make up for
            run_finished(flow, dense, index)
            if index not in finished:
                on_block(index, report, {})
            report = finished.get(index, report)
        else:
            clock = Clock()
            with stream.block(index) as block:
                matrices = stream.structure.repaired(index, block)
                _, changed = prune_block(flow, dense, index, block, matrices, plan, {}, None, clock)
                hashes = stream.keep(index, changed)
                clock.lap("write")
                error = output_error(run_again(flow, dense, index, block), report.block, plan)
            names = tuple(f"{report.block}.{name}" for name in changed)
            report = replace(report, output_error=error, changed=names, seconds=clock.seconds)
            on_block(index, report, hashes)
        repaired.append(report)
    return repaired


def layer_reports(stream: Reshaped, structure: Structure, gone: dict[int, float], sparsity: float) -> list[BlockReport]:
    """One row a block: it stays or goes as a whole."""
    reports = []
    for index, name in enumerate(stream.names):
        kept = () if index in gone else (0,)
        size = structure.blocks[index]
        row = Row(name, 1, size, sparsity, 0, gone.get(index), 0, (), None, "layers", 1, kept, size)
        reports.append(BlockReport(name, 0.0, (row,)))
    return reports
