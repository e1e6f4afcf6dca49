"""Checkpoints that are quantised already, read as if they held plain weights: a tensor is dequantised whenever it is read.

    fp8     weight = code * scale of the block that the code lies in           K and K_scale_inv become K
    mxfp4   weight = one of 16 values * 2^(scale - 127), 32 codes a scale      K_blocks and K_scales become K (experts of gpt-oss)
    compressed-tensors   by its own library: compressed.py

No copy is written, and one tensor is in memory at a time. Other formats are refused by name, with the step that dequantises them.

Shapes: R, C = rows and columns of a weight; r, c = of its grid of scales; E = experts, G = groups of 32 codes, two in a byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmprune.checkpoint.codes import Code
from llmprune.checkpoint.compressed import compressed_codes
from llmprune.checkpoint.shards import Shape, header_of
from llmprune.checkpoint.source import Entry, Source
from llmprune.errors import RequestError
from llmprune.maths.linalg import all_finite

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FLOATS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
FP8 = ("F8_E4M3", "F8_E5M2")
NEEDS = {  # what transformers dequantises these with; none of it is a dependency
    "bitsandbytes": "pip install bitsandbytes, load it and call model.dequantize()",
    "gptq": "pip install gptqmodel, load it on a GPU and call model.dequantize()",
    "awq": "pip install gptqmodel, load it on a GPU and call model.dequantize()",
    "torchao": "pip install torchao, load it and call model.dequantize()",
}


class Decoder:
    """Reads the plain weights of a quantised source."""

    def __init__(self, method: str, stored: Source, codes: Mapping[str, Code], dtype: torch.dtype) -> None:
        self.method = method
        self.stored = stored
        self.codes = codes
        self.dtype = dtype

    def read_many(self, names: list[str]) -> dict[str, Tensor]:
        return {name: self._decoded(self.codes[name]) if name in self.codes else self.stored.read(name) for name in names}

    def scan(self) -> dict[str, str]:
        """sha256 of the files as they are stored. Raises RequestError naming the weights that are not finite."""
        self.stored.scan()
        bad = [name for name, code in self.codes.items() if not all_finite(self._decoded(code))]
        if bad:
            raise RequestError(
                f"{self.stored.name}: NaN or infinite weights in {len(bad)} tensors, first {bad[0]}", "repair or re-download the checkpoint"
            )
        return self.stored.hashes

    def _decoded(self, code: Code) -> Tensor:
        stored = self.stored.read_many(list(code.parts))
        return code.decode(*(stored[name] for name in code.parts)).to(self.dtype)


def plain(source: Source) -> Source:
    """The source itself, or a view of its dequantised weights. Raises RequestError for a format that cannot be dequantised here."""
    asked = source.config.get("quantization_config")
    if asked is None:
        return source
    method = asked.get("quant_method") if isinstance(asked, dict) else None
    found = {"fp8": fp8_codes, "mxfp4": mxfp4_codes, "compressed-tensors": compressed_codes}.get(str(method))
    if found is None or not isinstance(asked, dict):
        step = NEEDS.get(str(method), "load it where its kernels run and call model.dequantize()")
        raise RequestError(
            f"config.json: the weights are already quantised ({method or 'unknown method'})", f"{step}, then save_pretrained() and prune that"
        )
    codes, left_out = found(source, asked)
    if not codes:
        raise RequestError(f"config.json: says {method}, but no tensor is in that format", "config.json and weights do not belong together")
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    said = str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.")
    dtype = said if said in FLOATS else "bfloat16"
    return _laid_out(source, config, Decoder(str(method), source, codes, getattr(torch, dtype)), FLOATS[dtype], left_out)


def _laid_out(source: Source, config: dict[str, Any], decoder: Decoder, dtype: str, left_out: set[str]) -> Source:
    """The source with the tensors and headers that it will have as a plain checkpoint; files keep their names."""
    plain_of = {code.parts[0]: name for name, code in decoder.codes.items()}
    shapes: dict[str, dict[str, Shape]] = {}
    for key, entry in sorted(source.tensors.items(), key=lambda item: item[1].start):
        if key not in left_out:
            name = plain_of.get(key, key)
            shape = Shape(dtype, decoder.codes[name].shape) if key in plain_of else Shape(entry.dtype, entry.shape)
            shapes.setdefault(entry.file, {})[name] = shape
    tensors: dict[str, Entry] = {}
    headers, states = {}, {}
    for file in sorted(shapes):
        headers[file], starts = header_of(shapes[file])
        tensors |= {key: Entry(file, s.dtype, s.shape, starts[key], starts[key] + s.bytes) for key, s in shapes[file].items()}
        states[file] = (len(headers[file]) + sum(s.bytes for s in shapes[file].values()), 0)
    return Source(source.folder, source.name, source.revision, config, tensors, headers, states, decoder=decoder)


def fp8_codes(source: Source, asked: dict[str, Any]) -> tuple[dict[str, Code], set[str]]:
    """(weights with a scale for each block, the tensors that go with them)."""
    codes: dict[str, Code] = {}
    left_out = {name for name in source.tensors if name.endswith("activation_scale")}
    for name, entry in source.tensors.items():
        scales = f"{name}_scale_inv"
        if entry.dtype not in FP8:
            continue
        if scales not in source.tensors:
            raise RequestError(f"{name}: fp8 codes without {scales}", "the checkpoint is incomplete, or of an unknown kind")
        block = block_of(name, entry.shape, source.tensors[scales].shape, asked.get("weight_block_size"))
        codes[name] = Code((name, scales), entry.shape, lambda c, s, block=block: from_fp8(c, s, block))
        left_out.add(scales)
    return codes, left_out


def block_of(name: str, shape: tuple[int, ...], grid: tuple[int, ...], said: Any) -> tuple[int, int]:
    """Rows and columns that share a scale: as the config says, if that gives this many scales, else as they divide evenly."""
    rows, columns = shape[-2:] if len(shape) > 1 else (1, *shape)
    r, c = grid[-2:] if len(grid) > 1 else (1, 1)
    sound = isinstance(said, list) and len(said) == 2 and all(type(n) is int and n > 0 for n in said)
    if sound and (-(-rows // said[0]), -(-columns // said[1])) == (r, c):
        return said[0], said[1]
    if not r or not c or rows % r or columns % c:
        raise RequestError(f"{name}: {list(shape)} codes do not fit {list(grid)} scales", "config.json and weights do not belong together")
    return rows // r, columns // c


def from_fp8(codes_RC: Tensor, scales_rc: Tensor, block: tuple[int, int]) -> Tensor:
    scales_rc = (scales_rc.float() - 127).exp2() if scales_rc.dtype == torch.uint8 else scales_rc.float()
    if scales_rc.numel() == 1:
        return codes_RC.float() * scales_rc.reshape(())
    rows, columns = codes_RC.shape[-2:]
    tall_Rc = scales_rc.repeat_interleave(block[0], -2)[..., :rows, :]
    return codes_RC.float() * tall_Rc.repeat_interleave(block[1], -1)[..., :columns]


def mxfp4_codes(source: Source, asked: dict[str, Any]) -> tuple[dict[str, Code], set[str]]:
    """(the experts' weights, the tensors that go with them)."""
    codes: dict[str, Code] = {}
    left_out: set[str] = set()
    for name, entry in source.tensors.items():
        if not name.endswith("_blocks"):
            continue
        weight, scales = name.removesuffix("_blocks"), f"{name.removesuffix('_blocks')}_scales"
        held = source.tensors.get(scales)
        if held is None or (entry.dtype, held.dtype, len(entry.shape), held.shape) != ("U8", "U8", 4, entry.shape[:-1]):
            raise RequestError(f"{name}: {list(entry.shape)} mxfp4 codes do not fit {scales}", "the checkpoint is incomplete; fetch it again")
        experts, rows, groups, width = entry.shape
        codes[weight] = Code((name, scales), (experts, groups * width * 2, rows), from_mxfp4)
        left_out.add(scales)
    return codes, left_out


def from_mxfp4(codes_ERGB: Tensor, scales_ERG: Tensor) -> Tensor:
    """[E, R, G, 16] bytes with two codes each, the lower one first -> [E, 32 G, R]."""
    values = torch.tensor(FP4_VALUES)
    pairs = torch.stack((values[(codes_ERGB & 15).long()], values[(codes_ERGB >> 4).long()]), -1).flatten(-2)
    scaled = torch.ldexp(pairs, scales_ERG.int().unsqueeze(-1) - 127)
    return scaled.flatten(-2).transpose(1, 2).contiguous()
