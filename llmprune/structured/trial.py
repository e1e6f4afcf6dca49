"""Is a smaller block the block without some units? Both run on random weights, with what their models' forwards pass to them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.errors import RequestError
from llmprune.model.blocks import Walk
from llmprune.model.matrices import block_matrices
from llmprune.model.skeleton import UNBUILDABLE, build_skeleton
from llmprune.structured.routed import Calls, in_stack, unrouted
from llmprune.structured.slicing import Keeps, mask_block, slice_parameters
from llmprune.structured.spaces import Space, tensors_of

TOKENS = 12  # of the window that a proof runs
EXACT = 1e-5  # largest difference between slice and mask, relative to the largest output
APART = 100  # the mask must change the output so many times more


class Unproven(Exception):
    """Why a field does not count units, or is not proved to. step: how far the proof has come."""

    def __init__(self, why: str, step: int) -> None:
        super().__init__(why)
        self.step = step


class Trial:
    """Random blocks of a model and of a smaller one, and what their forwards pass to them."""

    def __init__(self, model: PreTrainedModel, smaller: PreTrainedModel, path: str) -> None:
        self.generator = torch.Generator().manual_seed(0)
        try:
            whole = build_skeleton(model.config.to_dict(), torch.float32)
            fill_outside(whole, path, torch.Generator().manual_seed(0))
            fill_outside(smaller, path, torch.Generator().manual_seed(0))
            ids = torch.arange(3, 3 + TOKENS)[None]
            self.walks = Walk(whole), Walk(smaller)
            (self.hidden, calls), (_, smaller_calls) = (walk.record(ids) for walk in self.walks)
            self.calls = calls, smaller_calls
        except RequestError as error:
            raise Unproven(error.message, 3) from None
        if any(call.handed is not None for call in calls):
            raise Unproven("its blocks hand on more than hidden states", 3)

    @torch.no_grad()
    def differs(self, index: int, spaces: Sequence[Space], fewer: int, pattern: str) -> str:
        """What is wrong with the spaces of one block; nothing where its smaller block computes what it does beside zeros."""
        block, cut = (walk.blocks[index] for walk in self.walks)
        stacks = {a.parameter for s in spaces for a in s.axes if pattern == "experts" and in_stack(s, a)}
        fill(block, self.generator, stacks)
        full = self.scored(index, spaces) if pattern == "experts" else self.run(0, index)
        if pattern == "channels" and self.is_linear(index, block, spaces, full):
            return "nothing but products lies between the matrices"
        whole = {name: t.clone() for name, t in block.state_dict().items() if name not in stacks}
        for first in (True, False):  # the first units of each group would tell groups that are not known
            keeps = {s.name: self.some(s, fewer, first) for s in spaces}
            try:
                cut.load_state_dict(slice_parameters(block, spaces, keeps), assign=True)
            except RuntimeError as error:
                return f"the smaller block is another ({str(error).splitlines()[-1].strip()[:100]})"
            unread, masked = self.without_experts(index, spaces, keeps) if pattern == "experts" else self.beside_zeros(index, spaces, keeps)
            wrong = self.apart(masked, self.run(1, index), full)
            if not any(s.scales for s in spaces) and float((masked - unread).abs().max()) > EXACT * float(masked.abs().max()):
                wrong = wrong or "other units change with those that are dropped"
            block.load_state_dict(whole, strict=False)
            if wrong:
                break
        for emptied in (block, cut):
            emptied.load_state_dict({name: p.to("meta") for name, p in emptied.named_parameters()}, strict=False, assign=True)
        return wrong

    def beside_zeros(self, index: int, spaces: Sequence[Space], keeps: Keeps) -> tuple[Tensor, Tensor]:
        """Outputs of the block when nothing reads the dropped units, and with zeros in their place."""
        block = self.walks[0].blocks[index]
        mask_block(block, [replace(s, axes=()) for s in spaces], keeps)
        unread = self.run(0, index)
        mask_block(block, spaces, keeps)
        return unread, self.run(0, index)

    def without_experts(self, index: int, spaces: Sequence[Space], keeps: Keeps) -> tuple[Tensor, Tensor]:
        """The output of the block when its router chooses only among the kept experts, twice: zeros keep none from being chosen."""
        with unrouted(self.walks[0].blocks[index], spaces, keeps):
            masked = self.run(0, index)
        return masked, masked

    def scored(self, index: int, spaces: Sequence[Space]) -> Tensor:
        """The output of the block. Raises Unproven where its experts do not run one by one."""
        block = self.walks[0].blocks[index]
        cut, buffers = {axis.parameter for space in spaces for axis in space.axes}, dict(block.named_buffers())
        for name in (name for name in buffers if name in cut):  # biases of the choice
            buffers[name].copy_(_random(buffers[name].shape, self.generator))
        for space in spaces:
            with Calls(block.get_submodule(space.name)) as calls:
                full = self.run(0, index)
            if wrong := calls.wrong(space.least):
                raise Unproven(wrong, 4)
        return full

    @staticmethod
    def apart(masked: Tensor, sliced: Tensor, full: Tensor) -> str:
        """What is wrong with the output of the smaller block; nothing if it is that of the block beside zeros, and that of the full block is not."""
        apart, effect = float((masked - sliced).abs().max()), float((masked - full).abs().max())
        if not apart <= EXACT * float(masked.abs().max()):
            return f"the smaller block's output differs by {apart / float(masked.abs().max()):.2g} from the block's beside zeros"
        return "" if effect > APART * apart else "without these units the output is the same"

    def some(self, space: Space, fewer: int, first: bool) -> Tensor:
        """The first units, or random ones, equally many of each group."""
        groups, each = space.groups, space.units // space.groups
        orders = [torch.arange(each) if first else torch.randperm(each, generator=self.generator) for _ in range(groups)]
        picks = [order[: fewer // groups] + group * each for group, order in enumerate(orders)]
        return torch.cat(picks).sort().values

    def run(self, which: int, index: int) -> Tensor:
        walk = self.walks[which]
        try:
            return walk.replay(walk.blocks[index], self.hidden.clone(), self.calls[which][index])
        except UNBUILDABLE as error:
            raise Unproven(f"block {index} does not run by itself ({error})", 3) from None

    def is_linear(self, index: int, block: nn.Module, spaces: Sequence[Space], full: Tensor) -> bool:
        """Whether writers times -1/2 and readers times -2 give the same output."""
        tensors, matrices = tensors_of(block), {m.name: m for m in block_matrices(block)}
        writers = {axis.parameter for space in spaces for axis in space.axes}
        readers = {matrices[r.matrix].parameter for space in spaces for r in space.readers}
        for names, factor in ((writers, -0.5), (readers, -2.0)):
            for name in names:
                tensors[name].data.mul_(factor)
        same = torch.allclose(self.run(0, index), full, atol=1e-4 * float(full.abs().max()))
        for names, factor in ((writers, -2.0), (readers, -0.5)):
            for name in names:
                tensors[name].data.mul_(factor)
        return same


def fill(block: nn.Module, generator: torch.Generator, stacks: Collection[str] = ()) -> None:
    """Random parameters. Those of ``stacks`` overlap in memory: a stack of different experts takes no more than one row, one column and one each."""
    values = {name: (_overlapping if name in stacks else _random)(p.shape, generator) for name, p in block.named_parameters()}
    block.load_state_dict(values, strict=False, assign=True)


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) < 2:
        return 1 + 0.3 * torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) * shape[-1] ** -0.5


def _overlapping(shape: torch.Size, generator: torch.Generator, scaled: bool = True) -> Tensor:
    few = torch.randn(sum(shape) + 1, generator=generator) * (shape[-1] ** -0.5 if scaled else 1)
    return few.as_strided(shape, (1,) * len(shape))


def fill_outside(model: PreTrainedModel, path: str, generator: torch.Generator) -> None:
    """Parameters outside the blocks whose rows overlap in memory, so that an embedding takes no more than one row and one column."""
    for name, parameter in list(model.named_parameters()):
        if not name.startswith(f"{path}."):
            parent, _, last = name.rpartition(".")
            few = _overlapping(parameter.shape, generator, scaled=False)
            setattr(model.get_submodule(parent), last, nn.Parameter(few, requires_grad=False))
