"""Checkpoints in the formats of compressed-tensors, made by its own library: read as transformers dequantises them, pruned, or refused."""

from __future__ import annotations

import json
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny, tiny_windows
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.utils import logging as transformers_logging

import llmprune
from llmprune.checkpoint import compressed
from llmprune.checkpoint.resolve import open_source
from llmprune.errors import RequestError

KINDS: dict[str, dict[str, Any]] = {
    "int8": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "int4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16},
    "int4 with zero points": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False},
    "int3": {"num_bits": 3, "type": "int", "strategy": "channel"},
    "fp8": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "fp8 in blocks": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
}
LIBRARY = pytest.mark.skipif(not compressed.installed(), reason="compressed-tensors is not installed")
UP = "model.layers.0.mlp.up_proj"


def scales(weight_RC: Tensor, args: Any) -> dict[str, Tensor]:
    """What the library's own rule gives for the extremes of each part that has a scale."""
    from compressed_tensors.quantization.utils import calculate_qparams

    rows, columns = weight_RC.shape
    tall, wide = {"tensor": (rows, columns), "channel": (1, columns), "block": (16, 16)}.get(args.strategy, (1, 16))
    parts = weight_RC.view(rows // tall, tall, columns // wide, wide)
    largest = {"global_scale": 448 * 6 / weight_RC.abs().amax().view(1)} if args.strategy == "tensor_group" else {}
    scale, zero_point = calculate_qparams(parts.amin((1, 3)), parts.amax((1, 3)), args, **largest)
    found = {"weight_scale": scale, "weight_zero_point": zero_point} | {f"weight_{name}": value for name, value in largest.items()}
    return {name: value.view(-1) if args.strategy == "tensor" else value for name, value in found.items()}


def quantised(folder: Path, kinds: dict[str, str], family: str = "llama") -> Path:
    """A tiny model stored so. kinds: for each target, as the config says them, a kind."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.utils.match import match_name

    groups = {target: QuantizationScheme(targets=[target], weights=QuantizationArgs(**KINDS[kind])) for target, kind in kinds.items()}
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(save_tiny(family, folder) / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if "proj" not in name or value.dim() != 2:
            tensors[name] = value
            continue
        scheme = next((g for target, g in groups.items() if match_name(module, target)), groups.get("Linear"))
        assert scheme is not None
        scheme.format = infer_module_format(nn.Linear, scheme)
        state = {"weight": value.float()} | scales(value.float(), scheme.weights)
        stored = BaseCompressor.get_value_from_registry(scheme.format.value).compress(state, scheme)
        tensors |= {f"{module}.{part}": tensor.contiguous() for part, tensor in stored.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = {f"group_{i}": scheme.model_dump(mode="json") for i, scheme in enumerate(groups.values())}
    forms = {scheme.format.value for scheme in groups.values() if scheme.format}
    asked = {"quant_method": "compressed-tensors", "config_groups": said, "ignore": ["lm_head"], "quantization_status": "compressed"}
    asked["format"] = forms.pop() if len(forms) == 1 else "mixed-precision"
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": asked}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@LIBRARY
@pytest.mark.skipif(
    "dequantize" not in signature(CompressedTensorsConfig).parameters, reason="this transformers does not dequantise them while it loads"
)
@pytest.mark.parametrize("kind", KINDS)
def test_read_as_transformers_dequantises(tmp_path: Path, kind: str) -> None:
    folder = quantised(tmp_path / "m", {"Linear": kind})
    source = open_source(str(folder))
    transformers_logging.set_verbosity_error()
    wanted = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.bfloat16
    ).state_dict()
    assert wanted.keys() - {"lm_head.weight"} <= source.tensors.keys()
    for name, value in source.read_many(list(source.tensors)).items():
        assert value.dtype == torch.bfloat16, name
        assert value.equal(wanted[name]), name
    assert "quantization_config" not in source.config


@LIBRARY
def test_each_module_by_its_own_group(tmp_path: Path) -> None:
    """Attention as fp8, the rest as packed integers: each is what its kind alone would have become."""
    mixed = open_source(str(quantised(tmp_path / "mixed", {"re:.*self_attn.*": "fp8", "Linear": "int4"})))
    alone = {kind: open_source(str(quantised(tmp_path / kind, {"Linear": kind}))) for kind in ("fp8", "int4")}
    for name in mixed.tensors:
        assert mixed.read(name).equal(alone["fp8" if "self_attn" in name else "int4"].read(name)), name


@LIBRARY
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_pruned_into_a_plain_checkpoint(tmp_path: Path, family: str) -> None:
    folder = quantised(tmp_path / "m", {"Linear": "int4"}, family)
    source = open_source(str(folder))
    report = llmprune.prune(folder, 0.5, method="wanda", calibration=tiny_windows(), output=str(tmp_path / "out"))
    assert report.source.quantised == "compressed-tensors"
    assert report.environment.versions["compressed-tensors"] == version("compressed-tensors")
    saved = load_file(tmp_path / "out/model.safetensors")
    for name, value in source.read_many(list(source.tensors)).items():
        kept = saved[name] != 0
        assert saved[name][kept].equal(value[kept]), name
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not hasattr(model.config, "quantization_config")


def changed(folder: Path, tensors: dict[str, Tensor | None], asked: dict[str, Any] | None = None) -> None:
    """The checkpoint with some tensors put in or (None) taken out, and another quantisation_config."""
    held = {k: v for k, v in (load_file(folder / "model.safetensors") | tensors).items() if v is not None}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= asked or {}
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        llmprune.prune(folder, 0.5, method="magnitude", calibration=tiny_windows(), output=str(folder.parent / "out"))
    assert "\n" not in caught.value.message
    assert not (folder.parent / "out").exists()


def group(**said: Any) -> dict[str, Any]:
    return {"config_groups": {"a": {"targets": ["Linear"], "weights": KINDS["int4"]} | said}}


NO_CONFIG = "is not compressed-tensors'"
BROKEN: dict[str, tuple[dict[str, Tensor | None], dict[str, Any], str]] = {
    "no codes": ({f"{UP}.weight_packed": None}, {}, "has a weight_scale and no weight"),
    "no scale": ({f"{UP}.weight_scale": None}, {}, f"1 tensors missing: {UP}.weight"),
    "another order": ({f"{UP}.weight_g_idx": torch.zeros(32, dtype=torch.int32)}, {}, "columns quantised in another order"),
    "another shape": ({f"{UP}.weight_shape": torch.tensor([48, 900])}, {}, "900 columns of 4 bits do not match its 4 packed ones"),
    "no shape": ({f"{UP}.weight_shape": torch.empty(0, dtype=torch.int64)}, {}, r"weight_shape: I64 \[0\] instead of two integers"),
    "a shape of floats": ({f"{UP}.weight_shape": torch.tensor([torch.nan, 2.0])}, {}, "weight_shape: F32"),
    "scales that do not fit": ({f"{UP}.weight_scale": torch.ones(7, 5)}, {}, f"{UP}: cannot be dequantised"),
    "scales of no number": ({f"{UP}.weight_scale": torch.ones(48, 2, dtype=torch.uint16)}, {}, "weight_scale: stored as U16"),
    "infinite scales": ({f"{UP}.weight_scale": torch.full((48, 2), torch.inf)}, {}, "NaN or infinite weights"),
    "no groups": ({}, {"config_groups": {}}, "config_groups is empty"),
    "groups of something else": ({}, {"config_groups": {"a": {"targets": 7}}}, NO_CONFIG),
    "two groups for one module": (
        {},
        {"config_groups": {k: group(weights=KINDS[k])["config_groups"]["a"] for k in ("int4", "int8")}},
        "which of its 2",
    ),
    "no bits": ({}, group(weights=KINDS["int4"] | {"num_bits": 0}), "0 bits packed as I32"),
    "floats of seven bits": ({}, group(weights={"num_bits": 7, "type": "float"}), NO_CONFIG),
    "activations by channel": ({}, group(input_activations=KINDS["int8"]), NO_CONFIG),
    "an expression that is none": ({}, group(targets=["re:("]), NO_CONFIG),
    "an expression that never ends": ({}, group(targets=["re:(.|.|.)*!"]), "too complex"),
    "many repetitions": ({}, group(targets=["re:.*.*.*.*.*.*!"]), "too complex"),
    "an unheard-of format": ({}, {"format": "marlin-24"} | group(), "stored as marlin-24"),
    "a rotation": ({}, {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config cannot be undone"),
    "bits of 2:4": ({}, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config cannot be undone"),
    "a text for sparsity": ({}, {"sparsity_config": "abc"}, "sparsity_config cannot be undone"),
}


@LIBRARY
@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_turned_back_is_refused(tmp_path: Path, what: str) -> None:
    folder = quantised(tmp_path / "m", {"Linear": "int4"})
    tensors, asked, says = BROKEN[what]
    changed(folder, tensors, asked)
    refused(folder, says)


def test_without_its_library_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "installed", lambda: False)
    folder = save_tiny("llama", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "compressed-tensors"}}))
    with pytest.raises(RequestError, match="compressed-tensors") as caught:
        open_source(str(folder))
    assert 'pip install "compressed-tensors' in caught.value.hint
