"""Checkpoints that are quantised already: read as transformers' own dequantised loading reads them, pruned into plain ones, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_tiny, tiny_windows
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

import llmprune
from llmprune.checkpoint.resolve import open_source
from llmprune.checkpoint.source import INDEX
from llmprune.errors import RequestError

BLOCK = 16
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def to_fp8(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales of blocks of 16 x 16): the largest of a block becomes 448."""
    rows, columns = weight_RC.shape
    blocks = weight_RC.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448
    return (blocks / scales).to(torch.float8_e4m3fn).view(rows, columns), scales.view(rows // BLOCK, columns // BLOCK)


def to_mxfp4(weight_EIO: Tensor) -> tuple[Tensor, Tensor]:
    """(bytes [E, O, I / 32, 16], exponents): the nearest of the eight magnitudes after division by a power of two."""
    groups = weight_EIO.float().transpose(1, 2).contiguous().unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(-1).log2().floor().int() - 2
    scaled = torch.ldexp(groups, -exponents.unsqueeze(-1))
    codes = (scaled.abs().unsqueeze(-1) - FP4).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8), (exponents + 127).to(torch.uint8)


def store(folder: Path, tensors: dict[str, Tensor], quantisation: dict[str, Any]) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fp8(folder: Path, family: str = "llama") -> Path:
    """A tiny model whose block matrices are fp8 with block scales."""
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(save_tiny(family, folder) / "model.safetensors").items():
        if "proj" in name and value.dim() == 2:
            tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(value)
        else:
            tensors[name] = value
    return store(folder, tensors, FP8)


def mxfp4(folder: Path) -> Path:
    """A tiny gpt-oss whose experts are mxfp4."""
    kind, values = FAMILIES["gpt_oss"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CONFIG_MAPPING[kind](**values | {"hidden_size": 64, "intermediate_size": 32})
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = to_mxfp4(value)
        else:
            tensors[name] = value
    return store(folder, tensors, MXFP4)


MAKERS = {
    "fp8": (fp8, FineGrainedFP8Config(dequantize=True, weight_block_size=(BLOCK, BLOCK))),
    "mxfp4": (mxfp4, Mxfp4Config(dequantize=True)),
}


@pytest.mark.parametrize("which", MAKERS)
def test_read_as_transformers_dequantises(tmp_path: Path, which: str) -> None:
    make, asked = MAKERS[which]
    folder = make(tmp_path / "m")
    source = open_source(str(folder))
    transformers_logging.set_verbosity_error()
    wanted = AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked, dtype=torch.bfloat16).state_dict()
    assert wanted.keys() - {"lm_head.weight"} <= source.tensors.keys()
    got = source.read_many(list(source.tensors))
    for name, value in got.items():
        assert value.dtype == torch.bfloat16, name
        assert value.equal(wanted[name]), name
    assert "quantization_config" not in source.config


@pytest.mark.parametrize("which", MAKERS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_pruned_into_a_plain_checkpoint(tmp_path: Path, which: str, sparsity: float) -> None:
    make, _ = MAKERS[which]
    folder = make(tmp_path / "m")
    source = open_source(str(folder))
    report = llmprune.prune(folder, sparsity, method="wanda", calibration=tiny_windows(), output=str(tmp_path / "out"), dtype="float32")
    assert report.sparsity >= sparsity  # the format has zeros of its own
    assert report.source.quantised == which
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    saved = load_file(tmp_path / "out/model.safetensors")
    pruned = {row.matrix for row in report.rows}
    assert saved.keys() == source.tensors.keys()
    for name, value in source.read_many(list(source.tensors)).items():
        kept = saved[name] != 0
        assert saved[name].dtype == torch.bfloat16
        assert saved[name][kept].equal(value[kept]), name
        if sparsity == 0 or not any(name.startswith(matrix.split("[")[0].removesuffix(".weight")) for matrix in pruned):
            assert saved[name].equal(value), name
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16


def test_codes_and_scales_in_different_files(tmp_path: Path) -> None:
    """Weights stay in the file that has their codes; a file of scales alone goes."""
    folder = fp8(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": {k: v for k, v in tensors.items() if not k.endswith("_scale_inv")}}
    parts["b.safetensors"] = {k: v for k, v in tensors.items() if k.endswith("_scale_inv")}
    for file, held in parts.items():
        save_file(held, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": {k: f for f, held in parts.items() for k in held}}))
    llmprune.prune(folder, 0.5, method="magnitude", calibration=tiny_windows(), output=str(tmp_path / "out"))
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == ["a.safetensors"]
    assert set(json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"].values()) == {"a.safetensors"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_blocks_that_do_not_fill_the_last_row(tmp_path: Path) -> None:
    """40 rows in blocks of 16 have three rows of scales, the last one for 8: the definition, which divides nothing evenly."""
    folder = fp8(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    codes = torch.ones(40, 48).to(torch.float8_e4m3fn)
    scales = torch.arange(9.0).view(3, 3)
    save_file(tensors | {name: codes, f"{name}_scale_inv": scales}, folder / "model.safetensors")
    wanted = torch.tensor([[scales[i // BLOCK, j // BLOCK] for j in range(48)] for i in range(40)])
    assert open_source(str(folder)).read(name).equal(wanted.bfloat16())


def test_structured_runs_take_quantised_sources(tmp_path: Path) -> None:
    folder = fp8(tmp_path / "m")
    llmprune.prune(folder, 0.5, "channels", quality="fast", calibration=tiny_windows(), output=str(tmp_path / "out"), round_to=4)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 24


class Stop(Exception):
    pass


@pytest.mark.parametrize("which", MAKERS)
def test_a_stopped_run_goes_on(tmp_path: Path, which: str) -> None:
    """After its first block: the rest of a quantised source is decoded again, the result byte-identical."""
    ask = {"model": str(MAKERS[which][0](tmp_path / "m")), "sparsity": 0.5, "method": "sparsegpt", "output": str(tmp_path / "out")}
    llmprune.prune(**ask | {"output": str(tmp_path / "whole")}, calibration=tiny_windows())

    def progress(step: str, done: int, total: int) -> None:
        if (step, done) == ("prune", 1):
            raise Stop

    with pytest.raises(Stop):
        llmprune.prune(**ask, calibration=tiny_windows(), on_progress=progress)
    assert llmprune.prune(**ask, calibration=tiny_windows()).timings.resumed_blocks == 1
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(tmp_path / "whole/model.safetensors").keys()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def refused(folder: Path, says: str) -> RequestError:
    with pytest.raises(RequestError, match=says) as caught:
        llmprune.prune(folder, 0.5, method="magnitude", calibration=tiny_windows(), output=str(folder.parent / "out"))
    assert "\n" not in caught.value.message
    assert not (folder.parent / "out").exists()
    return caught.value


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "unheard-of", 7, None])
def test_other_formats_are_refused_by_name(tmp_path: Path, method: Any) -> None:
    folder = save_tiny("llama", tmp_path / "m")
    store(folder, load_file(folder / "model.safetensors"), {"quant_method": method})
    error = refused(folder, rf"already quantised \({method or 'unknown method'}\)")
    assert "save_pretrained()" in error.hint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method or "x"}))
    refused(folder, "already quantised")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn], ids=str)
def test_codes_without_a_config_are_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_tiny("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    save_file(tensors | {name: tensors[name].to(dtype) for name in names}, folder / "model.safetensors")
    error = refused(folder, "2 tensors in a quantised format")
    assert all(name in error.message for name in names)


def test_what_does_not_fit_its_scales_is_refused(tmp_path: Path) -> None:
    folder = fp8(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != f"{name}_scale_inv"}, folder / "model.safetensors")
    refused(folder, f"{name}: fp8 codes without {name}_scale_inv")
    save_file(tensors | {f"{name}_scale_inv": torch.ones(3, 5)}, folder / "model.safetensors")
    refused(folder, rf"{name}: \[32, 32\] codes do not fit \[3, 5\] scales")
    spoiled = tensors[f"{name}_scale_inv"].clone()
    spoiled[0, 0] = torch.inf
    save_file(tensors | {f"{name}_scale_inv": spoiled}, folder / "model.safetensors")
    refused(folder, "NaN or infinite weights")
    codes = tensors[name].clone()
    codes.view(torch.uint8)[3, 4] = 0x7F  # the format's NaN
    save_file(tensors | {name: codes}, folder / "model.safetensors")
    refused(folder, f"NaN or infinite weights in 1 tensors, first {name}")
