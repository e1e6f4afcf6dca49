"""Zeros instead of units (masking) and smaller tensors without them (slicing): both give the same outputs.

``keeps``: space name -> sorted numbers of the kept units; a space that it does not name is kept whole. U = units, K = places of a unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llmprune.errors import RequestError
from llmprune.model.matrices import Matrix, block_matrices
from llmprune.structured.fields import with_fields
from llmprune.structured.spaces import Axis, Space, check_keep, tensors_of

Keeps = Mapping[str, Tensor]
Sizes = dict[str, int]


@torch.no_grad()
def mask_block(block: nn.Module, spaces: Sequence[Space], keeps: Keeps) -> None:
    """Zero in place everything that belongs to the dropped units.

    Raises RequestError for experts: a router still chooses an expert whose weights are zero.
    """
    tensors, matrices = tensors_of(block), _matrices(block)
    for space in _cut(spaces, keeps):
        if space.pattern == "experts":
            raise RequestError(f"{space.name}: zeros do not keep a router from choosing experts", "cut them out, or keep them")
        dropped_N = dropped_units(space, keeps[space.name])
        for axis in _axes(space, matrices):
            tensor = tensors[axis.parameter].data
            tensor = tensor if axis.expert is None else tensor[axis.expert]
            tensor.index_fill_(axis.dim, axis.index_UK[dropped_N].flatten().to(tensor.device), 0)


@torch.no_grad()
def slice_parameters(block: nn.Module, spaces: Sequence[Space], keeps: Keeps, only: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of the block, without the dropped units: contiguous clones by name; ``only``: just these.

    Where an RMS norm runs over all units, it and its input are rescaled so that the outputs of the kept units are the same as beside zeros.
    """
    kept = _Kept.of(block, spaces, keeps)
    wanted = None if only is None else set(only)
    tensors = {name: t.detach() for name, t in tensors_of(block).items() if wanted is None or name in wanted}
    sliced = {name: kept.select(name, tensor) for name, tensor in tensors.items()}
    for space in _cut(spaces, keeps):
        root = (len(keeps[space.name]) / space.units) ** 0.5
        for scale in space.scales:
            if root != 1 and scale.path in sliced:
                _rescale(sliced[scale.path], root**scale.power, scale.offset)
    return sliced


def parameters_per_unit(block: nn.Module, space: Space) -> int:
    """How many parameters are removed with one unit."""
    tensors, total = tensors_of(block), 0
    for axis in _axes(space, _matrices(block)):
        shape = tensors[axis.parameter].shape[axis.expert is not None :]
        total += shape.numel() // shape[axis.dim] * axis.index_UK.shape[1]
    return total


def sizes(spaces: Sequence[Space], keeps: Keeps) -> Sizes:
    """The config fields that count units of the patterns that are cut, with their values after the cut.

    Raises RequestError when two spaces disagree on one field, such as experts of different widths, or heads and KV groups at once.
    """
    dropped, patterns = _dropped_experts(spaces, keeps), {space.pattern for space in _cut(spaces, keeps)}
    found: dict[str, tuple[int, Space]] = {}
    for space in spaces:
        if space.pattern not in patterns or _expert(space) in dropped:
            continue
        count = len(keeps[space.name]) if space.name in keeps else space.units
        for field, per_unit in space.config:
            value, other = found.setdefault(field, (count * per_unit, space))
            if other.pattern != space.pattern:
                raise RequestError(
                    f"{space.name}: {field} is changed by {other.name} too", f"cut {space.pattern} or {other.pattern}, not both at once"
                )
            if value != count * per_unit:
                raise RequestError(f"{space.name}: {field} would be {count * per_unit}, but {value} for {other.name}", "keep equally many in both")
    return {field: value for field, (value, _) in found.items()}


def all_sizes(spaces: Sequence[Space], keeps: Keeps) -> Sizes:
    """``sizes``, and the fields of spaces that are kept whole."""
    whole = {field: space.units * per_unit for space in spaces for field, per_unit in space.config}
    return whole | sizes(spaces, keeps)


def rebuild(block: nn.Module, config: PreTrainedConfig, index: int, spaces: Sequence[Space], keeps: Keeps) -> nn.Module:
    """A smaller block of the same class that computes what the masked block computes; ``index`` is its place in the model that it goes into."""
    smaller = empty_block(block, config, index, spaces, keeps)
    smaller.load_state_dict(slice_parameters(block, spaces, keeps), assign=True)
    trained = {name: p.requires_grad for name, p in block.named_parameters()}
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(trained[name])
    return smaller.train(block.training)


def empty_block(block: nn.Module, config: PreTrainedConfig, index: int, spaces: Sequence[Space], keeps: Keeps) -> nn.Module:
    """``rebuild`` without weights: its parameters are on the meta device."""
    with init_empty_weights(include_buffers=False):
        return type(block)(sized(config, spaces, keeps), index)


def sized(config: PreTrainedConfig, spaces: Sequence[Space], keeps: Keeps) -> PreTrainedConfig:
    """A copy of a config with the sizes of one block."""
    own = all_sizes(spaces, keeps)  # an earlier cut may have left this block other sizes than the config's
    return with_fields(config, own | {name: value for space in _cut(spaces, keeps) for name, value in space.fixed})


def widened(space: Space, keep_K: Tensor, count: int) -> Tensor:
    """``count`` units to write out: the kept ones, filled up with the first of the dropped ones as zeros; equally many in each group."""
    kept = torch.zeros(space.units, dtype=torch.bool)
    kept[keep_K.cpu()] = True
    each = count // space.groups
    order = torch.sort(~kept.view(space.groups, -1), dim=1, stable=True).indices[:, :each]
    return (order + torch.arange(space.groups)[:, None] * (space.units // space.groups)).flatten().sort().values


def _cut(spaces: Sequence[Space], keeps: Keeps) -> list[Space]:
    cut = [space for space in spaces if space.name in keeps]
    for space in cut:
        check_keep(space, keeps[space.name])
    return cut


def _rescale(tensor: Tensor, factor: float, offset: float) -> None:
    """In at least float32: a weight that counts from 1 would lose its digits in bfloat16."""
    exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    tensor.copy_((exact + offset) * factor - offset)


def dropped_units(space: Space, keep_K: Tensor) -> Tensor:
    dropped = torch.ones(space.units, dtype=torch.bool)
    dropped[keep_K.cpu()] = False
    return dropped.nonzero().flatten()


def _matrices(block: nn.Module) -> dict[str, Matrix]:
    return {matrix.name: matrix for matrix in block_matrices(block)}


def _axes(space: Space, matrices: dict[str, Matrix]) -> Iterator[Axis]:
    """All axes of a space, the readers' columns as axes too."""
    yield from space.axes
    for reader in space.readers:
        matrix = matrices[reader.matrix]
        yield Axis(matrix.parameter, 0 if matrix.transposed else 1, reader.columns_UK, matrix.expert)


def _expert(space: Space) -> int | None:
    return space.axes[0].expert if space.axes else None


def _dropped_experts(spaces: Sequence[Space], keeps: Keeps) -> set[int]:
    return {int(e) for space in spaces if space.pattern == "experts" and space.name in keeps for e in dropped_units(space, keeps[space.name])}


@dataclass(frozen=True)
class _Kept:
    """Which places are kept along every dimension that is cut: (parameter, expert, dimension) -> mask."""

    places: dict[tuple[str, int | None, int], Tensor]

    @staticmethod
    def of(block: nn.Module, spaces: Sequence[Space], keeps: Keeps) -> _Kept:
        tensors, matrices = tensors_of(block), _matrices(block)
        masks: dict[tuple[str, int | None, int], Tensor] = {}
        dropped = _dropped_experts(spaces, keeps)
        for space in _cut(spaces, keeps):
            if _expert(space) in dropped:
                continue
            dropped_N = dropped_units(space, keeps[space.name])
            for axis in _axes(space, matrices):
                size = tensors[axis.parameter].shape[axis.dim + (axis.expert is not None)]
                mask = masks.setdefault((axis.parameter, axis.expert, axis.dim), torch.ones(size, dtype=torch.bool))
                mask[axis.index_UK[dropped_N].flatten()] = False
        return _Kept(masks)

    def select(self, name: str, tensor: Tensor) -> Tensor:
        """The kept part of one tensor, in separate memory."""
        if any(parameter == name and expert is not None for parameter, expert, _ in self.places):
            stay = self.places.get((name, None, 0), torch.ones(len(tensor), dtype=torch.bool)).nonzero().flatten().tolist()
            return self._along(name, None, torch.stack([self._along(name, e, tensor[e]) for e in stay]), first=1).contiguous()
        return self._along(name, None, tensor).clone(memory_format=torch.contiguous_format)

    def _along(self, name: str, expert: int | None, tensor: Tensor, first: int = 0) -> Tensor:
        for dim in range(first, tensor.dim()):
            mask = self.places.get((name, expert, dim))
            if mask is not None:
                tensor = tensor.index_select(dim, mask.nonzero().flatten().to(tensor.device))
        return tensor
