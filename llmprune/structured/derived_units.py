"""FFN channels, heads, KV groups and experts of architectures without a table: which config fields count them is found by trying, and proved.

A field is changed, a model without weights is built from the changed config, and the shapes that shrank show where the units lie. Proved is that a
random block of the smaller config, with the remaining tensors, computes what the whole block computes beside zeros.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.errors import RequestError
from llmprune.model.families.lookup import family_of
from llmprune.model.skeleton import UNBUILDABLE, build_skeleton
from llmprune.structured.counted import COUNTS, Count
from llmprune.structured.derived import shapes, unlike
from llmprune.structured.fields import put, read, with_fields
from llmprune.structured.layouts import Layout, Shrunk, check_channels, expert_spaces, layouts, shrunk_tensors, spaces_of_block
from llmprune.structured.slicing import empty_block, slice_parameters, widened
from llmprune.structured.spaces import WITHOUT, Space, all_spaces
from llmprune.structured.trial import Trial, Unproven

NO_FIELD = "no field of its config counts them"
NONE = dict.fromkeys(("heads", "kv-groups"), "no field of its config gives fewer heads of the same size") | {"experts": WITHOUT["experts"]}
LAYOUTS = 16  # that are tried for one field
OwnSizes = Mapping[int, dict[str, Any]]  # config fields in which single blocks differ, by their numbers
NO_SIZES: OwnSizes = MappingProxyType({})


def derived_spaces(model: PreTrainedModel, path: str, pattern: str) -> list[tuple[Space, ...]]:
    """The spaces of every block of the list ``path`` under a pattern of ``COUNTS``; ``model`` may be without weights.

    Raises RequestError where no config field is proved to count the units, with the step that failed.
    """
    found: list[list[Space]] = [[] for _ in model.get_submodule(path).children()]
    proved: set[str] = set()
    failed: list[Unproven] = []
    for count in COUNTS[pattern](model, path):
        names = [name for name, _ in count.fields]
        if proved.isdisjoint(names):
            try:
                spaces = Proof(model, path, pattern, count).spaces()
                if any({s.name for s in block} & {s.name for s in more} for block, more in zip(found, spaces, strict=True)):
                    raise Unproven("counts units that another field counts too", 4)
            except Unproven as error:
                failed.append(Unproven(f"{' and '.join(names)}: {error}", error.step))
                continue
            proved.update(names)
            for block, more in zip(found, spaces, strict=True):
                block.extend(more)
    if not proved:
        last = max(failed, key=lambda error: error.step, default=None)
        why = str(last) if last is not None and last.step else _uncounted(model, path, pattern)
        raise RequestError(f"{model.config.model_type} cannot be cut by {pattern}: {why}", "its weights can be pruned without a structured pattern")
    return [tuple(block) for block in found]


def _uncounted(model: PreTrainedModel, path: str, pattern: str) -> str:
    """Why there is no field to try."""
    there = pattern == "experts" and any("expert" in name for name in shapes(model.get_submodule(path)))
    return NO_FIELD if there else NONE.get(pattern, NO_FIELD)


def model_spaces(model: PreTrainedModel, path: str, patterns: Sequence[str], own: OwnSizes = NO_SIZES) -> list[tuple[Space, ...]]:
    """The spaces of every block of the list ``path``: those of the table of its family, under all patterns, or else derived under ``patterns``.
    own: sizes of single blocks, as an earlier cut has left them.

    Raises RequestError where a pattern is not derived.
    """
    blocks = list(model.get_submodule(path).children())
    if family_of(model.config) is not None:
        return [tuple(all_spaces(with_fields(model.config, own.get(index, {})), index, block)) for index, block in enumerate(blocks)]
    if own and any(pattern in COUNTS for pattern in patterns):
        why = "an earlier cut has left its layers in different sizes, and there is no table of its structure"
        raise RequestError(f"{model.config.model_type} cannot be cut by {' and '.join(patterns)}: {why}", "cut the model that it was made from")
    each = [derived_spaces(model, path, pattern) for pattern in patterns if pattern in COUNTS]
    return [tuple(space for found in each for space in found[index]) for index in range(len(blocks))]


def named_spaces(model: PreTrainedModel, path: str, names: Collection[str], own: OwnSizes = NO_SIZES) -> list[tuple[Space, ...]]:
    """``model_spaces`` under the patterns that have spaces of these names. Raises RequestError where no pattern has."""
    patterns: list[str] = []
    left, why = set(names), ""
    for pattern in COUNTS if family_of(model.config) is None else ():
        if left:
            try:
                found = {space.name for block in derived_spaces(model, path, pattern) for space in block}
            except RequestError as error:
                why = why or error.message
                continue
            patterns += [pattern] if found & left else []
            left -= found
    if left and family_of(model.config) is None:
        raise RequestError(f"{model.config.model_type}: no space is named {sorted(left)[0]!r}" + (f"; {why}" if why else ""), "")
    return model_spaces(model, path, patterns, own)


def require_buildable(model: PreTrainedModel, path: str, spaces: Sequence[Sequence[Space]], several: bool) -> None:
    """Raises RequestError where blocks without a table cannot be built one by one in sizes of their own, as layers of different sizes are
    (``several``), and those that have lost experts.
    """
    if family_of(model.config) is not None:
        return
    hint = "use --uniform, or --pad" if several else "its weights can be pruned without a structured pattern"
    for index, block in enumerate(model.get_submodule(path).children()):
        none = torch.arange(0)
        fewer = {s.name: widened(s, none, max(s.least, s.units // 2 // s.groups * s.groups)) for s in spaces[index]}
        if several and any("." in name or type(read(model.config, name)) is not int for space in spaces[index] for name, _ in space.config):
            raise RequestError(f"{model.config.model_type}: its config has no plain fields for layers of different sizes", hint)
        try:
            own = empty_block(block, model.config, index, spaces[index], fewer)
        except UNBUILDABLE as error:
            raise RequestError(f"{model.config.model_type}: {path}.{index} cannot be built in a size of its own ({error})", hint) from None
        wanted = {name: tuple(t.shape) for name, t in slice_parameters(block, spaces[index], fewer).items()}
        if shapes(own) != wanted:
            raise RequestError(f"{model.config.model_type}: {path}.{index} cannot be built in a size of its own", hint)


class Proof:
    """One choice of config fields, tried on a model."""

    def __init__(self, model: PreTrainedModel, path: str, pattern: str, count: Count) -> None:
        self.model, self.path, self.pattern, self.count = model, path, pattern, count
        self.blocks = list(model.get_submodule(path).children())

    def smaller(self, units: int) -> PreTrainedModel:
        """The model of so many units, without weights."""
        saved = {name: value for name, value in self.model.config.to_dict().items() if name != "auto_map"}
        for name, value in self.count.fixed:
            put(saved, self.model.config, name, value)
        for name, each in self.count.fields:
            put(saved, self.model.config, name, each * units)
        try:
            return build_skeleton(saved, torch.float32)
        except RequestError as error:
            raise Unproven(f"{units} instead of {self.count.units}: {error.message}", 2) from None

    def spaces(self) -> list[list[Space]]:
        """The spaces of every block. Raises Unproven where no layout of the units gives a smaller block like the block beside zeros."""
        counts = self.legal()
        most, fewer = counts[-1], counts[(len(counts) - 1) // 2]
        if self.pattern == "experts":
            fewer = min(fewer, 2 * self.count.least)
        smaller = self.smaller(most)
        shrunk = self.shrunk(smaller, most)
        if fewer != most:
            smaller = self.smaller(fewer)
            if self.shrunk(smaller, fewer) != shrunk:
                raise Unproven(f"{fewer} instead of {self.count.units} do not leave as many places fewer", 2)
        if self.pattern == "channels":
            check_channels(self.blocks, shrunk)
        trial, kinds, failed = Trial(self.model, smaller, self.path), self.kinds(shrunk), ""
        legal = () if self.pattern == "channels" else (*counts, self.count.units)
        for layout in islice(layouts(self.count, self.blocks, shrunk, self.pattern == "experts"), LAYOUTS):
            spaces = [list(self.laid_out(block, shrunk[i], layout, legal)) for i, block in enumerate(self.blocks)]
            if layout.scaled and not any(space.scales for block in spaces for space in block):
                break
            wrong = next((f for i in kinds if (f := trial.differs(i, spaces[i], fewer, self.pattern))), "")
            if not wrong:
                return spaces
            failed = failed or wrong
        raise Unproven(failed, 4)

    def laid_out(self, block: nn.Module, shrunk: Sequence[Shrunk], layout: Layout, legal: tuple[int, ...]) -> Iterator[Space]:
        if self.pattern == "experts":
            return expert_spaces(block, shrunk, layout, self.count, legal)
        return spaces_of_block(block, shrunk, layout, self.pattern, self.count, legal)

    def legal(self) -> list[int]:
        """Numbers of units, fewer than all, with which the config can be built."""
        units, groups = self.count.units, self.count.groups
        if self.pattern == "channels":
            return [*dict.fromkeys((units // 2 + 1, units - 1))]
        found, first = [n for n in range(groups, units, groups) if n >= self.count.least], ""
        while found:
            try:
                self.smaller(found[-1])
                break
            except Unproven as error:
                first = first or str(error)
                found.pop()
        if first:
            found = [n for n in found[:-1] if self.builds(n)] + found[-1:]
        if not found:
            raise Unproven(first or f"{units} in {groups} groups cannot be fewer (at least {max(groups, self.count.least)})", 2)
        return found

    def builds(self, units: int) -> bool:
        try:
            return bool(self.smaller(units))
        except Unproven:
            return False

    def shrunk(self, smaller: PreTrainedModel, units: int) -> list[list[Shrunk]]:
        """What shrank in each block. Raises Unproven for any other change."""
        outside, wanted = (shapes(m, f"{self.path}.") for m in (smaller, self.model))
        if outside != wanted:
            raise Unproven(f"changes {sorted(outside.items() ^ wanted.items())[0][0]} too", 1)
        own = list(smaller.get_submodule(self.path).children())
        if len(own) != len(self.blocks):
            raise Unproven("changes the number of blocks", 1)
        found = [shrunk_tensors(shapes(a), shapes(b), self.count.units, units) for a, b in zip(self.blocks, own, strict=True)]
        if not any(found):
            raise Unproven("has no effect on the blocks", 0)
        return found

    def kinds(self, shrunk: list[list[Shrunk]]) -> list[int]:
        """One block of each kind among those that have units."""
        found: list[int] = []
        for i, block in enumerate(self.blocks):
            if shrunk[i] and all(unlike(self.blocks[j], block, j, i) is not None for j in found):
                found.append(i)
        return found
