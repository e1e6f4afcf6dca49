"""Mixtures of experts: stacks of expert matrices behind a router, beside dense FFNs and shared experts where a family has them."""

from __future__ import annotations

from transformers import PreTrainedConfig

from llmprune.model.families.gated import MLP, NORMS, READS, WRITES
from llmprune.model.families.table import HEADS, KV_HEADS, Cut, Family, Part, Residual, Table, attention, feed_forward, residual, routed

WIDE_NORMS = "its query norm runs over all heads and is always as wide as the hidden size"
ONE_KEY_A_HEAD = "every head has its own key and value (MLA): use heads, which removes them together"

# in addition to those of dense blocks
EXPERT_READS = (*READS, "mlp.gate", "mlp.experts.gate_up_proj")
EXPERT_WRITES = (*WRITES, "mlp.experts.down_proj")


def expert_channels(size: str, copies: int = 2) -> Cut:
    """Gate and up are one stack: one after the other, or (one copy) channel by channel."""
    return feed_forward("mlp.experts.down_proj", Part("mlp.experts.gate_up_proj", copies=copies), size=size, name="mlp.experts")


def mixtral(config: PreTrainedConfig) -> Family:
    experts = routed("mlp.gate", "mlp.experts", "num_local_experts", config.num_local_experts, config.num_experts_per_tok)
    return Family((expert_channels("intermediate_size"), *attention(config), experts), residual=residual(config, EXPERT_READS, EXPERT_WRITES, NORMS))


def qwen3_moe(config: PreTrainedConfig) -> Family:
    experts = routed("mlp.gate", "mlp.experts", "num_experts", config.num_experts, config.num_experts_per_tok)
    stream = residual(config, EXPERT_READS, EXPERT_WRITES, NORMS)
    return Family((MLP, expert_channels("moe_intermediate_size"), *attention(config), experts), residual=stream)


def olmoe(config: PreTrainedConfig) -> Family:
    experts = routed("mlp.gate", "mlp.experts", "num_experts", config.num_experts, config.num_experts_per_tok)
    return Family((expert_channels("intermediate_size"), experts), {"heads": WIDE_NORMS, "kv-groups": WIDE_NORMS, "hidden": WIDE_NORMS})


def gpt_oss(config: PreTrainedConfig) -> Family:
    """Every query head has an attention sink; gate and up of a channel are neighbours."""
    experts = routed("mlp.router", "mlp.experts", "num_local_experts", config.num_local_experts, config.num_experts_per_tok)
    heads = attention(config, ("self_attn.q_proj", "self_attn.sinks"))
    stream = residual(config, (*READS, "mlp.router", "mlp.experts.gate_up_proj"), EXPERT_WRITES, NORMS)
    return Family((expert_channels("intermediate_size", copies=1), *heads, experts), residual=stream)


def deepseek_v3(config: PreTrainedConfig) -> Family:
    """Multi-head latent attention; experts are chosen within the best of ``n_group`` runs, each judged by its two best."""
    queries = "self_attn.q_b_proj" if config.q_lora_rank is not None else "self_attn.q_proj"
    heads = Cut(
        "heads",
        "self_attn.heads",
        (Part(queries), Part("self_attn.kv_b_proj")),
        Part("self_attn.o_proj"),
        units=getattr(config, HEADS),
        config=((HEADS, 1), (KV_HEADS, 1)),
    )
    in_a_group = max(2, -(-config.num_experts_per_tok // (config.topk_group or 1)))
    experts = routed(
        "mlp.gate",
        "mlp.experts",
        "n_routed_experts",
        config.n_routed_experts,
        config.num_experts_per_tok,
        groups=config.n_group or 1,
        least=(config.n_group or 1) * in_a_group,
    )
    # several shared experts are stored as one wide one, and share the routed experts' width
    shared = Cut(
        "channels",
        "mlp.shared_experts",
        (Part("mlp.shared_experts.gate_proj"), Part("mlp.shared_experts.up_proj")),
        Part("mlp.shared_experts.down_proj"),
        units=config.moe_intermediate_size,
        config=(("moe_intermediate_size", 1),),
    )
    first = "self_attn.q_a_proj" if config.q_lora_rank is not None else "self_attn.q_proj"
    gated = ("mlp.gate_proj", "mlp.up_proj", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
    stream = Residual(
        (first, "self_attn.kv_a_proj_with_mqa", *gated, "mlp.gate", "mlp.experts.gate_up_proj"),
        (*EXPERT_WRITES, "mlp.shared_experts.down_proj"),
        NORMS,
    )
    return Family((MLP, expert_channels("moe_intermediate_size"), shared, heads, experts), {"kv-groups": ONE_KEY_A_HEAD}, stream)


TABLES: dict[str, Table] = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "olmoe": olmoe, "gpt_oss": gpt_oss, "deepseek_v3": deepseek_v3}
