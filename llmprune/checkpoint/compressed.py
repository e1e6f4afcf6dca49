"""Checkpoints in the formats of compressed-tensors (integers, packed or not, floats, nvfp4, mxfp4 ...): its own library dequantises
one module at a time, as it does where transformers loads with ``CompressedTensorsConfig(dequantize=True)``.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from llmprune.checkpoint.codes import Code
from llmprune.checkpoint.source import CODES, DTYPES, Source
from llmprune.errors import RequestError, first_line

PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape")
BESIDE = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale")
OLDEST = (0, 20)  # of the library; earlier ones have other formats
WORD = {"I32": 32, "U8": 8}  # bits of an integer that holds packed codes
SLOW = re.compile(r"\)[*+?{]|([*+{].*){5}")  # of an expression: repeated groups, or so many repetitions that a match may never end
UNDONE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
AGAIN = "fetch the checkpoint again, or prune the model that it was made from"


def installed() -> bool:
    try:
        return tuple(map(int, version("compressed-tensors").split(".")[:2])) >= OLDEST
    except (PackageNotFoundError, ValueError):
        return False


def compressed_codes(source: Source, asked: dict[str, Any]) -> tuple[dict[str, Code], set[str]]:
    """(weights that have a scale, the tensors that go with them). Raises RequestError for what the library does not support, or without it."""
    if not installed():
        oldest = ".".join(map(str, OLDEST))
        raise RequestError(
            f"config.json: the weights are already quantised, which needs compressed-tensors {oldest} or newer",
            f'pip install "compressed-tensors>={oldest}", then the same command reads them as they are',
        )
    from compressed_tensors.utils.match import match_name

    config = _config(asked)
    groups = list(config.config_groups.values())
    codes: dict[str, Code] = {}
    left_out = {name for name in source.tensors if name.rpartition(".")[2] in BESIDE}
    for name in source.tensors:
        module, _, last = name.rpartition(".")
        if last == "weight_g_idx":
            raise RequestError(f"{name}: columns quantised in another order cannot be dequantised", AGAIN)
        if last != "weight_scale":
            continue
        fits = groups if len(groups) == 1 else [g for g in groups if any(match_name(module, target) for target in g.targets)]
        fits = fits or [g for g in groups if any(not target.startswith("re:") for target in g.targets)]  # of a class of modules
        if not fits or any(group.weights != fits[0].weights for group in fits[1:]):
            raise RequestError(f"{module}: config.json does not say which of its {len(groups)} groups quantised it", AGAIN)
        code = _code(source, module, fits[0], fits[0].format or config.format)
        codes[f"{module}.weight"] = code
        left_out |= set(code.parts[1:])
    return codes, left_out


def _config(asked: dict[str, Any]) -> Any:
    """The library's reading of a quantization_config."""
    from compressed_tensors.quantization import QuantizationConfig

    sparse = asked.get("sparsity_config") or {}
    if asked.get("transform_config"):
        raise RequestError("config.json: quantization_config: transform_config cannot be undone", AGAIN)
    if not isinstance(sparse, dict) or sparse.get("format", "dense") != "dense":
        raise RequestError("config.json: quantization_config: sparsity_config cannot be undone", AGAIN)
    try:
        config = QuantizationConfig.model_validate({k: v for k, v in asked.items() if k in QuantizationConfig.model_fields})
        expressions = [target[3:] for group in config.config_groups.values() for target in group.targets if target.startswith("re:")]
        for expression in expressions:
            re.compile(expression)
    except (*UNDONE, re.error) as error:
        raise RequestError(f"config.json: quantization_config is not compressed-tensors' ({_said(error)})", AGAIN) from None
    if not config.config_groups:
        raise RequestError("config.json: quantization_config: config_groups is empty", AGAIN)
    for expression in expressions:
        if SLOW.search(expression):
            raise RequestError(f"config.json: quantization_config: the target {expression[:60]!r} is too complex to be matched", AGAIN)
    return config


def _said(error: Exception) -> str:
    """The message of a validation error, without its preamble."""
    if isinstance(error, ValidationError):
        found = error.errors()[0]
        return f"{'.'.join(map(str, found['loc']))}: {found['msg']}"[:160]
    return first_line(error)[:160]


def _code(source: Source, module: str, scheme: Any, form: Any) -> Code:
    """How the weight of a module is stored. scheme: its group's entry in the config; form: the format's name."""
    from compressed_tensors.compressors import BaseCompressor

    held = [part for part in PARTS if f"{module}.{part}" in source.tensors]
    form = getattr(form, "value", form)
    try:
        compressor = BaseCompressor.get_value_from_registry(form)
        bits = scheme.weights.num_bits
    except (KeyError, AttributeError):
        raise RequestError(f"{module}: stored as {form}, which compressed-tensors cannot dequantise", AGAIN) from None
    if held[0] not in ("weight", "weight_packed"):
        raise RequestError(f"{module}: has a weight_scale and no weight", AGAIN)
    strange = [part for part in held if source.tensors[f"{module}.{part}"].dtype not in DTYPES | CODES]
    if strange:
        raise RequestError(f"{module}.{strange[0]}: stored as {source.tensors[f'{module}.{strange[0]}'].dtype}", AGAIN)
    shape = source.tensors[f"{module}.{held[0]}"].shape
    if held[0] == "weight_packed":
        shape = _unpacked(source, module, bits, "weight_shape" in held)

    def decode(*stored: Tensor) -> Tensor:
        try:
            weight = compressor.decompress(dict(zip(held, stored, strict=True)), scheme)["weight"]
        except UNDONE as error:
            raise RequestError(f"{module}: cannot be dequantised ({first_line(error)[:160]})", AGAIN) from None
        if weight.shape != shape:
            raise RequestError(f"{module}: dequantised to {list(weight.shape)} instead of {list(shape)}", AGAIN)
        return weight

    return Code(tuple(f"{module}.{part}" for part in held), shape, decode)


def _unpacked(source: Source, module: str, bits: Any, stored: bool) -> tuple[int, ...]:
    """The shape of a weight whose codes are packed along its rows. stored: whether the checkpoint holds it."""
    packed = source.tensors[f"{module}.weight_packed"]
    if len(packed.shape) != 2 or packed.dtype not in WORD or type(bits) is not int or not 0 < bits <= 16:
        raise RequestError(f"{module}: {bits} bits packed as {packed.dtype} {list(packed.shape)}, not as rows of integers", AGAIN)
    rows, words = packed.shape
    columns = words * WORD[packed.dtype] // bits
    if stored:
        entry = source.tensors[f"{module}.weight_shape"]
        if entry.dtype not in ("I32", "I64") or entry.shape != (2,):
            raise RequestError(f"{module}.weight_shape: {entry.dtype} {list(entry.shape)} instead of two integers", AGAIN)
        columns = int(source.read(f"{module}.weight_shape")[1])
    if columns < 1 or ceil(columns * bits / WORD[packed.dtype]) != words:
        raise RequestError(f"{module}: {columns} columns of {bits} bits do not match its {words} packed ones", AGAIN)
    return rows, columns
