"""Tiny random models of many families: small enough to prune in a blink, odd enough to show mistakes.

Every width is a multiple of 4, sliding windows are shorter than the test's windows, head counts differ from key-value head counts, and the
columns of each matrix differ in scale, so that a criterion, a transposed matrix or an expert out of order shows in the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmprune.model.matrices import Selection
from llmprune.stream.live import LiveStream
from llmprune.stream.selected import selected

VOCABULARY = 96

TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
BASE = TOKENS | HEADS | {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
ONE_KV = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

# family -> (model_type, config): one entry for each layout worth telling apart
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", BASE | {"num_hidden_layers": 3}),
    "llama_tied": ("llama", BASE | {"tie_word_embeddings": True, "attention_bias": True}),
    "llama_one_block": ("llama", BASE | {"num_hidden_layers": 1}),
    "falcon_one_block": ("falcon", TOKENS | {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}),
    "mistral": ("mistral", BASE | {"sliding_window": 8}),
    "qwen2": ("qwen2", BASE),
    "qwen3": ("qwen3", BASE | {"head_dim": 16}),
    "gemma2": ("gemma2", BASE | SLIDING | {"head_dim": 16}),
    "gemma3_text": ("gemma3_text", BASE | SLIDING | {"head_dim": 16}),
    "gemma4_text": (
        "gemma4_text",
        BASE
        | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8, "head_dim": 16}
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 2, "global_head_dim": 16},
    ),
    "gemma3n_text": (
        "gemma3n_text",
        BASE
        | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8, "head_dim": 8}
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 2, "laurel_rank": 4}
        | {"altup_num_inputs": 2, "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4},
    ),
    "phi3": ("phi3", BASE),
    "phi": ("phi", BASE),
    "opt": ("opt", TOKENS | HEADS | {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "opt_projected": (
        "opt",
        TOKENS | HEADS | {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64, "do_layer_norm_before": False},
    ),
    "gpt2": ("gpt2", TOKENS | {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gptj": (
        "gptj",
        TOKENS | {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4, "tie_word_embeddings": False},
    ),
    "gpt_neox": ("gpt_neox", ONE_KV),
    "falcon": ("falcon", TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True, "parallel_attn": False}),
    "falcon_new": (
        "falcon",
        TOKENS
        | {"hidden_size": 32, "ffn_hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2}
        | {"new_decoder_architecture": True},
    ),
    "bloom": ("bloom", TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "olmo2": ("olmo2", BASE),
    "granite": ("granite", BASE | {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "cohere2": ("cohere2", BASE | SLIDING),
    "smollm3": ("smollm3", BASE | {"no_rope_layers": [1, 0]}),
    "starcoder2": ("starcoder2", BASE | {"sliding_window": 8}),
    "stablelm": ("stablelm", BASE),
    "nemotron": ("nemotron", BASE | {"head_dim": 8}),
    "glm4": ("glm4", BASE | {"head_dim": 16}),
    "mixtral": ("mixtral", BASE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        BASE
        | {"num_hidden_layers": 3, "head_dim": 16, "moe_intermediate_size": 16, "num_experts": 12, "num_experts_per_tok": 2, "mlp_only_layers": [1]},
    ),
    "gpt_oss": ("gpt_oss", BASE | SLIDING | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", BASE | {"num_experts": 12, "num_experts_per_tok": 2}),
    "granitemoe": ("granitemoe", BASE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "deepseek_v3",
        BASE
        | {"num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16}
        | {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1},
    ),
    "llama4_text": (
        "llama4_text",
        BASE | {"head_dim": 8, "intermediate_size_mlp": 40, "num_local_experts": 3, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
    ),
    "openai_gpt": ("openai-gpt", TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mamba": ("mamba", TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "lfm2": ("lfm2", BASE | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "bamba": (
        "bamba",
        BASE | {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8},
    ),
    "nemotron_h": (
        "nemotron_h",
        BASE
        | {"num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "moe"], "head_dim": 8, "n_group": 1, "topk_group": 1}
        | {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8, "n_routed_experts": 4}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
    ),
    "dbrx": (  # experts in bare two-dimensional parameters, one after the other
        "dbrx",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}}
        | {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}},
    ),
    "lara_mini": (  # one stored tensor is split into four parameters
        "lara_mini",
        BASE
        | LINEAR
        | {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_next": (
        "qwen3_next",
        BASE
        | LINEAR
        | {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16},
    ),
}

# one for each kind of layout: where other families repeat what a test says, these run every time (see often.py)
TYPICAL = ("llama", "llama_tied", "gemma2", "gemma4_text", "phi3", "opt_projected", "gpt2", "falcon_new", "qwen3_moe", "gpt_oss")
TYPICAL += ("deepseek_v3", "mamba", "lfm2", "nemotron_h", "dbrx", "lara_mini")

# models that cannot be walked: their blocks hand on more than hidden states, or share weights
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "rwkv": ("rwkv", TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64, "rescale_every": 1}),
    "zamba2": (
        "zamba2",
        TOKENS
        | {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48}
        | {"mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1}
        | {"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
    ),
}


def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of a family, always the same one."""
    kind, values = (FAMILIES | REFUSED)[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values))
        uneven(model)
    return model.to(dtype).eval()


def uneven(model: nn.Module) -> None:
    """Matrices of unit gain with columns of different scale; vectors a little off their initial values, so that no bias is zero."""
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data += 0.1 * torch.randn_like(parameter)
            continue
        scale_C = torch.randn(parameter.shape[-1]).mul(0.5).exp()
        parameter.data.normal_(0, parameter.shape[-1] ** -0.5).mul_(scale_C)


def save_tiny(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16, max_shard_size: str | None = None) -> Path:
    """Save a tiny model of a family as an ordinary checkpoint; the folder."""
    size = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    tiny_model(family, dtype).save_pretrained(folder, **size)
    return folder


def tiny_windows(count: int = 6, length: int = 16) -> torch.Tensor:
    """Token ids [count, length] without special tokens."""
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def parameters_of(model: Any, report: Any) -> set[str]:
    """Full names of the parameters that hold the matrices of a report's rows."""
    stream = LiveStream(model)
    every = [(f"{stream.path_of(i)}.", m) for i, ms in selected(stream, Selection(only=".")).items() for m in ms]
    found = {path + m.name: path + m.parameter for path, m in every}
    return {found[row.matrix] for row in report.rows}
