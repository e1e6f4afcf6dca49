"""From a checkpoint's tensor names to a model's parameters and back, by transformers' own key conversion.

The only user of transformers' internals. Most architectures store each parameter under its own name (or one that differs by a prefix);
others store experts one by one, or fused, and need tensors merged or split.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from llmprune.errors import ConversionError

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        convert_and_load_state_dict_in_model,
        rename_source_key,
        revert_weight_conversion,
    )
    from transformers.modeling_utils import LoadStateDictConfig
except ImportError as error:  # internals: another version may have moved them
    MOVED = str(error)
else:
    MOVED = ""


def parameter_names(skeleton: PreTrainedModel, keys: list[str]) -> tuple[dict[str, str], set[str], dict[str, str]]:
    """(checkpoint key -> parameter it goes into, the keys whose tensors must be merged, split or transposed on the way, further parameter -> the
    checkpoint key that is split to fill it too).

    Keys that the model has no place for are left out. Several keys may fill one parameter; one key may fill several. Raises ConversionError when
    this transformers has no such conversion.
    """
    if MOVED:
        raise ConversionError(f"transformers' key conversion is not where it was ({MOVED})")
    state = skeleton.state_dict()
    mapping = get_model_conversion_mapping(skeleton)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    prefix = skeleton.base_model_prefix
    targets = {source: c.target_patterns for c in converters for source in c.source_patterns}
    names, converted = {}, set()
    further: dict[str, str] = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name in state:
            names[key] = name
            if pattern is not None:
                converted.add(key)
                first, *others = targets.get(pattern, [""])
                further |= {other: key for target in others if (other := name.replace(first, target)) in state}
    return names, converted, further


def convert(skeleton: PreTrainedModel, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Fill the skeleton's parameters that consist of these checkpoint tensors, in ``dtype``. transformers notes which conversions were used, for the
    way back; here a block at a time is loaded, and those of all blocks are kept.

    Raises ConversionError when transformers cannot convert them.
    """
    mapping: Any = get_model_conversion_mapping(skeleton)
    config = LoadStateDictConfig(weight_mapping=mapping, device_map={"": "cpu"}, dtype=dtype)
    used = _signatures(vars(skeleton).get("_weight_conversions", []))
    quiet = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        info, _ = convert_and_load_state_dict_in_model(skeleton, dict(tensors), config, None)
    finally:
        if quiet:
            transformers_logging.enable_progress_bar()
    used |= _signatures(vars(skeleton)["_weight_conversions"])
    vars(skeleton)["_weight_conversions"] = [conversion for conversion in mapping if _signatures([conversion]) <= used]
    problems = [*info.unexpected_keys, *info.conversion_errors, *info.error_msgs, *info.mismatched_keys]
    if problems:
        raise ConversionError(f"transformers could not convert {str(problems[0])[:200]}")


def _signatures(conversions: list[Any]) -> set[tuple[Any, ...]]:
    """What identifies conversions, which are made again for every load."""
    return {(type(c), tuple(c.source_patterns), tuple(c.target_patterns)) for c in conversions}


def revert(skeleton: PreTrainedModel, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint tensors that these converted parameters were made of."""
    return revert_weight_conversion(skeleton, parameters)


def stored_rows(model: PreTrainedModel, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoint tensor -> the numbers of its rows, of the parameters among these that are stacked or concatenated from several tensors.

    numbers: a number for every row of a parameter, in the parameter's shape with a single column.
    """
    if MOVED:
        return {}
    conversions = vars(model).get("_weight_conversions") or get_model_conversion_mapping(model, add_legacy=False)
    joining = [c for c in conversions if isinstance(c, WeightConverter) and all(isinstance(op, MergeModulelist | Concatenate) for op in c.operations)]
    apart: Any = [c.reverse_transform() for c in joining]
    joined = {name: value for name, value in numbers.items() if rename_source_key(name, [], apart)[1] is not None}
    return revert(model, joined) if joined else {}


def natural(key: str) -> list[tuple[int, str]]:
    """Sort key that puts expert 10 after expert 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]
