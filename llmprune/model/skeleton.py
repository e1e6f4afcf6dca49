"""A model without weights, made from its config alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmprune.errors import RequestError, out_of_memory
from llmprune.model.blocks import find_blocks
from llmprune.model.kinds import check_causal
from llmprune.model.wrappers import auto_class, check_text

# Keys of config.json that could make transformers fetch or choose code: never followed.
NOT_FOLLOWED = ("auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
# How layers of different sizes are stored (export/config.py); the sizes are followed, the code beside them is not.
MODULE = "modeling_pruned"
OWN_SIZES = "per_layer_config"
# Without it plain loading stops at the first size that differs. But configs always check their head count against the hidden size when they
# are read; another number of heads stops plain loading by the tensors' shapes.
READABLE = "allow_global_per_layer_attribute_access"
MAX_LAYERS = 2_000
PER_BLOCK = 4  # layers that a config may count for one block: its attentions, or its rounds
# What transformers raises when no model can be built from a config.
UNBUILDABLE = (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError, ImportError)


def build_skeleton(config: dict[str, Any], dtype: torch.dtype, stored: int = MAX_LAYERS) -> PreTrainedModel:
    """The causal LM that a stored config describes: parameters on the meta device, other buffers (rotary tables) real.

    stored: blocks that the weights hold, so that nothing is built for more. Raises RequestError for an unknown or unusable config.
    """
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        hint = "it needs remote code, which is not run" if "auto_map" in config else "update transformers, or give a causal LM that it knows"
        raise RequestError(f"config.json: model_type {kind!r} is unknown to transformers", hint)
    check_layers(config.get("num_hidden_layers", config.get("n_layer", 1)), PER_BLOCK * stored, stored)
    try:
        own = own_sizes(config)
        left_out = (*NOT_FOLLOWED, *((OWN_SIZES, READABLE) if own else ()))
        parsed = CONFIG_MAPPING[kind].from_dict({k: _floats(v) for k, v in config.items() if k not in left_out})
        layers = getattr(parsed.get_text_config(decoder=True), "num_hidden_layers", 1)  # under whatever name this kind of config has it
        check_layers(layers, PER_BLOCK * stored, stored)
        check_depths(parsed)
        if type(parsed) not in auto_class(kind)._model_mapping:
            raise RequestError(f"config.json: model_type {kind!r} is not a causal language model", "give a causal LM")
        check_causal(parsed)
        exact = _empty_model(parsed, torch.float32, own)
        model = exact if dtype == torch.float32 else _empty_model(parsed, dtype, own)
    except UNBUILDABLE as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        hint = "check its sizes against the checkpoint, or free some memory" if out_of_memory(error) else "check the config against the checkpoint"
        raise RequestError(f"config.json: transformers cannot build {kind!r} ({first[:160]})", hint) from None
    check_text(model)
    blocks: Any = model.get_submodule(find_blocks(model))
    check_layers(len(blocks), stored, stored)
    buffers = dict(exact.named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])  # as from_pretrained does: computed in float32, then rounded
    model.set_experts_implementation("eager")  # one product per expert, so that each can be watched
    return model.eval().requires_grad_(False)


def own_sizes(config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Block -> the sizes in which it differs, as a cut has stored them. Other models have sizes per layer too, and read them themselves."""
    pruned = str((config.get("auto_map") or {}).get("AutoModelForCausalLM")).startswith(f"{MODULE}.")
    return {int(i): dict(sizes) for i, sizes in config[OWN_SIZES].items()} if pruned else {}


def check_layers(layers: Any, most: int, stored: int) -> None:
    """A plausible number of blocks, at most as many as the weights can have; RequestError otherwise."""
    if type(layers) is not int or not 0 < layers <= MAX_LAYERS:
        raise RequestError(f"config.json: num_hidden_layers is {layers!r}", f"1 to {MAX_LAYERS} blocks are supported")
    if layers > most:
        raise RequestError(
            f"config.json: num_hidden_layers is {layers}, the weights hold {stored} blocks: all tensors missing from block {stored} on",
            "the checkpoint is incomplete, or its config belongs to another; fetch it again",
        )


def check_depths(config: PreTrainedConfig) -> None:
    """A plausible number of blocks in every part of a model that has a config of its own; RequestError otherwise."""
    for part in config.sub_configs:
        for field in ("num_hidden_layers", "depth"):
            layers = getattr(getattr(config, part, None), field, None)
            if type(layers) is int and layers > MAX_LAYERS:
                raise RequestError(f"config.json: {part}.{field} is {layers}", f"up to {MAX_LAYERS} blocks are supported")


def _floats(value: Any) -> Any:
    """config.json writes numbers that JSON lacks as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {k: _floats(v) for k, v in value.items()}
    return [_floats(v) for v in value] if isinstance(value, list) else value


def _empty_model(parsed: PreTrainedConfig, dtype: torch.dtype, own: dict[int, dict[str, Any]]) -> PreTrainedModel:
    """own: config fields of the layers whose values differ from the model's."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto_class(parsed.model_type).from_config(parsed, dtype=dtype, trust_remote_code=False)
        blocks: Any = model.get_submodule(find_blocks(model)) if own else []
        for index, sizes in own.items():
            layer = copy.copy(model.config)
            for name, value in sizes.items():
                setattr(layer, name, value)
            blocks[index] = type(blocks[index])(layer, index).to(dtype)
    return model


def count_parameters(model: PreTrainedModel) -> int:
    """The number of parameters; a tied weight counts once, although a model without weights does not show the tie."""
    tied = model.all_tied_weights_keys
    return sum(p.numel() for name, p in model.named_parameters() if name not in tied)
