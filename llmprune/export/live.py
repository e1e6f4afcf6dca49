"""A live model made smaller: a new model of the remaining sizes, with the old one's tensors."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmprune.errors import RequestError
from llmprune.export.config import READABLE, Export, export
from llmprune.model.blocks import find_blocks
from llmprune.model.skeleton import OWN_SIZES, build_skeleton, own_sizes
from llmprune.structured.derived_units import named_spaces
from llmprune.structured.slicing import Keeps, empty_block, slice_parameters
from llmprune.structured.spaces import Space, outer_space


def slice_model(model: PreTrainedModel, keeps: Sequence[Keeps], kept_layers: Sequence[int] | None = None) -> PreTrainedModel:
    """A working model without the dropped units and layers; ``model`` is unchanged.

    keeps: for each block, space name -> sorted numbers of the kept units. Tensors outside the blocks are shared with ``model``.
    With one size for all layers it saves and loads like any model; with several, use ``save_sliced``.
    Raises RequestError for sizes that cannot be saved, and for an architecture without a table.
    """
    smaller, _ = sliced_with_export(model, keeps, kept_layers)
    return smaller


def save_sliced(model: PreTrainedModel, folder: Path, keeps: Sequence[Keeps], kept_layers: Sequence[int] | None = None) -> Export:
    """Save a smaller model with everything needed to load it; returns the content of its config."""
    smaller, exported = sliced_with_export(model, keeps, kept_layers)
    write_sliced(smaller, exported, folder)
    return exported


def write_sliced(smaller: PreTrainedModel, exported: Export, folder: Path) -> None:
    """Save the two values of ``sliced_with_export``."""
    smaller.save_pretrained(folder)
    for name, text in exported.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if exported.per_layer:
        _as_exported(folder / "config.json", exported)


def sliced_with_export(model: PreTrainedModel, keeps: Sequence[Keeps], kept_layers: Sequence[int] | None = None) -> tuple[PreTrainedModel, Export]:
    """``slice_model``, and what its config and the files beside it would contain."""
    path = find_blocks(model)
    blocks: nn.ModuleList = model.get_submodule(path)  # type: ignore[assignment]
    kept = list(range(len(blocks)) if kept_layers is None else kept_layers)
    source = model.config.to_dict()
    spaces = named_spaces(model, path, {name for cut in keeps for name in cut}, own_sizes(source))
    exported = export(source, model, path, spaces, keeps, kept)
    smaller = empty_model(model, exported, path, spaces, keeps, kept)
    _compute_alike(model, smaller)
    state = _outside(model, path, keeps)
    for new, old in enumerate(kept):
        state |= {f"{path}.{new}.{name}": tensor for name, tensor in slice_parameters(blocks[old], spaces[old], keeps[old]).items()}
    _fill(smaller, state, model.all_tied_weights_keys)
    _take_over(model, smaller, path, kept)
    return smaller, exported


def empty_model(
    model: PreTrainedModel,
    exported: Export,
    path: str,
    spaces: Sequence[Sequence[Space]],
    keeps: Sequence[Keeps],
    kept: Sequence[int],
) -> PreTrainedModel:
    """A model of the exported sizes without weights (parameters on the meta device); ``model`` may be without weights too."""
    replaced = ("auto_map", OWN_SIZES) if exported.per_layer else ("auto_map",)
    uniform = {name: value for name, value in exported.config.items() if name not in replaced}
    smaller = build_skeleton(uniform, model.dtype)
    if not exported.per_layer:
        return smaller
    blocks: nn.ModuleList = model.get_submodule(path)  # type: ignore[assignment]
    own: nn.ModuleList = smaller.get_submodule(path)  # type: ignore[assignment]
    for new, old in enumerate(kept):
        if keeps[old]:
            own[new] = empty_block(blocks[old], smaller.config, new, spaces[old], keeps[old])
    smaller.config.update({"auto_map": exported.config["auto_map"], "architectures": exported.config["architectures"]})
    smaller.config.per_layer_config = exported.config[OWN_SIZES]
    smaller.config.allow_global_per_layer_attribute_access = True
    return smaller


def _as_exported(file: Path, exported: Export) -> None:
    """A live model's config has another class, which allows reading the one size of the whole model."""
    stored = {name: value for name, value in json.loads(file.read_text(encoding="utf-8")).items() if name != READABLE}
    stored |= {name: exported.config[name] for name in ("architectures", READABLE) if name in exported.config}
    file.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def _outside(model: PreTrainedModel, path: str, keeps: Sequence[Keeps]) -> dict[str, Tensor]:
    """The tensors outside the blocks, with the residual channels that every block keeps."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{path}.")}
    hidden = [cut["hidden"] for cut in keeps if "hidden" in cut]
    if not hidden:
        return state
    if len(hidden) < len(keeps) or any(not torch.equal(keep, hidden[0]) for keep in hidden):
        raise RequestError("hidden: not the same residual channels in every block", "give every block the same")
    space = outer_space(model)
    cut = slice_parameters(model, [space], {"hidden": hidden[0]}, [axis.parameter for axis in space.axes])
    tied = {target: cut[source] for target, source in model.all_tied_weights_keys.items() if source in cut}
    return state | cut | tied


def _compute_alike(model: PreTrainedModel, smaller: PreTrainedModel) -> None:
    """Kernels and generation settings of the old model. Layers of different sizes have separate configs."""
    smaller.generation_config = copy.deepcopy(model.generation_config)
    smaller.set_attn_implementation(model.config._attn_implementation)
    smaller.set_experts_implementation(model.config._experts_implementation)
    for module in smaller.modules():
        own = vars(module).get("config")
        if isinstance(own, PreTrainedConfig) and own is not smaller.config:
            own._attn_implementation = smaller.config._attn_implementation
            own._experts_implementation = smaller.config._experts_implementation


def _fill(smaller: PreTrainedModel, state: dict[str, Tensor], tied: dict[str, str]) -> None:
    """tied: parameters that share a tensor in the old model, which may be fewer than its config says."""
    smaller.load_state_dict(state, assign=True)
    smaller.all_tied_weights_keys = dict(tied)
    smaller.tie_weights(recompute_mapping=False)


def _take_over(model: PreTrainedModel, smaller: PreTrainedModel, path: str, kept: Sequence[int]) -> None:
    """Device, every module's mode, and which parameters are trained."""
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(model.get_parameter(_old_name(name, path, kept)).requires_grad)
    smaller.to(model.device)  # type: ignore[arg-type]
    for name, module in smaller.named_modules():
        module.training = model.get_submodule(_old_name(name, path, kept)).training


def _old_name(name: str, path: str, kept: Sequence[int]) -> str:
    """The name of the smaller model's parameter or module in the whole model."""
    if not name.startswith(f"{path}."):
        return name
    number, dot, rest = name.removeprefix(f"{path}.").partition(".")
    return f"{path}.{kept[int(number)]}{dot}{rest}"
