"""Wrappers: image-text models with a text decoder inside, which is what is pruned: which class of transformers loads them, and which of their parts
text does not pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from llmprune.errors import RequestError


def auto_class(model_type: str) -> Any:
    """AutoModelForImageTextToText where transformers has no causal language model of a type, else AutoModelForCausalLM."""
    only = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForImageTextToText if only else AutoModelForCausalLM


def is_wrapper_type(model_type: str) -> bool:
    """Whether transformers has an image-text model of this type."""
    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def is_wrapper(model: PreTrainedModel) -> bool:
    """Whether a model is an image-text model with a text decoder inside."""
    return type(model).__name__ == MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model.config.model_type) and model.get_decoder() is not model


def towers(model: PreTrainedModel) -> dict[str, int]:
    """Path -> number of parameters of each part of a wrapper that text does not pass: towers of other modalities, projectors. Empty for other models.

    Their weights are neither loaded nor changed.
    """
    if not is_wrapper(model):
        return {}
    text = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    passed = {id(p) for part in text if part is not None for p in part.parameters()}
    passed -= {id(p) for part in others(model) for p in part.parameters()}
    sizes = {name: (p.numel(), id(p) in passed) for name, p in model.named_parameters()}
    return outermost({n: size for n, (size, used) in sizes.items() if not used}, [n for n, (_, used) in sizes.items() if used])


def others(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models inside a model that are of another kind of config than its text decoder's: towers of other modalities."""
    own = {type(model.config), type(model.config.get_text_config(decoder=True))}
    return [m for m in model.modules() if isinstance(m, PreTrainedModel) and type(m.config) not in own]


def outermost(apart: Mapping[str, int], beside: Iterable[str]) -> dict[str, int]:
    """The sizes of tensors by the outermost modules that hold none of those ``beside`` them; all by name."""
    shared = {path for name in beside for path in _paths(name)}
    found: dict[str, int] = {}
    for name, size in apart.items():
        path = next((path for path in _paths(name) if path not in shared), name)
        found[path] = found.get(path, 0) + size
    return found


def check_text(model: PreTrainedModel) -> None:
    """Raises RequestError where the forward of a model cannot do without images."""
    needed = [name for name, p in inspect.signature(model.forward).parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    more = [name for name in needed if name != "input_ids"]
    if more:
        raise RequestError(f"{type(model).__name__}: its forward takes no text without {', '.join(more)}", "give a model that reads text alone")


def _paths(name: str) -> Iterator[str]:
    """a, a.b, a.b.c of a.b.c."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))
