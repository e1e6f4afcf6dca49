"""Families with short convolutions and recurrent states: Mamba, LFM2, Qwen3-Next."""

from __future__ import annotations

from transformers import PreTrainedConfig

from llmprune.model.families.mixtures import EXPERT_READS, EXPERT_WRITES, NORMS, expert_channels
from llmprune.model.families.table import Cut, Family, Part, Residual, Table, attention, feed_forward, residual, routed

NO_ATTENTION = "it has no attention"


def mamba(config: PreTrainedConfig) -> Family:
    """The inner channels: each has its own short convolution and state."""
    inner = Cut(
        "kernel",
        "mixer",
        (Part("mixer.in_proj", copies=2), Part("mixer.conv1d"), Part("mixer.dt_proj"), Part("mixer.A_log"), Part("mixer.D")),
        Part("mixer.out_proj"),
        reads=(Part("mixer.x_proj"),),
        config=(("intermediate_size", 1),),
    )
    channels = "it has no FFN; kernel removes its inner channels"
    fixed = (("intermediate_size", config.intermediate_size), ("time_step_rank", int(config.time_step_rank)))
    stream = Residual(("mixer.in_proj",), ("mixer.out_proj",), ("norm",), last_norm="backbone.norm_f.weight", fixed=fixed)
    return Family((inner,), {"heads": NO_ATTENTION, "kv-groups": NO_ATTENTION, "channels": channels}, stream)


def lfm2(config: PreTrainedConfig) -> Family:
    mlp = feed_forward("feed_forward.w2", "feed_forward.w1", "feed_forward.w3", name="feed_forward", fixed=(("block_auto_adjust_ff_dim", False),))
    as_wide = "its convolutions always have as many channels as the hidden size"
    return Family((mlp, *attention(config, reader="self_attn.out_proj")), {"kernel": as_wide, "hidden": as_wide})


def qwen3_next(config: PreTrainedConfig) -> Family:
    """Blocks with full attention beside blocks with a gated delta rule, whose convolution runs over all queries, keys and values: a key head
    is removed with its value heads. In full attention a query head has its output gate beside it.
    """
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    key, value = config.linear_key_head_dim, values // keys * config.linear_value_head_dim
    delta = Cut(
        "kernel",
        "linear_attn",
        (
            Part("linear_attn.in_proj_qkvz"),
            Part("linear_attn.in_proj_ba"),
            Part("linear_attn.conv1d", widths=(key, key, value)),
            Part("linear_attn.dt_bias"),
            Part("linear_attn.A_log"),
        ),
        Part("linear_attn.out_proj"),
        units=keys,
        config=(("linear_num_key_heads", 1), ("linear_num_value_heads", values // keys)),
    )
    shared = feed_forward(
        "mlp.shared_expert.down_proj",
        "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
        size="shared_expert_intermediate_size",
        name="mlp.shared_expert",
    )
    dense = feed_forward("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")
    experts = routed("mlp.gate", "mlp.experts", "num_experts", config.num_experts, config.num_experts_per_tok)
    own = ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate")
    stream = residual(
        config,
        (*EXPERT_READS, *own),
        (*EXPERT_WRITES, "linear_attn.out_proj", "mlp.shared_expert.down_proj"),
        NORMS,
        plus_one=True,
    )
    return Family((dense, expert_channels("moe_intermediate_size"), shared, *attention(config), delta, experts), residual=stream)


TABLES: dict[str, Table] = {"mamba": mamba, "lfm2": lfm2, "qwen3_next": qwen3_next}
