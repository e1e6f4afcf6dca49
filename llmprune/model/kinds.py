"""What a config, or a model in memory, is where it is not a causal language model with weights of its own."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from llmprune.errors import RequestError

CAUSAL = "give a causal language model: its perplexity is of the next token"


def check_causal(config: PreTrainedConfig) -> None:
    """Raises RequestError for an encoder-decoder, and for a model whose attention sees the tokens that it should predict.

    transformers builds such configs as causal models too: as a decoder without its encoder, or with attention in both directions.
    """
    kind, text = config.model_type, config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise RequestError(f"config.json: model_type {kind!r} with is_encoder_decoder is an encoder-decoder, not a causal language model", CAUSAL)
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or kind == "bert-generation"
    if masked and (getattr(config, "is_decoder", None) is False or getattr(config, "causal", None) is False):
        raise RequestError(f"config.json: model_type {kind!r} without is_decoder is a masked language model (bidirectional)", CAUSAL)
    if getattr(config, "attn_type", None) == "bi":
        raise RequestError(f"config.json: {kind!r} with attn_type 'bi' is not a causal language model: every token sees the later ones", CAUSAL)
    if getattr(text, "use_bidirectional_attention", None) is True:
        raise RequestError(f"config.json: {kind!r} with use_bidirectional_attention is not a causal language model", CAUSAL)


def check_live(model: nn.Module) -> PreTrainedModel:
    """The model itself. Raises RequestError for one in memory that is no causal language model of transformers, or whose weights are not plain."""
    name = type(model).__name__
    if any(of_peft(module) for module in model.modules()):
        raise RequestError(f"{name}: has adapters of peft", "merge them first: model = model.merge_and_unload()")
    if not isinstance(model, PreTrainedModel):
        raise RequestError(f"{name}: is not a transformers model", "give a causal language model; of a compiled or parallel one the model inside")
    check_causal(model.config)
    if model.get_output_embeddings() is None:
        raise RequestError(f"{name}: has no language model head", "load it by AutoModelForCausalLM")
    if "quantization_config" in model.config.to_dict():
        raise RequestError(f"{name}: its weights are quantised", "load it in full precision, or model.dequantize() it")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RequestError(f"{name}: some weights are on the meta device", "load them, without offloading to disk; or prune the checkpoint's folder")
    return model


def of_peft(module: Any) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


def values_per_token(config: PreTrainedConfig) -> int:
    """The values that pass from block to block for each token: of all its residual streams, if it has several (Gemma 3n)."""
    text = config.get_text_config(decoder=True)
    width: int = text.hidden_size
    return width * (getattr(text, "altup_num_inputs", None) or 1)


def begins_with_bos(config: PreTrainedConfig) -> bool:
    """Whether texts of a family all begin with BOS, and its predictions break without it: Gemma."""
    return "gemma" in config.get_text_config(decoder=True).model_type


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """Returns how many tokens a window may have; None where the config names no limit, or where it says so by -1 (xlnet)."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if positions == -1 else positions
