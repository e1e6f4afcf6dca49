"""Run a pruned block again: the error of its output, and the inputs of the next block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from llmprune.errors import StoppedError
from llmprune.stream.flow import Flow
from llmprune.types import Plan

BLOWN_UP = 1.0  # relative squared output error above which a run stops unless told to accept it


def run_finished(flow: Flow, dense: Flow | None, index: int) -> None:
    """Take the hidden states through a block that an interrupted run has pruned already; nothing comes after the head."""
    if index == len(flow.stream.names):
        return
    if dense is not None:
        with flow.stream.block(index, dense=True) as block:
            dense.through(index, block)
    with flow.stream.block(index) as block:
        flow.through(index, block)


def output_error(pairs: Iterable[tuple[Tensor, Tensor]], name: str, plan: Plan) -> float:
    """Relative squared error over (unpruned, pruned) outputs. Raises StoppedError when it is not finite, or destroys what goes on."""
    wrong = total = 0.0
    for dense, pruned in pairs:
        total += float(dense.float().square().sum(dtype=torch.float64))
        wrong += float((dense.float() - pruned.float()).square().sum(dtype=torch.float64))
    error = wrong / total if total else 0.0
    if not math.isfinite(error):
        raise StoppedError(f"{name}: its output is not finite", "compute in --dtype float32")
    if error > BLOWN_UP and not plan.accept_damage:
        raise StoppedError(
            f"{name}: relative output error {error:.3g} after pruning, above {BLOWN_UP:g}",
            "ask for less sparsity or a better method; --accept-damage goes on",
        )
    return error


def run_again(flow: Flow, dense: Flow | None, index: int, block: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(unpruned, pruned) outputs of every micro-batch, on the pruned path's inputs or of the two paths; then on to the next block."""
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
