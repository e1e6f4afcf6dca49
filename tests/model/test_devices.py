"""Whole runs on a device that is pretended (tests/pretended.py): no operation mixes it with the CPU, wherever hidden states wait meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from families import save_tiny, tiny_model, tiny_windows
from pretended import Mixed, device
from torch import Tensor, nn

import llmprune
from llmprune.data.windows import Windows
from llmprune.evaluation.beside import dense_pass, pruned_pass
from llmprune.ratios.latency import Timer
from llmprune.stream import hidden_states
from llmprune.stream.live import LiveStream
from llmprune.stream.reshaped import Reshaped
from llmprune.structured.structure import structure_of
from llmprune.types import SILENT

LARGE = 1 << 40
GPU = torch.device("cuda", 0)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"sparsity": 0.5, "quality": "fast"}),
    ("llama_one_block", {"sparsity": 0.5}),
    ("llama_one_block", {"pattern": "2:4", "quality": "max", "polish_steps": 1, "only": "o_proj"}),
    ("llama_one_block", {"pattern": "2:4", "quality": "fast", "permute": True, "only": "mlp"}),
    ("llama", {"sparsity": 0.5, "method": "wanda", "allocation": "owl"}),
    ("llama", {"sparsity": 0.5, "pattern": "block:4x4", "method": "sparsegpt"}),
    ("llama", {"sparsity": 0.5, "method": "sparsegpt", "only": "lm_head|mlp"}),
    ("llama", {"sparsity": 0.25, "pattern": "channels"}),
    ("llama", {"sparsity": 0.5, "pattern": "kv-groups"}),
    ("llama", {"sparsity": 0.25, "pattern": "hidden"}),
    ("llama", {"sparsity": 1 / 3, "pattern": "layers"}),
    ("llama", {"sparsity": 1 / 3, "pattern": "layers", "criterion": "block_influence", "target": "symmetric"}),
    ("phi3", {"sparsity": 0.25, "pattern": "channels", "method": "taylor"}),
    ("olmo2", {"sparsity": 0.5, "pattern": "heads", "quality": "fast"}),
    ("gpt2", {"sparsity": 0.25, "pattern": "channels", "method": "flap"}),
    ("gpt_oss", {"pattern": "2:4", "method": "wanda"}),
    ("mixtral", {"sparsity": 0.5, "pattern": "experts"}),
    ("llama_one_block", {"sparsity": 0.5, "criterion": "gblm"}),
    ("mamba", {"sparsity": 0.5, "method": "wanda"}),
]


def by_turns() -> Callable[[], int]:
    """A device that has room for some hidden states and none for others."""
    return itertools.cycle([LARGE, 0, 0, LARGE, 0, LARGE, LARGE]).__next__


def on_device() -> Tensor:
    return torch.ones(3, device="cuda")


@pytest.mark.parametrize(
    "operation",
    [
        lambda: on_device() + torch.ones(3),
        lambda: on_device().sum() + torch.ones(3),
        lambda: torch.ones(3)[on_device() > 0],
        lambda: torch.cat([on_device(), torch.ones(3)]),
        lambda: torch.where(on_device() > 0, torch.ones(3), on_device()),
        lambda: nn.Linear(3, 3)(on_device()),
        lambda: nn.Linear(3, 3).to("cuda")(torch.ones(3)),
        lambda: on_device().numpy(),
        lambda: on_device().normal_(generator=torch.Generator()),
        lambda: on_device() + torch.ones(3, device="cuda:1"),
    ],
)
def test_the_pretended_device_refuses_what_cuda_refuses(operation: Callable[[], Any]) -> None:
    with device(), pytest.raises(Mixed):
        operation()


def test_the_pretended_device_takes_what_cuda_takes() -> None:
    with device():
        one = on_device()
        one[torch.tensor([0])] = torch.tensor(2.0)
        one.copy_(torch.ones(3))
        made = [
            one[torch.arange(2)],
            one + torch.tensor(1.0),
            one.double(),
            one.new_zeros(2),
            torch.zeros_like(one),
            nn.Linear(3, 3).to(one.device)(one),
        ]
        leaf = torch.zeros(3, device="cuda", requires_grad=True)
        (leaf * 2).sum().backward()
        assert {t.device for t in [*made, leaf.grad]} == {GPU}
        assert {t.device for t in (one.cpu(), one.to("cpu", torch.float64), torch.ones(3))} == {torch.device("cpu")}


@pytest.mark.parametrize(("family", "ask"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())))
def test_a_run_keeps_to_its_device(family: str, ask: dict[str, Any]) -> None:
    plain = llmprune.prune(tiny_model(family), calibration=tiny_windows(), **ask)
    with device(by_turns()):
        model = tiny_model(family).to("cuda")
        report = llmprune.prune(model, calibration=tiny_windows(), **ask)
        result = model if report.model is None else report.model
        assert {t.device for t in [*result.parameters(), *result.buffers()]} == {GPU}
    assert [(row.matrix, row.zeros, row.dropped) for row in report.rows] == [(row.matrix, row.zeros, row.dropped) for row in plain.rows]


@pytest.mark.parametrize("ask", [{"pattern": "2:4", "method": "sparsegpt"}, {"sparsity": 0.25, "pattern": "channels", "quality": "fast"}], ids=str)
def test_hidden_states_may_wait_in_a_file(ask: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_states, "memory_limit", lambda: 0)
    with device(lambda: 0):
        assert llmprune.prune(tiny_model("llama").to("cuda"), calibration=tiny_windows(), **ask).rows


@pytest.mark.parametrize("ask", [{"pattern": "2:4", "method": "sparsegpt"}, {"sparsity": 0.25, "pattern": "hidden", "rotate": True}], ids=str)
def test_a_checkpoint_is_pruned_on_a_device(ask: dict[str, Any], tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "model", torch.float32)
    with device(by_turns()):
        report = llmprune.prune(source, calibration=tiny_windows(), device="cuda", output=str(tmp_path / "out"), **ask)
    assert report.environment.device == "cuda"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_pruned_model_is_measured_beside_the_dense_one_on_a_device() -> None:
    windows = Windows(tiny_windows(), "text", "evaluation")
    with device(by_turns()):
        stream = LiveStream(tiny_model("llama").to("cuda"))
        dense = dense_pass(stream, windows, True, None, SILENT)
        stream.model.lm_head.weight.data *= 1.25
        perplexity, divergence = pruned_pass(dense, stream)
    assert perplexity.value != dense.perplexity.value
    assert divergence.kl > 0


@pytest.mark.parametrize("ask", [{"sparsity": 0.5, "method": "sparsegpt"}, {"sparsity": 1 / 3, "pattern": "layers"}], ids=str)
def test_a_model_may_lie_on_two_devices(ask: dict[str, Any]) -> None:
    with device():
        model = tiny_model("llama").to("cuda:0")
        for part in [*model.model.layers[1:], model.model.norm, model.lm_head]:
            add_hook_to_module(part.to("cuda:1"), AlignDevicesHook(execution_device="cuda:1"))
        assert llmprune.prune(model, calibration=tiny_windows(), **ask).rows


def test_blocks_are_timed_on_their_device() -> None:
    with device(lambda: 0):
        model = tiny_model("llama").to("cuda")
        structure = structure_of(model, [f"model.layers.{i}" for i in range(3)], "channels", lambda name: True)
        assert Timer(Reshaped(LiveStream(model), structure), tiny_windows(1)).ratio(0.5) > 0
