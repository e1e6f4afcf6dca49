"""From masked blocks to a smaller checkpoint: the dropped units are cut out block by block, under the checkpoint's own names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from llmprune.checkpoint.files import to_json, write_whole
from llmprune.checkpoint.loader import Loader
from llmprune.checkpoint.named_code import copy_beside
from llmprune.checkpoint.names import revert
from llmprune.checkpoint.shards import Shape, Shards
from llmprune.checkpoint.source import DTYPES
from llmprune.errors import ConversionError
from llmprune.export.config import Export
from llmprune.structured.slicing import Keeps, slice_parameters
from llmprune.structured.spaces import Space, tensors_of

OuterOf = Callable[[], AbstractContextManager[None]]
BlockOf = Callable[[int], AbstractContextManager[nn.Module]]
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Cutter:
    """Cuts the blocks of a checkpoint and names the resulting tensors. keeps: of each block; kept: the blocks that are kept; outer: the space of the
    residual channels outside the blocks, where those are cut.
    """

    def __init__(
        self,
        loader: Loader,
        path: str,
        spaces: Sequence[Sequence[Space]],
        keeps: Sequence[Keeps],
        kept: Sequence[int],
        outer: Space | None = None,
    ) -> None:
        self.loader = loader
        self.path = path
        self.spaces = spaces
        self.keeps = keeps
        self.kept = kept
        self.outer = outer

    def shapes(self) -> dict[str, Shape]:
        """Every tensor of the smaller checkpoint, without reading any: blocks that are not loaded have shapes too."""
        changed, stored = self.outside(self.changed()), self.loader.source.tensors
        outside = [(key, changed.get(key)) for key in self.loader.outer_keys]
        found = {key: Shape(stored[key].dtype, stored[key].shape) if t is None else _shape(t) for key, t in outside}
        for new, old in enumerate(self.kept):
            block = self.loader.skeleton.get_submodule(f"{self.path}.{old}")
            found |= {key: _shape(t) for key, t in self.tensors(new, block).items()}
        return found

    def fill(self, shards: Shards, block_of: BlockOf, outer_of: OuterOf) -> None:
        """Write every tensor, with one block in memory at a time."""
        if changed := self.changed():
            with outer_of():
                shards.put({key: tensor.cpu() for key, tensor in self.outside(changed).items()})
        for key in self.unchanged():
            shards.put({key: self.loader.source.read(key)})
        for new, old in enumerate(self.kept):
            with block_of(old) as block:
                shards.put({key: tensor.cpu() for key, tensor in self.tensors(new, block).items()})

    def unchanged(self) -> list[str]:
        """The checkpoint's tensors outside the blocks that are saved as they are stored: those that are not loaded, or all where none is cut."""
        loader, unused = self.loader, set(self.loader.unused_keys)
        written = loader.sink.written if loader.sink else ()
        return [k for k in loader.outer_keys if k in unused or (self.outer is None and k not in loader.converted and k not in written)]

    def changed(self) -> list[str]:
        """The other tensors outside the blocks."""
        return sorted(set(self.loader.outer_keys).difference(self.unchanged()))

    def tensors(self, new: int, block: nn.Module) -> dict[str, Tensor]:
        """The cut block that becomes number ``new``, as checkpoint tensors in their stored dtype."""
        old = self.kept[new]
        plain: dict[str, Tensor] = {}
        merged: dict[str, Tensor] = {}
        for name, tensor in slice_parameters(block, self.spaces[old], self.keeps[old]).items():
            parameter = f"{self.path}.{old}.{name}"
            keys = self.loader.keys_of.get(parameter, [])
            if not keys:  # computed by the model itself
                continue
            dtype = self.loader.stored_dtype(parameter)
            if self.loader.converted.isdisjoint(keys):
                plain[self._renumbered(keys[0], old, new)] = tensor.to(dtype)
            else:
                merged[f"{self.path}.{new}.{name}"] = tensor.to(dtype)
        return plain | (self._reverted(merged) if merged else {})

    def outside(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """These tensors outside the blocks, cut, as checkpoint tensors in their stored dtype."""
        space, model, found = self.outer, self.loader.skeleton, {}
        cut: dict[str, Tensor] = {}
        if space is not None:
            cut = slice_parameters(model, [space], self.keeps[0], [axis.parameter for axis in space.axes])
        for key in keys:
            name = self.loader.parameter_of[key]
            name = self.loader.tied.get(name, name)
            found[key] = (cut[name] if name in cut else tensors_of(model)[name].detach()).to(DTYPES[self.loader.source.tensors[key].dtype])
        return found

    def _reverted(self, merged: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor.contiguous() for key, tensor in revert(self.loader.skeleton, merged).items()}

    def _renumbered(self, key: str, old: int, new: int) -> str:
        name = re.escape(self.path.rpartition(".")[2])
        changed, count = re.subn(rf"((?:^|\.){name}\.){old}\.", rf"\g<1>{new}.", key, count=1)
        if not count:  # checkpoints may have another name for the list
            changed, count = re.subn(rf"(\.\w+\.){old}\.", rf"\g<1>{new}.", key)
        if count != 1:
            raise ConversionError(f"{key}: does not name block {old} of {self.path}", "report this architecture")
        return changed


def _shape(tensor: Tensor) -> Shape:
    return Shape(NAMES[tensor.dtype], tuple(tensor.shape))


def write_smaller(folder: Path, cutter: Cutter, exported: Export, block_of: BlockOf, outer_of: OuterOf) -> int:
    """The whole smaller checkpoint in an empty folder; bytes of its weight files."""
    shards = Shards(folder, cutter.shapes())
    cutter.fill(shards, block_of, outer_of)
    shards.sync()
    write_whole(folder / "config.json", to_json(exported.config))
    for name, text in exported.files.items():
        write_whole(folder / name, text.encode())
    copy_beside(cutter.loader.source.folder, folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def parameters_of(cutter: Cutter) -> int:
    """Parameters of the smaller checkpoint."""
    return sum(torch.Size(shape.shape).numel() for shape in cutter.shapes().values())
