"""The residual stream rotated to its principal axes, without changing the model's outputs: a few of the new channels then carry most of what is read.

With RMS norms whose scales are folded into the matrices that read them, y = W (x / rms(x)), an orthogonal Q may rotate the stream
everywhere: writers become Q^T W, readers W Q, embeddings E Q. Q holds the eigenvectors of sum x x^T / rms(x)^2 over the inputs of all norms.
Ashkboos et al., SliceGPT, https://arxiv.org/abs/2401.15024; there each block has different axes, which plain checkpoints cannot express.

Shapes: D = residual channels, T = tokens, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmprune.checkpoint.files import to_json, write_whole
from llmprune.checkpoint.named_code import copy_beside
from llmprune.checkpoint.shards import Shape, Shards
from llmprune.checkpoint.source import DTYPES, Source, open_folder
from llmprune.errors import RequestError
from llmprune.model.families.table import Residual
from llmprune.model.matrices import block_matrices
from llmprune.statistics.norms import effective_scale, norm_scales
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.flow import Flow
from llmprune.stream.stream import Stream
from llmprune.structured.spaces import Axis, Space, required, spaces_of, tensors_of
from llmprune.types import Listener, accumulate

WINDOWS = 64  # that the axes are found on
AT_ONCE = 8  # windows that show which norm feeds which matrix
Folded = dict[str, Tensor]  # path of a matrix's parameter -> scale of the norm before it, [D]


def check_rotation(config: PreTrainedConfig) -> Residual:
    """The family's stream. Raises RequestError where norms are anywhere else than before the readers of the stream."""
    stream = required(config, "hidden").residual
    assert stream is not None  # families that do not refuse the pattern have it
    if stream.inner_norms or stream.bare:
        reason = "it normalises what is added to the residual stream, channel by channel"
        raise RequestError(f"{config.model_type} cannot be rotated: {reason}", "leave --rotate out")
    return stream


@torch.no_grad()
def rotate(stream: CheckpointStream, windows_NL: Tensor, folder: Path, listen: Listener) -> Source:
    """Write the rotated checkpoint into an empty folder. A head that shares the embeddings' weight gets a separate one."""
    model, source, loader = stream.skeleton, stream.source, stream.loader
    residual = check_rotation(model.config)
    axes_DD = principal_axes(stream, residual, windows_NL[:WINDOWS])
    embeddings, head = f"{stream.walk.embeddings_path}.weight", f"{stream.walk.head_path}.weight"
    keys = {name: loader.keys_of.get(name, [name])[0] for name in (embeddings, residual.last_norm, head)}
    shapes = {key: Shape(entry.dtype, entry.shape) for key, entry in source.tensors.items() if key in loader.parameter_of}
    shapes.setdefault(keys[head], shapes[keys[embeddings]])
    shards = Shards(folder, shapes)
    flow = Flow(stream, windows_NL[:AT_ONCE], size=AT_ONCE)
    for index in range(len(stream.names)):
        with stream.block(index) as block:
            flow.outputs[0] = flow.run(index, block, 0)
            (space,) = spaces_of(model.config, index, block, "hidden")
            rotate_block(flow, index, block, space, residual, axes_DD)
            names = [f"{stream.path_of(index)}.{name}" for name, _ in block.named_parameters()]
            shards.put(loader.checkpoint_tensors(name for name in names if name in loader.keys_of))
            buffers = [f"{stream.path_of(index)}.{name}" for name, _ in block.named_buffers()]
            shards.put(source.read_many([key for name in buffers for key in loader.keys_of.get(name, [])]))
        flow.advance()
        listen.progress("rotate", index + 1, len(stream.names))
    with stream.outer():
        turned = rotated_outer(model, residual, embeddings, head, axes_DD)
    shards.put({keys[name]: tensor.to("cpu", DTYPES[shapes[keys[name]].dtype]) for name, tensor in turned.items()})
    for key in set(loader.outer_keys) - set(keys.values()):
        shards.put(source.read_many([key]))
    shards.sync()
    write_whole(folder / "config.json", to_json(source.config | {"tie_word_embeddings": False}))
    copy_beside(source.folder, folder)
    return open_folder(folder, source.name, source.revision)


@torch.no_grad()
def principal_axes(stream: Stream, residual: Residual, windows_NL: Tensor) -> Tensor:
    """Q [D, D] in float64, the channels with the most energy first."""
    flow = Flow(stream, windows_NL)
    sums: dict[str, Tensor] = {}

    def accumulate_axes(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden_TD = (given[0] if given else named["hidden_states"]).flatten(0, -2).float()
        unit_TD = hidden_TD * hidden_TD.square().mean(1, keepdim=True).add(1e-12).rsqrt()
        accumulate(sums, "DD", unit_TD.T @ unit_TD)

    for index in range(len(stream.names)):
        with stream.block(index) as block:
            norms = [block.get_submodule(path) for path in present(block, residual.norms)]
            handles = [norm.register_forward_pre_hook(accumulate_axes, with_kwargs=True) for norm in norms]
            flow.through(index, block)
            for handle in handles:
                handle.remove()
    for batch in range(len(flow)):
        accumulate_axes(nn.Identity(), (flow.hidden[batch].to(sums["DD"].device),), {})
    return torch.linalg.eigh(sums["DD"].double().cpu()).eigenvectors.flip(1)


def present(block: nn.Module, paths: Sequence[str]) -> list[str]:
    """Those of the modules that a block has."""
    names = {name for name, _ in block.named_modules()}
    return [path for path in paths if path in names]


@torch.no_grad()
def rotate_block(flow: Flow, index: int, block: nn.Module, space: Space, residual: Residual, axes_DD: Tensor) -> None:
    """Fold and rotate one block in place. Raises RequestError where something reads the stream without a norm."""
    matrices = block_matrices(block)
    scales = norm_scales(block, matrices, partial(flow.run, index, block, 0))
    folded = {m.parameter: scales[m.name] for m in matrices if m.name in scales}
    columns = {m.parameter: (0 if m.transposed else 1) + (m.expert is not None) for m in matrices}
    readers = {axis.parameter for axis in space.axes if columns.get(axis.parameter) == axis.dim}
    bare = sorted(readers - folded.keys())
    if bare:
        raise RequestError(f"{flow.stream.path_of(index)}.{bare[0]}: no norm alone feeds it, so the stream cannot be rotated", "leave --rotate out")
    norms = {name for path in present(block, residual.norms) for name in tensors_of(block) if name.startswith(f"{path}.")}
    turn(block, space.axes, {name: folded[name] for name in readers}, norms, residual.plus_one, axes_DD)


@torch.no_grad()
def rotated_outer(model: PreTrainedModel, residual: Residual, embeddings: str, head: str, axes_DD: Tensor) -> dict[str, Tensor]:
    """Embeddings, last norm and head, folded and rotated, by name; the head no longer shares the embeddings' weight."""
    norm = model.get_submodule(residual.last_norm.removesuffix(".weight"))
    scale_D, axes_DD = effective_scale(norm).double(), axes_DD.to(norm.get_parameter("weight").device)
    ones_D = torch.full_like(norm.get_parameter("weight"), 0.0 if residual.plus_one else 1.0)
    embedded_VD, head_VD = (model.get_parameter(name).double() for name in (embeddings, head))
    return {embeddings: embedded_VD @ axes_DD, residual.last_norm: ones_D, head: (head_VD * scale_D) @ axes_DD}


def turn(module: nn.Module, axes: Sequence[Axis], folded: Folded, norms: set[str], plus_one: bool, axes_DD: Tensor) -> None:
    tensors = tensors_of(module)
    for axis in axes:
        tensor = tensors[axis.parameter].data
        if axis.parameter in norms:
            tensor.fill_(0.0 if plus_one else 1.0)
            continue
        last = tensor.movedim(axis.dim, -1).double()
        if axis.parameter in folded:
            last = last * folded[axis.parameter].double().to(last.device)
        tensor.copy_((last @ axes_DD.to(last.device)).movedim(-1, axis.dim))
