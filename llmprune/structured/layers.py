"""Whole dropped blocks: the per-layer config fields of the layers that are kept."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedConfig

EACH = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")  # one entry per layer

SOME = ("mlp_only_layers", "full_attn_idxs")  # numbers of layers

WITHOUT_ATTENTION = {"conv", "linear_attention"}

FIRST = ("first_k_dense_replace",)  # so many layers at the start


def attends(config: PreTrainedConfig, kept: Iterable[int]) -> bool:
    """Whether one of these layers has attention, if any of the model has."""
    types = config.to_dict().get("layer_types") or []
    return bool({types[i] for i in kept if types} - WITHOUT_ATTENTION) or not set(types) - WITHOUT_ATTENTION
