"""Gated FFN and grouped-query attention from separate matrices: Llama and its many relatives."""

from __future__ import annotations

from transformers import PreTrainedConfig

from llmprune.model.families.table import Family, Part, Table, attention, feed_forward

MLP = feed_forward("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")
NORMS_OVER_HEADS = {
    "query_norms": (("self_attn.q_norm.weight", "self_attn.q_proj"),),
    "key_norms": (("self_attn.k_norm.weight", "self_attn.k_proj"),),
}


def plain(config: PreTrainedConfig) -> Family:
    return Family((MLP, *attention(config)))


def llama(config: PreTrainedConfig) -> Family:
    """Mistral computes the same from the same tensors, and takes any head count; its matrices have no biases."""
    free = not (config.attention_bias or config.mlp_bias)
    return Family((MLP, *attention(config)), divides=True, substitute="mistral" if free else None)


def gemma(config: PreTrainedConfig) -> Family:
    return Family((MLP, *attention(config)), divides=True)


def olmo2(config: PreTrainedConfig) -> Family:
    """Queries and keys are normalised over all heads at once."""
    queries = ("self_attn.q_proj", "self_attn.q_norm")
    keys = ("self_attn.k_proj", "self_attn.k_norm", "self_attn.v_proj")
    return Family((MLP, *attention(config, queries, keys, **NORMS_OVER_HEADS)))


def phi3(config: PreTrainedConfig) -> Family:
    """Gate and up in one matrix; queries, keys, values of all heads in another."""
    mlp = feed_forward("mlp.down_proj", Part("mlp.gate_up_proj", copies=2))
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries = (Part("self_attn.qkv_proj", widths=(size,)),)
    whole = (Part("self_attn.qkv_proj", widths=(heads // groups * size, size, size)),)
    return Family((mlp, *attention(config, queries, whole=whole)))


def starcoder2(config: PreTrainedConfig) -> Family:
    return Family((feed_forward("mlp.c_proj", "mlp.c_fc"), *attention(config)))


TABLES: dict[str, Table] = {
    "llama": llama,
    "mistral": plain,
    "qwen2": plain,
    "qwen3": plain,
    "gemma2": gemma,
    "gemma3_text": gemma,
    "granite": plain,
    "smollm3": plain,
    "cohere2": plain,
    "olmo2": olmo2,
    "phi3": phi3,
    "starcoder2": starcoder2,
}
