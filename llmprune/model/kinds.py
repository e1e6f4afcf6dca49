"""What a config describes, where that is not a causal language model."""

from __future__ import annotations

from transformers import PreTrainedConfig
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


def values_per_token(config: PreTrainedConfig) -> int:
    """The values that pass from block to block for each token: of all its residual streams, if it has several (Gemma 3n)."""
    text = config.get_text_config(decoder=True)
    width: int = text.hidden_size
    return width * (getattr(text, "altup_num_inputs", None) or 1)


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """Returns how many tokens a window may have; None where the config names no limit, or where it says so by -1 (xlnet)."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if positions == -1 else positions
