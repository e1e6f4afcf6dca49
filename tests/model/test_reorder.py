"""Inner channels reordered for N:M: exact, found on any architecture, and truly N:M in the saved model."""

from __future__ import annotations

import itertools
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, parameters_of, save_tiny, tiny_model, tiny_windows
from often import often
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.errors import RequestError
from llmprune.maths.order import best_order
from llmprune.model.matrices import Selection, block_matrices
from llmprune.report.inspection import broken_groups
from llmprune.statistics import stages as statistics
from llmprune.statistics.stages import inner_channels
from llmprune.stream.flow import Flow
from llmprune.stream.live import LiveStream
from llmprune.stream.selected import selected

IDS_NL = tiny_windows()
ASK: dict[str, Any] = {"calibration": IDS_NL, "pattern": "2:4", "permute": True, "device": "cpu"}
NOTHING_TO_REORDER = {"mamba"}  # its one inner product has no writer that is free of the recurrence


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_shuffled_channels_leave_the_logits_as_they_are(family: str) -> None:
    model = tiny_model(family).requires_grad_(False)
    model.set_experts_implementation("eager")
    before = model(IDS_NL, use_cache=False).logits
    stream = LiveStream(model)
    flow = Flow(stream, IDS_NL)
    matrices = selected(stream, Selection())
    generator = torch.Generator().manual_seed(1)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    found = 0
    for index in range(len(stream.names)):
        with stream.block(index) as block:
            for channels in inner_channels(flow, index, block, matrices[index]).values():
                spans, _, width = channels.columns_SKW.shape
                channels.apply(block, torch.stack([torch.randperm(width, generator=generator) for _ in range(spans)]))
                found += 1
            flow.through(index, block)
    assert (found == 0) == (family in NOTHING_TO_REORDER)
    assert any(not torch.equal(weights[name], p) for name, p in model.named_parameters()) == (found > 0)
    assert float((model(IDS_NL, use_cache=False).logits - before).abs().max()) < 1e-5 * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"o_proj": {"v_proj"}, "down_proj": {"gate_proj", "up_proj"}}),
        ("phi3", {"o_proj": {"qkv_proj"}, "down_proj": {"gate_up_proj"}}),
        ("gpt2", {"attn.c_proj": {"c_attn"}, "mlp.c_proj": {"c_fc"}}),
        ("gpt_neox", {"dense": {"query_key_value"}, "dense_4h_to_h": {"dense_h_to_4h"}}),
        ("falcon_new", {"dense": {"query_key_value"}, "dense_4h_to_h": {"dense_h_to_4h"}}),
        ("gpt_oss", {"o_proj": {"v_proj"}, "down_proj": {"gate_up_proj"}}),
        ("gemma4_text", {"down_proj": {"gate_proj", "up_proj"}}),  # its values are read by other blocks too
    ],
)
@torch.no_grad()
def test_the_channels_of_known_layouts_are_found(family: str, expected: dict[str, set[str]]) -> None:
    model = tiny_model(family).requires_grad_(False)
    model.set_experts_implementation("eager")
    stream = LiveStream(model)
    flow = Flow(stream, IDS_NL)
    with stream.block(0) as block:
        matrices = selected(stream, Selection())[0]
        found = inner_channels(flow, 0, block, matrices)
    ends = {channels.reader.parameter.removesuffix(".weight"): channels for channels in found.values()}
    assert len(ends) == len(expected)
    for reader, writers in expected.items():
        (channels,) = [c for name, c in ends.items() if name.endswith(reader)]
        assert {w.parameter.removesuffix(".weight").rpartition(".")[2] for w, _ in channels.writers} == writers


def held(score_RC: Tensor, n: int, m: int) -> float:
    return float(score_RC.reshape(len(score_RC), -1, m).topk(n, -1).values.sum())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 3), (4, 8)])
def test_an_order_holds_no_less_and_nears_the_best(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        score_RC = torch.rand(6, 2 * m, generator=generator) ** 4
        order_C = best_order(score_RC, torch.arange(2 * m).view(1, 1, -1), n, m)[0]
        assert sorted(order_C.tolist()) == list(range(2 * m))
        best = 0.0
        for left in itertools.combinations(range(2 * m), m):
            right = [c for c in range(2 * m) if c not in left]
            best = max(best, held(score_RC[:, [*left, *right]], n, m))
        now, before = held(score_RC[:, order_C], n, m), held(score_RC, n, m)
        assert before <= now + 1e-5
        assert now >= before + 0.8 * (best - before)
    sorted_RC = torch.tensor([[9.0] * m + [0.0] * m])  # all that counts in one group: N of it could stay, 2N can
    order_C = best_order(sorted_RC, torch.arange(2 * m).view(1, 1, -1), n, m)[0]
    assert held(sorted_RC[:, order_C], n, m) == 9.0 * min(2 * n, m)


WANDA, SPARSEGPT, BALANCED = {"method": "wanda"}, {"method": "sparsegpt"}, {"quality": "balanced"}
CASES = list(product(["llama", "gpt2", "phi3", "mixtral", "gpt_oss", "bloom", "qwen2"], [WANDA, SPARSEGPT, BALANCED]))


@pytest.mark.parametrize(
    ("family", "method"), often(CASES, *(("llama", method) for method in (WANDA, SPARSEGPT, BALANCED)), ("gpt2", WANDA), ("mixtral", BALANCED))
)
def test_the_saved_model_keeps_every_group(family: str, method: dict[str, str], tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model", torch.float32)
    report = llmprune.prune(tmp_path / "model", output=str(tmp_path / "out"), **ASK, **method)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for block in report.blocks:
        for m in block_matrices(model.get_submodule(block.block)):
            if Selection().takes(f"{block.block}.{m.name}"):
                assert broken_groups(m.view(model.get_submodule(block.block)), 2, 4) == 0
    changed = {name for block in report.blocks for name in block.changed}
    pruned = parameters_of(model, report)
    for (name, was), now in zip(dense.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(was, now) or name in changed | pruned, name
        if name in changed:
            assert torch.equal(was.sort().values, now.sort().values), name  # only places were traded
    better = [row.saliency for row in report.rows if row.saliency]
    assert better
    assert all(before <= after + 1e-6 for before, after in better)
    stored = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    rows = [row for block in stored["blocks"] for row in block["rows"]]
    assert [row["saliency"] and tuple(row["saliency"]) for row in rows] == [row.saliency for row in report.rows]

    live = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert llmprune.prune(live, **{key: value for key, value in ASK.items() if key != "device"}, **method).blocks == report.blocks
    for (name, ours), theirs in zip(live.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_forwards_that_wait_see_the_new_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits before a matrix was written in the old order: forwards that start anew end at the same weights."""
    save_tiny("llama", tmp_path / "model")
    first = llmprune.prune(tmp_path / "model", output=str(tmp_path / "waiting"), **ASK)
    monkeypatch.setattr(statistics, "memory_of", lambda device: 0)
    anew = llmprune.prune(tmp_path / "model", output=str(tmp_path / "anew"), **ASK)
    assert [row.zeros for row in first.rows] == [row.zeros for row in anew.rows]
    for ours, theirs in zip(first.blocks, anew.blocks, strict=True):  # sums over channels in another order round otherwise
        assert ours.output_error == pytest.approx(theirs.output_error, rel=1e-3)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        ({"pattern": "unstructured", "sparsity": 0.5}, "channels reordered for pattern unstructured"),
        ({"dtype": "bfloat16"}, "permute with bfloat16 computing"),
    ],
)
def test_refused(ask: dict[str, Any], says: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    with pytest.raises(RequestError, match=says):
        llmprune.prune(tmp_path / "model", output=str(tmp_path / "out"), **(ASK | ask))
    assert not (tmp_path / "out").exists()
