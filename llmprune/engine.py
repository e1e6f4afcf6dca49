"""The whole of one-shot pruning: blocks in order, each pruned, stored, and run again so that the next one sees pruned inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmprune.pruners.block_pruner import BlockPruner, output_error, run_finished
from llmprune.results import BlockReport
from llmprune.stream.clock import Clock
from llmprune.stream.flow import Flow
from llmprune.stream.stream import Stream
from llmprune.types import Listener


@torch.no_grad()
def prune(stream: Stream, windows_NL: Tensor, pruner: BlockPruner, finished: Mapping[int, BlockReport], listen: Listener) -> list[BlockReport]:
    """Prune every block of a model on the outputs of the pruned blocks before it.

    windows_NL: token ids of the calibration windows. finished: reports of the blocks that an interrupted run has pruned; they are only run through.
    listen: hears of each newly pruned block once its tensors are stored.
    Raises StoppedError when statistics or outputs are not finite, or a block's output is destroyed.
    """
    flow = Flow(stream, windows_NL)
    dense = flow.dense_twin() if pruner.wants_dense else None
    reports = []
    for index in pruner.places:
        if index in finished:
            pruner.take_over(index, finished[index])
            run_finished(flow, dense, index)
            reports.append(finished[index])
            continue
        name = stream.path_of(index)
        with stream.block(index) as block:
            clock = Clock()
            done = pruner.prune(flow, dense, index, block, clock)
            hashes = stream.keep(index, done.stored)
            clock.lap("write")
            error = output_error(done.outputs, name, pruner.accept_damage)
            clock.lap("forward")
        changed = tuple(f"{name}.{parameter}" for parameter in done.changed)
        reports.append(BlockReport(name, error, tuple(done.rows), changed, clock.seconds))
        listen.on_block(index, reports[-1], hashes)
    del flow  # its hidden states have done their work
    pruner.finish(dense, listen)
    return reports
