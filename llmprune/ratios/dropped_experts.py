"""What each block loses without some of its experts, on the dense model: by this an allocation gives layers unequal numbers.

Shapes: K = numbers of dropped experts that are tried, N = windows, L = tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llmprune.pruners.block_pruner import output_error
from llmprune.pruners.experts import kept_after, ranked
from llmprune.stream.flow import Flow
from llmprune.stream.reshaped import Reshaped
from llmprune.stream.stream import Stream
from llmprune.structured.structure import Cuttable, Structure
from llmprune.types import Listener


def expert_errors(
    stream: Stream, structure: Structure, windows_NL: Tensor, levels: dict[str, tuple[float, ...]], listen: Listener
) -> dict[str, Tensor]:
    """[2, K] of each stack of experts, by full name: ratios, and the relative squared error of its block's outputs without so many of the least
    experts. The block is run as the cut leaves it, so its router chooses among the kept ones. levels: the ratios of each stack, ascending.
    """
    flow, shown, found = Flow(stream, windows_NL), Reshaped(stream, structure), {}
    for index in range(len(stream.names)):
        cuts = {name: cut for name, cut in structure.cut.items() if cut.block == index}
        with stream.block(index) as block:
            for name, cut in cuts.items():
                found[name] = error_curve(flow, shown, block, cut, levels[name], stream.path_of(index))
            if cuts:
                flow.advance()
            else:
                flow.through(index, block)
        listen.progress("allocation", index + 1, len(stream.names))
    return found


def error_curve(flow: Flow, shown: Reshaped, block: nn.Module, cut: Cuttable, levels: tuple[float, ...], path: str) -> Tensor:
    """[2, K] of one stack. The outputs of the whole block are left in ``flow.outputs``."""
    score_E = ranked(flow, cut.block, block, cut.space).score_E
    errors = []
    for ratio in levels:
        drop = round(ratio * cut.space.units)
        shown.keeps[cut.block] = {cut.space.name: kept_after(score_E, cut.space, drop)}
        errors.append(output_error(both_outputs(flow, cut.block, shown.rebuilt(cut.block, block)), path, accept_damage=True) if drop else 0.0)
    return torch.tensor([levels, errors], dtype=torch.float64)


def both_outputs(flow: Flow, index: int, smaller: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(the whole block's, the smaller one's) outputs of every micro-batch."""
    for batch in range(len(flow)):
        yield flow.outputs[batch], flow.run(index, smaller, batch)
