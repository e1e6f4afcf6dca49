"""Older families whose head size is always the hidden size over the head count: fewer heads would mean wider ones."""

from __future__ import annotations

from transformers import PreTrainedConfig

from llmprune.model.families.table import CENTRED, Family, Table, feed_forward

NO_HEAD_SIZE = "its head size is always hidden size / heads, so a config cannot express fewer heads"
DEPTH = "its attention is scaled by the number of the layer (scale_attn_by_inverse_layer_idx)"
TIED_HEADS = {"heads": NO_HEAD_SIZE, "kv-groups": NO_HEAD_SIZE, "hidden": CENTRED}


def opt(config: PreTrainedConfig) -> Family:
    return Family((feed_forward("fc2", "fc1", size="ffn_dim"),), TIED_HEADS)


def gpt2(config: PreTrainedConfig) -> Family:
    depth = {"layers": DEPTH} if config.scale_attn_by_inverse_layer_idx else {}
    return Family((feed_forward("mlp.c_proj", "mlp.c_fc", size="n_inner"),), TIED_HEADS | depth)


def gpt_neox(config: PreTrainedConfig) -> Family:
    return Family((feed_forward("mlp.dense_4h_to_h", "mlp.dense_h_to_4h"),), TIED_HEADS, named_by_class=True)


def falcon(config: PreTrainedConfig) -> Family:
    return Family((feed_forward("mlp.dense_4h_to_h", "mlp.dense_h_to_4h", size="ffn_hidden_size"),), TIED_HEADS)


def bloom(config: PreTrainedConfig) -> Family:
    return Family((), TIED_HEADS | {"channels": "its FFN is always 4 times the hidden size"})


TABLES: dict[str, Table] = {"opt": opt, "gpt2": gpt2, "gpt_neox": gpt_neox, "falcon": falcon, "bloom": bloom}
