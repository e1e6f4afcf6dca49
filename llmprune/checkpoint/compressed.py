"""Checkpoints in the formats of compressed-tensors (integers, packed or not, floats, nvfp4, mxfp4 ...): its own library turns the tensors of one
module at a time back into a weight, as it does where transformers loads with ``CompressedTensorsConfig(dequantize=True)``.
"""

from __future__ import annotations

from importlib.util import find_spec
from math import ceil
from typing import Any

from torch import Tensor

from llmprune.checkpoint.codes import Code
from llmprune.checkpoint.source import Source
from llmprune.errors import RequestError, first_line, out_of_memory

PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape")
BESIDE = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale")


def installed() -> bool:
    return find_spec("compressed_tensors") is not None


def compressed_codes(source: Source, asked: dict[str, Any]) -> tuple[dict[str, Code], set[str]]:
    """(weights that have a scale, the tensors that go with them). Raises RequestError for what the library does not know, or where it is absent."""
    if not installed():
        raise RequestError(
            "config.json: the weights are already quantised (compressed-tensors), and its library is not installed",
            "pip install compressed-tensors, then the same command takes them as they are",
        )
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    for name in ("transform_config", "sparsity_config"):
        if asked.get(name) and (name == "transform_config" or asked[name].get("format", "dense") != "dense"):
            raise RequestError(f"config.json: quantization_config: {name} cannot be undone", "prune the model it was made from")
    try:
        config = QuantizationConfig.model_validate({k: v for k, v in asked.items() if k in QuantizationConfig.model_fields})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RequestError(f"config.json: quantization_config is not compressed-tensors' ({first_line(error)[:160]})", "fetch it again") from None
    groups = list(config.config_groups.values())
    if not groups:
        raise RequestError("config.json: quantization_config: config_groups is empty", "fetch it again")
    codes: dict[str, Code] = {}
    left_out = {name for name in source.tensors if name.rpartition(".")[2] in BESIDE}
    for name in source.tensors:
        module, _, last = name.rpartition(".")
        if last != "weight_scale":
            continue
        named = [group for group in groups if any(match_name(module, target) for target in group.targets)]
        scheme = (named or [group for group in groups if any(not target.startswith("re:") for target in group.targets)] or groups)[0]
        code = _code(source, module, scheme, scheme.format or config.format)
        codes[f"{module}.weight"] = code
        left_out |= set(code.parts[1:])
    return codes, left_out


def _code(source: Source, module: str, scheme: Any, form: str) -> Code:
    """How the weight of a module is stored. scheme: what the config says of its group; form: the format's name."""
    from compressed_tensors.compressors import BaseCompressor

    held = [part for part in PARTS if f"{module}.{part}" in source.tensors]
    try:
        compressor = BaseCompressor.get_value_from_registry(getattr(form, "value", form))
        bits = scheme.weights.num_bits
    except (KeyError, AttributeError):
        raise RequestError(f"{module}: stored as {form}, which compressed-tensors cannot turn back", "prune the model it was made from") from None
    if not held or held[0] not in ("weight", "weight_packed"):
        raise RequestError(f"{module}: has a weight_scale and no weight", "the checkpoint is incomplete; fetch it again")
    first = source.tensors[f"{module}.{held[0]}"]
    shape = first.shape
    if held[0] == "weight_packed":
        if len(shape) != 2 or first.dtype not in ("I32", "U8"):
            raise RequestError(f"{module}: packed as {first.dtype} {list(shape)}, not as rows of integers", "fetch the checkpoint again")
        word = 32 if first.dtype == "I32" else 8
        columns = int(source.read(f"{module}.weight_shape").flatten()[-1]) if "weight_shape" in held else shape[1] * word // bits
        if columns < 1 or ceil(columns * bits / word) != shape[1]:
            raise RequestError(f"{module}: {columns} columns of {bits} bits are not what its {shape[1]} packed ones hold", "fetch it again")
        shape = (shape[0], columns)

    def decode(*stored: Tensor) -> Tensor:
        try:
            weight = compressor.decompress(dict(zip(held, stored, strict=True)), scheme)["weight"]
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise RequestError(
                f"{module}: cannot be turned back ({first_line(error)[:160]})", "config.json and weights do not belong together"
            ) from None
        if weight.shape != shape:
            raise RequestError(f"{module}: turned back into {list(weight.shape)} instead of {list(shape)}", "fetch the checkpoint again")
        return weight

    return Code(tuple(f"{module}.{part}" for part in held), shape, decode)
