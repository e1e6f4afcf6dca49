"""What a structured run cuts: the spaces of every block that it names, and the matrices that read their units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmprune.errors import RequestError
from llmprune.maths.budget import on_levels
from llmprune.maths.unit_columns import Units
from llmprune.model.matrices import Matrix, block_matrices
from llmprune.results import Row
from llmprune.structured.derived import require_layers
from llmprune.structured.derived_units import NO_SIZES, OwnSizes, model_spaces, require_buildable
from llmprune.structured.slicing import Keeps, mask_block, parameters_per_unit
from llmprune.structured.spaces import ROUNDED, Space, closest_count, legal_counts, outer_space, refusal, require, tensors_of

ATTENTION = ("kv-groups", "heads")  # of "structured": the first that the architecture can be cut by


@dataclass(frozen=True, eq=False)
class Cuttable:
    """One space that may lose units. size: the parameters of all its units; counts: how many units may be kept, ascending; native: those of them
    that a config of the model's own kind can express for all layers.
    """

    block: int
    space: Space
    size: int
    counts: tuple[int, ...]
    native: tuple[int, ...]

    @property
    def levels(self) -> tuple[float, ...]:
        """The ratios that it can lose."""
        return self.ratios(self.counts)

    def ratios(self, counts: Sequence[int]) -> tuple[float, ...]:
        return tuple(1 - count / self.space.units for count in reversed(counts))

    def kept(self, ratio: float) -> float:
        return self.space.units * (1 - ratio)


@dataclass(frozen=True, eq=False)
class Structure:
    """What a structured run may cut. ``cut`` holds what may be cut by the full name of its reader, or of the space where none reads it."""

    name: str  # as asked for
    patterns: tuple[str, ...]
    config: PreTrainedConfig
    spaces: tuple[tuple[Space, ...], ...]  # of each block, under every pattern that its family knows
    blocks: tuple[int, ...]  # parameters of each block
    cut: dict[str, Cuttable]
    uniform: bool  # the same sizes in every layer
    given: bool  # the sparsity was asked for; otherwise another budget found it
    exact: bool  # a ratio that no legal size gives is refused; otherwise it is rounded to the nearest one
    padded: bool  # every layer is saved as wide as the widest
    others: tuple[tuple[str, ...], ...]  # of each block, matrices without units to drop, by their names in it
    outer: Space | None = None  # the residual channels outside the blocks, where the width is cut
    outside: int = 0  # parameters that they have there

    @property
    def sizes(self) -> dict[str, int]:
        """The pattern's own parameters, by name."""
        return {name: c.size for name, c in self.cut.items()}

    @property
    def weights(self) -> int:
        return sum(self.blocks) if self.name == "layers" else sum(self.sizes.values()) + self.outside

    @property
    def described(self) -> str:
        """What may be dropped, counted."""
        if self.name == "layers":
            return f"{len(self.blocks)} layers"
        if self.outer is not None:
            return f"{self.outer.units} residual channels"
        counts: dict[str, int] = {}
        for c in self.cut.values():
            counts[c.space.pattern] = counts.get(c.space.pattern, 0) + c.space.units
        return " and ".join(f"{count:,} {pattern}" for pattern, count in counts.items())

    def units_of(self, matrix: str) -> Units:
        """The units of a reader, as a pattern of its columns."""
        space = self.cut[matrix].space
        return Units(space.readers[0].columns_UK, space.groups, space.least)

    def readers(self, index: int, block: nn.Module) -> list[Matrix]:
        """The matrices of a block that read units that may be dropped."""
        wanted = {r.matrix for c in self.cut.values() if c.block == index for r in c.space.readers}
        return [m for m in block_matrices(block) if m.name in wanted]

    def repaired(self, index: int, block: nn.Module) -> list[Matrix]:
        """The readers of a block, and the matrices that can compensate for the losses of other blocks."""
        wanted = {m.name for m in self.readers(index, block)} | set(self.others[index])
        return [m for m in block_matrices(block) if m.name in wanted]

    def keeps(self, rows: Iterable[Row]) -> list[dict[str, Tensor]]:
        """The kept units of each block by these rows; spaces that are kept whole are left out."""
        found: list[dict[str, Tensor]] = [{} for _ in self.spaces]
        for row in rows:
            cut = self.cut.get(row.matrix)
            if cut is None:  # outside the blocks
                continue
            if row.kept is not None and len(row.kept) < cut.space.units:
                found[cut.block][cut.space.name] = torch.tensor(row.kept)
        return found

    @property
    def outer_units(self) -> int:
        """The width of the residual stream."""
        assert self.outer is not None
        return self.outer.units

    def width_at(self, asked: dict[str, float]) -> int:
        """The number of kept residual channels: the same in every block."""
        (count,) = {round(c.kept(asked[name])) for name, c in self.cut.items()}
        return count

    def with_units(self, row: Row, keep_RC: Tensor) -> Row:
        """A reader's row with the units that it keeps."""
        cut = self.cut[row.matrix]
        return replace(row, what=cut.space.pattern, units=cut.space.units, kept=self.units_of(row.matrix).kept(keep_RC), parameters=cut.size)

    def mask(self, index: int, block: nn.Module, keeps: Keeps) -> list[str]:
        """Zero everything else that belongs to the dropped units; names of the parameters that this changed."""
        cut = [space for space in self.spaces[index] if space.name in keeps]
        mask_block(block, cut, keeps)
        return list(dict.fromkeys(axis.parameter for space in cut for axis in space.axes))

    def rescales(self, index: int, keeps: Keeps) -> bool:
        """Whether a norm runs over the units, so that zeros in dropped ones change the kept ones."""
        return any(space.scales for space in self.spaces[index] if space.name in keeps)

    def legal(self, asked: dict[str, float], sparsity: float) -> dict[str, float]:
        """The ratios nearest to those asked for that leave legal counts, under the same budget.

        Raises RequestError for a ratio that is not legal where it has to be, and for one that is rounded to nothing.
        """
        uniform = self.uniform or len(set(asked.values())) == 1
        together = self._together(uniform)
        wanted, sizes, levels = {}, {}, {}
        for key, names in together.items():
            first = self.cut[names[0]]
            sizes[key] = sum(self.cut[n].size for n in names)
            wanted[key] = sum(asked[n] * self.cut[n].size for n in names) / sizes[key]
            levels[key] = first.ratios(first.native if uniform or self.padded else first.counts)
        if uniform and self.name != "structured":
            ratios = {key: self._closest(self.cut[names[0]], wanted[key]) for key, names in together.items()}
        else:
            ratios = on_levels(wanted, sizes, levels, sparsity)
            if self.given and sparsity > 0 and not any(ratios.values()):
                least = min((levels[key][1] * sizes[key] for key in together if len(levels[key]) > 1), default=0) / sum(sizes.values())
                raise RequestError(
                    f"{self.name} at sparsity {sparsity:.4g}: too little to cut anything",
                    f"{least:.4g} is the least" if least else "nothing can be cut; use a smaller --round-to",
                )
        return {name: ratios[key] for key, names in together.items() for name in names}

    def layers_to_drop(self, sparsity: float) -> int:
        """The number of blocks nearest to a share of them; at least one is kept.

        Raises RequestError as ``legal`` does.
        """
        total = len(self.blocks)
        count = min(round(sparsity * total), total - 1)
        if sparsity and (not count or (self.exact and abs(count - sparsity * total) > 0.01 * total)):
            legal = ", ".join(f"{n / total:.4g} ({total - n} kept)" for n in range(1, min(total, 9)))
            raise RequestError(f"layers at sparsity {sparsity:g}: {sparsity * total:.4g} of {total} blocks", f"legal sparsities: {legal}")
        return count

    def rounded(self, sparsity: float) -> str:
        """What a sparsity is rounded to where all layers get the same sizes; empty where it is met, or shared out by measures.

        Raises RequestError as ``legal`` does.
        """
        if self.name == "layers":
            dropped, units, where = self.layers_to_drop(sparsity), len(self.blocks), "layers"
        elif self.uniform and self.given and self.name != "structured" and len({c.native for c in self.cut.values()}) == 1:
            cut = next(iter(self.cut.values()))
            units, where = cut.space.units, "residual channels" if self.outer else f"{cut.space.pattern} in each layer"
            dropped = units - round(cut.kept(self._closest(cut, sparsity)))
        else:
            return ""
        return "" if abs(dropped / units - sparsity) < 1e-6 else f"{dropped / units:.4g} is the nearest possible: {dropped} of {units} {where}"

    def _together(self, uniform: bool) -> dict[str, list[str]]:
        """The cuts that have to keep equally many units: all of one config field, in one layer or (uniform) in all."""
        found: dict[str, list[str]] = {}
        for name, c in self.cut.items():
            key = c.space.config[0][0]
            found.setdefault(key if uniform else f"{c.block}.{key}", []).append(name)
        return found

    def _closest(self, cut: Cuttable, ratio: float) -> float:
        count, space = closest_count(list(cut.native), cut.kept(ratio)), cut.space
        if self.exact and abs(count - cut.kept(ratio)) > 1e-6 * space.units:
            raise RequestError(
                f"{space.pattern} at sparsity {ratio:g}: of {space.units} in a layer, {cut.kept(ratio):.4g} would be kept", _ratios(cut.native, space)
            )
        if self.given and ratio > 0 and count == space.units:
            raise RequestError(
                f"{space.pattern} at sparsity {ratio:.4g}: the nearest legal number to {cut.kept(ratio):.4g} is all {space.units}",
                _ratios(cut.native, space),
            )
        return 1 - count / space.units


def _ratios(counts: Sequence[int], space: Space) -> str:
    cut = [n for n in reversed(counts) if n < space.units]
    if not cut:
        return f"none of the {space.units} can be dropped; use a smaller --round-to"
    shown = [f"{1 - n / space.units:.6g} ({n} kept)" for n in (cut if len(cut) <= 8 else [*cut[:4], *cut[-4:]])]
    return "legal sparsities: " + ", ".join(shown)


def resolved(config: PreTrainedConfig, pattern: str) -> tuple[str, ...]:
    """The patterns of spaces that a name means. Raises RequestError where the architecture cannot be cut so."""
    if pattern != "structured":
        require(config, pattern)
        return (pattern,)
    require(config, "channels")
    found = [p for p in ATTENTION if refusal(config, p) is None]
    if not found:
        require(config, ATTENTION[0])
    return ("channels", found[0])


def structure_of(
    model: PreTrainedModel,
    paths: Sequence[str],
    pattern: str,
    takes: Callable[[str], bool],
    round_to: int | None = None,
    uniform: bool = True,
    given: bool = False,
    exact: bool = False,
    padded: bool = False,
    own: OwnSizes = NO_SIZES,
) -> Structure:
    """What a pattern cuts of a model, which may be without weights. paths: of its blocks. takes: which readers (or stacks of experts) take part.
    own: sizes of single blocks, as an earlier cut has left them.

    Raises RequestError where the architecture cannot be cut so, or nothing is left to cut.
    """
    config, patterns = model.config, resolved(model.config, pattern)
    if pattern == "layers":
        require_layers(model, paths)
    parent = paths[0].rpartition(".")[0]
    spaces, cut, numbers, others = model_spaces(model, parent, patterns, own), {}, [], []
    several = not uniform and not padded
    if several or pattern == "experts":
        require_buildable(model, parent, spaces, several)
    for index, path in enumerate(paths):
        block = model.get_submodule(path)
        numbers.append(sum(t.numel() for t in tensors_of(block).values()))
        for space in spaces[index]:
            name = f"{path}.{space.readers[0].matrix if space.readers else space.name}"
            if space.pattern in patterns and takes(name):
                step = round_to if round_to is not None else 8 if space.pattern in ROUNDED else 1
                counts, native = (tuple(legal_counts(config, space, step, in_config)) for in_config in (False, True))
                cut[name] = Cuttable(index, space, space.units * parameters_per_unit(block, space), counts, native)
        others.append(tuple(m.name for m in block_matrices(block) if f"{path}.{m.name}" not in cut and takes(f"{path}.{m.name}")))
    if not cut and pattern != "layers":
        raise RequestError(f"pattern {pattern}: nothing is selected", "check --skip and --only")
    outer = outer_space(model) if pattern == "hidden" else None
    outside = parameters_outside(model, outer) if outer else 0
    return Structure(pattern, patterns, config, tuple(spaces), tuple(numbers), cut, uniform, given, exact, padded, tuple(others), outer, outside)


def parameters_outside(model: PreTrainedModel, outer: Space) -> int:
    """The number of parameters of the residual channels outside the blocks."""
    return sum(model.get_parameter(axis.parameter).numel() for axis in outer.axes)
