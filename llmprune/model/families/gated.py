"""Gated FFN and grouped-query attention from separate matrices: Llama and its many relatives."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from llmprune.model.families.table import CENTRED, Family, Part, Scale, Table, attention, feed_forward, head_size, residual

MLP = feed_forward("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")
READS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
WRITES = ("self_attn.o_proj", "mlp.down_proj")
LONG = "its config checks the long rotary factors against hidden size / heads"
NORMS = ("input_layernorm", "post_attention_layernorm")


def plain(config: PreTrainedConfig) -> Family:
    return Family((MLP, *attention(config)), residual=residual(config, READS, WRITES, NORMS))


def llama(config: PreTrainedConfig) -> Family:
    """Mistral computes the same from the same tensors, and accepts any head count; its matrices have no biases."""
    free = not (config.attention_bias or config.mlp_bias)
    return replace(plain(config), divides=True, substitute="mistral" if free else None)


def gemma(config: PreTrainedConfig) -> Family:
    stream = residual(
        config,
        READS,
        WRITES,
        ("input_layernorm", "pre_feedforward_layernorm"),
        inner_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        plus_one=True,
        scaled_embeddings=True,
    )
    return Family((MLP, *attention(config)), residual=stream, divides=True)


def cohere2(config: PreTrainedConfig) -> Family:
    return Family((MLP, *attention(config)), {"hidden": CENTRED})


def olmo2(config: PreTrainedConfig) -> Family:
    """Queries and keys are normalised over all heads at once; the residual stream is not normalised."""
    cuts = attention(
        config,
        ("self_attn.q_proj", "self_attn.q_norm"),
        ("self_attn.k_proj", "self_attn.k_norm", "self_attn.v_proj"),
        query_scales=(Scale("self_attn.q_proj", 1), Scale("self_attn.q_norm", -1)),
        key_scales=(Scale("self_attn.k_proj", 1), Scale("self_attn.k_norm", -1)),
    )
    inner = ("post_attention_layernorm", "post_feedforward_layernorm")
    return Family((MLP, *cuts), residual=residual(config, READS, WRITES, (), inner_norms=inner, bare=True))


def phi3(config: PreTrainedConfig) -> Family:
    """Gate and up in one matrix; queries, keys, values of all heads in another."""
    mlp = feed_forward("mlp.down_proj", Part("mlp.gate_up_proj", copies=2))
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = head_size(config)
    queries = (Part("self_attn.qkv_proj", widths=(size,)),)
    whole = (Part("self_attn.qkv_proj", widths=(heads // groups * size, size, size)),)
    stream = residual(config, ("self_attn.qkv_proj", "mlp.gate_up_proj"), WRITES, NORMS)
    long = dict.fromkeys(("heads", "kv-groups", "hidden"), LONG) if config.rope_parameters["rope_type"] == "longrope" else {}
    return Family((mlp, *attention(config, queries, whole=whole)), long, residual=stream)


def starcoder2(config: PreTrainedConfig) -> Family:
    return Family((feed_forward("mlp.c_proj", "mlp.c_fc"), *attention(config)), {"hidden": CENTRED})


TABLES: dict[str, Table] = {
    "llama": llama,
    "mistral": plain,
    "qwen2": plain,
    "qwen3": plain,
    "gemma2": gemma,
    "gemma3_text": gemma,
    "granite": plain,
    "smollm3": plain,
    "cohere2": cohere2,
    "olmo2": olmo2,
    "phi3": phi3,
    "starcoder2": starcoder2,
}
