"""Masks as a value: which weights of a model are kept, read from a result or from a model's zeros, applied and held.

Shapes: R = output rows, C = input columns; a mask has the shape of its parameter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from llmprune.errors import PromiseError, RequestError
from llmprune.maths.runs import places_of
from llmprune.model.blocks import Walk
from llmprune.model.matrices import Matrix, Selection, block_matrices
from llmprune.report.stored import read_run
from llmprune.results import BlockReport, Row
from llmprune.stream.live import LiveStream
from llmprune.stream.selected import stored_matrices
from llmprune.training.holding import Held, like, local

VALUES = "llmprune"  # the one entry of a file's metadata: JSON
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")  # names that DDP and torch.compile put before a parameter's own


@dataclass(frozen=True)
class Masks:
    """keep: bool tensors by parameter name, as in ``model.named_parameters()``; True = keep. Parameters without a mask are free.

    unrecorded: names of those whose every zero was taken as masked, since nothing says which of them were kept.
    """

    keep: Mapping[str, Tensor]
    unrecorded: tuple[str, ...] = ()

    @classmethod
    def of_zeros(cls, model: PreTrainedModel, names: Iterable[str] | None = None) -> Masks:
        """Every zero in the matrices of the decoder blocks is masked (without routers and the like, which are not pruned), or every zero of the
        named parameters.
        """
        chosen = dict.fromkeys(matrices_by_parameter(model)) if names is None else dict.fromkeys(names)
        found = parameters_of(model, chosen)
        return cls({name: whole(parameter) != 0 for name, parameter in found.items()}, tuple(found))

    @property
    def masked(self) -> int:
        """Weights that are masked."""
        return sum(int((~mask).sum()) for mask in self.keep.values())

    @property
    def weights(self) -> int:
        """Weights of all parameters that have a mask."""
        return sum(mask.numel() for mask in self.keep.values())

    @property
    def sparsity(self) -> float:
        """Share of them that is masked."""
        return self.masked / self.weights if self.weights else 0.0

    def fitted(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that have a mask. Raises RequestError for masks that do not fit the model."""
        found = parameters_of(model, self.keep)
        for name, mask in self.keep.items():
            if mask.shape != found[name].shape or mask.dtype != torch.bool:
                said = f"{list(mask.shape)} {str(mask.dtype).removeprefix('torch.')}"
                raise RequestError(f"{name}: the mask is {said}, the parameter {list(found[name].shape)}", "masks fit the model that they are of")
        return found

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set masked weights to exactly zero. Raises RequestError for masks that do not fit."""
        for name, parameter in self.fitted(model).items():
            local(parameter).masked_fill_(local(like(~self.keep[name], parameter)), 0)

    def check(self, model: nn.Module) -> None:
        """Raises PromiseError naming the first parameter whose masked weights are not all zero; RequestError for masks that do not fit."""
        for name, parameter in self.fitted(model).items():
            weights, mask = whole(parameter), self.keep[name].to(parameter.device)
            wrong = int(((weights != 0) & ~mask).sum())
            if wrong:
                raise PromiseError(f"{name}: {wrong:,} of {int((~mask).sum()):,} masked weights are not zero", "hold the masks while training")

    def hold(self, model: nn.Module, optimizer: Optimizer) -> Held:
        """From now on and at every step of the optimizer, masked weights are zero and have no gradient, and so are its moments for them; see
        training/holding.py. The result's ``remove`` ends it. Raises RequestError for masks that do not fit.
        """
        return Held(self.fitted(model), self.keep, optimizer)

    def holds(self, model: PreTrainedModel, n: int, m: int) -> bool:
        """Whether at most ``n`` of every ``m`` consecutive weights along the inputs are kept, in every matrix that has a mask."""
        views = (matrix.view_of(self.keep[name]) for name, found in matrices_by_parameter(model).items() if name in self.keep for matrix in found)
        return all(view_RC.shape[1] % m == 0 and bool((view_RC.reshape(-1, m).sum(1) <= n).all()) for view_RC in views)

    def to_bytes(self, **values: Any) -> bytes:
        """As a safetensors file. values: anything else that JSON can hold."""
        named = {name: mask.cpu().contiguous() for name, mask in self.keep.items()}
        return save(named, {VALUES: json.dumps({"unrecorded": self.unrecorded} | values, sort_keys=True)})

    @classmethod
    def read(cls, file: Path) -> Masks:
        """Of a file that has the bytes of ``to_bytes``. Raises RequestError."""
        try:
            with safe_open(file, "pt") as stored:
                keep = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  it is no dict
                unrecorded = tuple(json.loads((stored.metadata() or {}).get(VALUES, "{}")).get("unrecorded", ()))
        except (OSError, ValueError, SafetensorError) as error:
            raise RequestError(f"{file.name}: cannot be read ({str(error)[:120]})", "give a file of masks") from None
        if any(mask.dtype != torch.bool for mask in keep.values()):
            raise RequestError(f"{file.name}: holds no masks", "give a file of masks")
        return cls(keep, unrecorded)


def read_masks(folder: str | Path, model: PreTrainedModel) -> Masks:
    """The masks of a result, by the record in its llmprune.json and the zeros of ``model``, which was loaded from it. Zeros that the run kept are
    trainable; where no record says so (``unrecorded``) every zero of a pruned matrix is masked. A smaller model has no masks.

    Raises RequestError where there is no llmprune.json, or it is not about this model.
    """
    report = read_run(Path(folder))
    if report.smaller is not None:
        return Masks({})
    stream = LiveStream(model)
    keep: dict[str, Tensor] = {}
    unrecorded: dict[str, None] = {}
    for block in report.blocks:
        path, matrices = placed(stream, block)
        for row in block.rows:
            name = row.matrix.removeprefix(f"{block.block}.")
            if name not in matrices:
                raise RequestError(f"{row.matrix}: the model has no matrix of this name", "give the model that was loaded from the result")
            parameter = f"{path}.{matrices[name].parameter}"
            weights = model.get_parameter(parameter)
            mask = keep.setdefault(parameter, torch.ones_like(weights, dtype=torch.bool, device="cpu"))
            matrices[name].view_of(mask).copy_(kept_of(row, matrices[name].view_of(weights.detach())))
            unrecorded |= {} if row.kept_zeros is not None else {parameter: None}
    return Masks(keep, tuple(unrecorded))


def placed(stream: LiveStream, block: BlockReport) -> tuple[str, dict[str, Matrix]]:
    """(path, matrices by name) of a report's block in the model, or of the head. Raises RequestError for one that it does not have."""
    number, blocks = block.block.rpartition(".")[2], len(stream.names)
    index = int(number) if number.isdigit() else blocks
    if number.isdigit() and index >= blocks:
        raise RequestError(f"{block.block}: the model has {blocks} blocks", "give the model that was loaded from the result")
    path = stream.path_of(index)
    place = stream.walk.model.get_submodule(path)
    found = block_matrices(place) if index == blocks else stored_matrices(stream, index, place)
    return path, {matrix.name: matrix for matrix in found}


def kept_of(row: Row, view_RC: Tensor) -> Tensor:
    """bool [R, C]: the weights of one matrix that no mask holds. Raises RequestError where they are not those of its row."""
    other = RequestError(f"{row.matrix}: these are not the weights that llmprune.json is about", "give the model that was loaded from the result")
    if view_RC.shape != (row.rows, row.columns):
        raise other
    keep_RC = view_RC.cpu() != 0
    try:
        kept_RC = places_of(row.kept_zeros or (), view_RC.numel()).view(view_RC.shape)
    except ValueError:
        raise other from None
    if int((~keep_RC).sum()) < row.zeros - int(kept_RC.sum()):
        raise other
    return keep_RC | kept_RC


def matrices_by_parameter(model: PreTrainedModel, selection: Selection | None = None) -> dict[str, list[Matrix]]:
    """Full parameter name -> the matrices in it, of the decoder blocks, that the selection takes."""
    walk, selection = Walk(model), selection or Selection()
    found: dict[str, list[Matrix]] = {}
    for i, block in enumerate(walk.blocks):
        path = f"{walk.path}.{i}"
        for matrix in block_matrices(block):
            if selection.takes(f"{path}.{matrix.name}"):
                found.setdefault(f"{path}.{matrix.parameter}", []).append(matrix)
    return found


def parameters_of(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The named parameters of a model, which DDP or torch.compile may have wrapped. Raises RequestError for a name that it does not have."""
    own = dict(named_parameters(model))
    missing = [name for name in names if name not in own]
    if missing:
        raise RequestError(f"{missing[0]}: the model has no parameter of this name", "masks fit the model that they are of")
    return {name: own[name] for name in names}


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        yield WRAPPERS.sub("", name), parameter


def whole(parameter: Tensor) -> Tensor:
    """The values of a parameter, gathered where it is sharded."""
    return parameter.full_tensor().detach() if isinstance(parameter, DTensor) else parameter.detach()
