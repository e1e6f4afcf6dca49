"""Patterns that drop whole layers, experts or residual channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from llmprune.model.matrices import Matrix
from llmprune.pruners.experts import prune_experts
from llmprune.pruners.hidden import OnBlock, choose_width, narrow
from llmprune.pruners.layers import Order, choose_layers, layer_reports, layers_to_drop, repair
from llmprune.results import BlockReport
from llmprune.statistics.gradients import LossGradients
from llmprune.stream.reshaped import Reshaped
from llmprune.structured.structure import Structure
from llmprune.types import Plan


def coarse_blocks(
    shown: Reshaped,
    structure: Structure,
    plan: Plan,
    matrices: dict[int, list[Matrix]],
    ids_NL: Tensor,
    criterion: str | None,
    asked: dict[str, float],
    gradients: LossGradients | None,
    finished: Mapping[int, BlockReport] = MappingProxyType({}),
    on_block: OnBlock = lambda index, report, hashes: None,
    choice: tuple[dict[str, Any] | None, Callable[[dict[str, Any]], None]] = (None, lambda record: None),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[BlockReport]:
    """Let whole layers, experts or residual channels go, and tell ``shown`` of them. choice: what an earlier process has chosen, and what is told
    of the choice.
    """
    if structure.name == "experts":
        return prune_experts(shown, ids_NL, plan, structure, asked, finished, on_block)
    record, write = choice
    if structure.name == "hidden":
        if record is None:
            record = choose_width(shown, ids_NL, plan, matrices, structure.width_at(asked), gradients, progress)
            write(record)
        return narrow(shown, ids_NL, plan, matrices, asked, record, finished, on_block)
    if record is None:
        count = layers_to_drop(structure, plan.sparsity, structure.exact)
        order: Order = "block_influence" if criterion == "block_influence" else "measured"
        record = {"gone": [[index, cost] for index, cost in choose_layers(shown, ids_NL, count, order, progress).items()]}
        write(record)
    gone = {int(index): cost for index, cost in record["gone"]}
    shown.gone = frozenset(gone)
    reports = layer_reports(shown, structure, gone, plan.sparsity)
    return repair(shown, ids_NL, plan, reports, finished, on_block) if gone and plan.asymmetric else reports
