"""Tiny random models of every causal-LM type: small numbers in the fields of its config that have their usual names (TINY), and what single types
need besides (SPECIAL).
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 96
# value: the fields that get it, in every config that has them
TINY = """
1: mamba_n_groups n_groups attn_layer_offset num_random_blocks n_shared_experts num_shared_experts moe_num_shared_experts zero_expert_num
    n_input_layers n_recurrent_layers n_output_layers n_group topk_group indexer_kv_heads moe_num_experts_shared
2: encoder_layers num_encoder_layers num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k top_k_experts kv_n_heads moe_top_k
    linear_num_key_heads swa_num_key_value_heads encoder_attention_heads num_encoder_attention_heads index_n_heads n_mamba_heads hc_mult
    first_k_dense_replace num_dense_layers mamba_expand expand sliding_window_pattern indexer_n_heads layer_group_size n_layers_per_attn_res_block
    num_layers_per_stack attn_layer_period altup_num_inputs num_kv_shared_layers o_groups topk_method_group no_rope_layer_interval
4: num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks num_attention_heads n_head n_heads num_heads
    attention_heads decoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_experts n_routed_experts num_local_experts
    moe_num_experts linear_num_value_heads linear_num_heads mamba_num_heads mamba_n_heads rotary_dim laurel_rank loop_gate_rank gated_norm_rank
    conv_kernel_size num_attention_heads_per_layer_kv depth layers
8: head_dim swa_head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim mamba_head_dim
    mamba_d_head mamba_headdim dim_head d_head kv_channels index_head_dim mamba_d_state state_size ssm_state_size chunk_size mamba_chunk_size
    sliding_window sliding_window_size attention_window_size window_size attention_chunk_size hidden_size_per_layer_input d_rel rel_extent
    index_topk block_size local_attention d_kv hc_lowrank global_head_dim indexer_head_dim keep_window_size attention_head_size block_multiple_of
16: q_lora_rank kv_lora_rank o_lora_rank embedding_size moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size
    moe_shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size
32: hidden_size d_model n_embd dim_model input_embedding_size output_embedding_size emb_dim lru_width attention_hidden_size embedding_dim
    backbone_hidden_size word_embed_proj_dim cross_attention_hidden_size out_hidden_size embed_dim projection_dim projector_hidden_size
    text_hidden_size
48: intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff d_inner ffn_hidden_size dim_ff prefix_dense_intermediate_size
    intermediate_size_mlp dense_intermediate_size feed_forward_size
64: max_position_embeddings n_positions n_ctx max_seq_len context_length mamba_d_ssm original_max_position_embeddings max_target_positions
96: vocab_size vocab_size_per_layer_input unpadded_vocab_size output_vocab_size decoder_vocab_size
"""
FIELDS = {name: int(value) for value, names in re.findall(r"^(\d+):((?:\s+[A-Za-z_]\w*)+)", TINY, re.MULTILINE) for name in names.split()}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HYBRID = ["linear_attention", "linear_attention", "hybrid"] * 2
# what single types need besides
SPECIAL: dict[str, dict[str, Any]] = {
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_unified_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")},
    },
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "dots3_note_text": {"layer_types": ["indexed_attention"] * 4},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
    },
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "falcon_h1": {"mamba_n_heads": 8},
    "dory": {"num_hidden_layers": 4, "n_recurrent_layers": 2},
    "hrm_text": {"num_hidden_layers": 4, "num_layers_per_stack": 2},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8},
    "jamba": {"attn_layer_period": 2, "expert_layer_period": 2, "mamba_dt_rank": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe", "mlp"]},
    "mamba2": {"num_heads": 8},
}
ROTARY = {"rope_type": "default", "rope_theta": 1e4}
# three parts of half a head, for positions in time, height and width
THREE_PARTS = """qwen2_vl_text qwen2_5_vl_text qwen2_5_omni_text paddleocr_vl_text cosmos3_edge_text glm4v_text glm_ocr_text hy_v4_vl_text
    hunyuan_vl_text"""
SPECIAL |= {kind: SPECIAL.get(kind, {}) | {"rope_parameters": ROTARY | {"mrope_section": [2, 1, 1]}} for kind in THREE_PARTS.split()}


def tiny_config(kind: type, model_type: str = "") -> Any:
    """A config of a class with small numbers, and so are those inside it."""
    names = {f.name for f in dataclasses.fields(kind)} | set(getattr(kind, "attribute_map", {}))
    values = {name: FIELDS[name] for name in names & FIELDS.keys() if name not in getattr(kind, "attribute_map", {})}
    values |= {name: value for name, value in TOKENS.items() if name in names}
    if "kv_lora_rank" in names:  # attention with latents has as many key-value heads as heads
        values["num_key_value_heads"] = 4
    values |= {name: True for name in ("is_decoder",) if name in names}
    for name, inner in sub_configs(kind).items():
        if name in names:
            values[name] = tiny_config(inner, getattr(inner, "model_type", ""))
    return kind(**values | SPECIAL.get(model_type, {}))


def sub_configs(kind: type) -> dict[str, type]:
    """The kinds of the configs inside a config; where any kind would do, that of the default one."""
    inside: dict[str, type] = dict(getattr(kind, "sub_configs", {}))
    default = kind() if any(inner.__name__ == "AutoConfig" for inner in inside.values()) else None
    found = {name: type(getattr(default, name, None)) if inner.__name__ == "AutoConfig" else inner for name, inner in inside.items()}
    return {name: inner for name, inner in found.items() if dataclasses.is_dataclass(inner)}


def save_tiny(model_type: str, folder: Path, wrapper: bool = False) -> None:
    """A random model of a type, of a wrapper with its towers, with columns of different scale and no bias of zero, saved as any checkpoint is."""
    config = tiny_config(CONFIG_MAPPING[model_type], model_type)
    auto = AutoModelForImageTextToText if wrapper else AutoModelForCausalLM
    if wrapper:  # towers have sizes of many names
        with torch.device("meta"):
            _check_tiny(auto.from_config(config))
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    _check_tiny(model)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data += 0.05 * torch.randn_like(parameter)
        elif parameter.is_floating_point():
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5).mul_(torch.randn(parameter.shape[-1]).mul(0.5).exp())
    model.save_pretrained(folder)


def _check_tiny(model: Any) -> None:
    count = sum(p.numel() for p in model.parameters())
    if count > 20_000_000:
        raise ValueError(f"{count:,} parameters are not tiny")
