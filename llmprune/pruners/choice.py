"""The pruner that a plan needs."""

from __future__ import annotations

from pkgutil import resolve_name

from llmprune.pruners.block_pruner import BlockPruner
from llmprune.pruners.coarse import COARSE
from llmprune.pruners.plan import Work
from llmprune.pruners.units import UnitPruner
from llmprune.pruners.weights import Variants, WeightPruner
from llmprune.stream.reshaped import Reshaped
from llmprune.types import Listener, Records


def fine_pruner(work: Work, asked: dict[str, float], variants: Variants | None = None) -> BlockPruner:
    """The pruner of weights or units. asked: the ratio of each matrix, by full name. variants: further ratios at which each is pruned on the side."""
    if work.plan.structure is None:
        return WeightPruner(work.plan, work.matrices, asked, work.gradients, variants)
    return UnitPruner(work.plan, work.plan.structure, work.matrices, asked, work.gradients)


def coarse_pruner(work: Work, stream: Reshaped, asked: dict[str, float], criterion: str, records: Records, listen: Listener) -> BlockPruner:
    """The pruner of layers, experts or the width. ``stream`` will show the model without them. criterion: by name. records: a choice by an earlier
    process is read from there, a choice made now is written there.
    """
    make = resolve_name(COARSE[stream.structure.name].pruner)
    pruner: BlockPruner = make(work, stream, asked, criterion, records, listen)
    return pruner
