"""A CUDA device computes what the CPU does, for families x patterns x qualities: ``bash scripts/gpu.sh`` where there is one.

Sums are rounded otherwise there, so scores that tie within rounding may change places: counts are equal, masks nearly so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_tiny, tiny_model, tiny_windows
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llmprune
from llmprune.data.windows import Windows
from llmprune.errors import RequestError
from llmprune.evaluation.perplexity import perplexity
from llmprune.stream.live import LiveStream
from llmprune.structured.spaces import PATTERNS, refusal

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]

MODELS = ["llama", "gemma2", "phi3", "olmo2", "gpt2", "falcon_new", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "mamba"]
SPARSE = ["unstructured", "2:4", "block:4x4"]
UNITS = ["channels", "heads", "kv-groups", "structured"]
COARSE = ["experts", "layers", "hidden"]  # take no quality
AGREE = 0.99  # of the places of a mask
CLOSE = 0.02  # of a perplexity


def fits(family: str, pattern: str) -> bool:
    kind, values = FAMILIES[family]
    needed = ["channels", "heads"] if pattern == "structured" else [pattern] if pattern in PATTERNS else []
    return all(refusal(CONFIG_MAPPING[kind](**values), part) is None for part in needed)


def cases() -> Iterator[tuple[str, str, str]]:
    """(family, pattern, quality)"""
    for family in MODELS:
        for pattern in SPARSE + UNITS + COARSE:
            qualities = ("fast", "balanced", "max") if family in ("llama", "mixtral") and pattern not in COARSE else ("fast",)
            if fits(family, pattern):
                yield from ((family, pattern, quality) for quality in qualities)


def ask_of(family: str, pattern: str, quality: str) -> dict[str, Any]:
    share = {} if pattern == "2:4" else {"sparsity": 1 / 3 if pattern == "layers" and FAMILIES[family][1].get("num_hidden_layers") == 3 else 0.5}
    how = {} if pattern in COARSE else {"quality": quality}
    return share | how | {"pattern": pattern, "calibration": tiny_windows(), "accept_damage": True}


def value_of(model: Any) -> float:
    for module in model.modules():  # layers of their own sizes have configs of their own
        if isinstance(vars(module).get("config"), PreTrainedConfig):
            module.config._experts_implementation = "eager"  # a device's grouped products ask for widths that a tiny model has not
    return perplexity(LiveStream(model), Windows(tiny_windows(4, 12), "random ids", "evaluation")).value


def counts(report: Any) -> list[Any]:
    return [(row.matrix, row.zeros, row.dropped, row.units) for row in report.rows]


def agreement(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of all tensors' places, the share that is zero in both or in neither."""
    same = sum(int(((one[name] == 0) == (other[name].cpu() == 0)).sum()) for name in one)
    return same / sum(tensor.numel() for tensor in one.values())


@pytest.mark.parametrize(("family", "pattern", "quality"), list(cases()))
def test_a_live_model_is_pruned_as_on_the_cpu(family: str, pattern: str, quality: str) -> None:
    ask = ask_of(family, pattern, quality)
    ours = tiny_model(family)
    try:
        expected = llmprune.prune(ours, **ask)
    except RequestError as refused:
        if " at sparsity " not in refused.message:
            raise
        pytest.skip(refused.message)  # by the sizes of the tiny model
    theirs = tiny_model(family).to("cuda")
    report = llmprune.prune(theirs, **ask)
    assert counts(report) == counts(expected)
    assert all(t.is_cuda for t in [*theirs.parameters(), *theirs.buffers()])
    assert agreement(ours.state_dict(), theirs.state_dict()) >= AGREE
    pairs = [(ours, theirs)] + ([(expected.model, report.model)] if expected.model is not None else [])
    for on_cpu, on_gpu in pairs:
        assert value_of(on_gpu) == pytest.approx(value_of(on_cpu), rel=CLOSE)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "channels", "experts", "hidden"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_checkpoint_is_pruned_as_on_the_cpu(family: str, pattern: str, tmp_path: Path) -> None:
    if not fits(family, pattern):
        pytest.skip(f"{family} has no {pattern}")
    ask = ask_of(family, pattern, "fast") | {"dtype": "float32"}
    source = save_tiny(family, tmp_path / "model", torch.float32)
    expected, report = (llmprune.prune(source, device=device, output=str(tmp_path / device), **ask) for device in ("cpu", "cuda"))
    assert counts(report) == counts(expected)
    stored = [load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "cuda")]
    assert {name: (t.shape, t.dtype) for name, t in stored[0].items()} == {name: (t.shape, t.dtype) for name, t in stored[1].items()}
    assert agreement(*stored) >= AGREE
    dense, pruned = (value_of(AutoModelForCausalLM.from_pretrained(tmp_path / device)) for device in ("cpu", "cuda"))
    assert pruned == pytest.approx(dense, rel=CLOSE)


@pytest.mark.parametrize("ask", [{"pattern": "2:4", "method": "sparsegpt"}, {"pattern": "channels", "sparsity": 0.5}], ids=str)
def test_a_checkpoint_in_half_precision_is_pruned_in_it(ask: dict[str, Any], tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "model", torch.bfloat16)
    report = llmprune.prune(source, device="cuda", output=str(tmp_path / "out"), calibration=tiny_windows(), **ask)
    assert report.environment.dtype == "bfloat16"
    assert all(math.isfinite(block.output_error) for block in report.blocks)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


class Killed(BaseException):
    pass


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "model", torch.float32)
    ask: dict[str, Any] = {"pattern": "2:4", "quality": "fast", "calibration": tiny_windows(), "device": "cuda"}

    def kill(step: str, done: int, total: int) -> None:
        if step == "prune" and done == 1:
            raise Killed

    llmprune.prune(source, output=str(tmp_path / "whole"), **ask)
    with pytest.raises(Killed):
        llmprune.prune(source, output=str(tmp_path / "resumed"), on_progress=kill, **ask)
    llmprune.prune(source, output=str(tmp_path / "resumed"), **ask)
    assert (tmp_path / "resumed" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
