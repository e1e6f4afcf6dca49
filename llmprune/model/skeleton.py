"""A model without weights, made from its config alone."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmprune.errors import RequestError

# Keys of config.json that could make transformers fetch or choose code: never followed.
NOT_FOLLOWED = ("auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
MAX_LAYERS = 2_000
# What transformers raises when a config makes no model.
UNBUILDABLE = (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError, ImportError)


def build_skeleton(config: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM that a stored config describes: parameters on the meta device, other buffers (rotary tables) real.

    Raises RequestError for an unknown or unusable config, and for one whose weights are quantised.
    """
    if config.get("quantization_config") is not None:
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise RequestError(f"config.json: the weights are already quantised ({method})", "prune the unquantised checkpoint, then quantise")
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        hint = "it needs remote code, which is not run" if "auto_map" in config else "update transformers, or give a causal LM that it knows"
        raise RequestError(f"config.json: model_type {kind!r} is unknown to transformers", hint)
    layers = config.get("num_hidden_layers", config.get("n_layer", 1))
    if type(layers) is not int or not 0 < layers <= MAX_LAYERS:
        raise RequestError(f"config.json: num_hidden_layers is {layers!r}", f"1 to {MAX_LAYERS} blocks are sane")
    try:
        parsed = CONFIG_MAPPING[kind].from_dict({k: _floats(v) for k, v in config.items() if k not in NOT_FOLLOWED})
        if type(parsed) not in AutoModelForCausalLM._model_mapping:
            raise RequestError(f"config.json: model_type {kind!r} is no causal language model", "give a causal LM")
        exact = dict(_empty_model(parsed, torch.float32).named_buffers())
        model = _empty_model(parsed, dtype)
    except UNBUILDABLE as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise RequestError(f"config.json: transformers cannot build {kind!r} ({first[:160]})", "check the config against the checkpoint") from None
    for name, buffer in model.named_buffers():
        buffer.copy_(exact[name])  # as from_pretrained does: computed in float32, then rounded
    model.set_experts_implementation("eager")  # one product an expert, so that each can be watched
    return model.eval().requires_grad_(False)


def _floats(value: Any) -> Any:
    """config.json spells what JSON has no number for as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {k: _floats(v) for k, v in value.items()}
    return [_floats(v) for v in value] if isinstance(value, list) else value


def _empty_model(parsed: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(parsed, dtype=dtype, trust_remote_code=False)


def count_parameters(model: PreTrainedModel) -> int:
    """Numbers that a model holds; a weight that is tied to another one is the same, which a model without weights does not show."""
    tied = model.all_tied_weights_keys
    return sum(p.numel() for name, p in model.named_parameters() if name not in tied)
