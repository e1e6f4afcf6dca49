"""Cut models against the same models with zeros, and against what plain transformers loads of them: every family, every pattern."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import (
    NAMES,
    ROUNDING,
    WINDOWS,
    blocks_of,
    cases,
    generates_alike,
    logits,
    masked,
    passed_by,
    random_keeps,
    reloaded,
    table,
    tiny,
    without_experts,
)
from families import FAMILIES
from torch import Tensor, nn

import llmprune
from llmprune.errors import RequestError
from llmprune.export.config import export
from llmprune.export.live import slice_model
from llmprune.model.blocks import find_blocks
from llmprune.structured.slicing import mask_block, parameters_per_unit, rebuild, slice_parameters
from llmprune.structured.spaces import Space, all_spaces, outer_space, refusal, spaces_of


@pytest.mark.parametrize(("name", "pattern"), cases(works=True))
def test_what_is_cut_computes_what_zeros_compute_and_loads_everywhere(name: str, pattern: str, tmp_path: Path) -> None:
    model = tiny(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    kept = None
    if pattern == "layers":
        kept, keeps = [1], [{} for _ in blocks_of(model)]
        sliced = slice_model(model, keeps, kept)
        with passed_by(model, kept):
            expected = logits(model)
    else:
        keeps = random_keeps(model, pattern)
        assert any(keeps)
        sliced = slice_model(model, keeps)
        if pattern == "experts":
            other = copy.deepcopy(model)
            with without_experts(other, keeps):
                expected = logits(other)
        else:
            expected = logits(masked(model, keeps))
    got = logits(sliced)
    assert (got - expected).abs().max() < ROUNDING
    assert (got - logits(model)).abs().max() > 1000 * ROUNDING, "nothing was cut"
    assert count(sliced) < count(model)
    if pattern not in ("layers", "hidden"):
        assert count(model) - count(sliced) == sum(taken(model, i, keep) for i, keep in enumerate(keeps))
    generates_alike(sliced)
    sliced.save_pretrained(tmp_path)
    again = reloaded(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(logits(again), got)
    (tmp_path / "config.json").write_text(json.dumps(stored_config(model, keeps, kept)))
    again = reloaded(tmp_path)
    assert torch.equal(logits(again), got)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), "the model itself has changed"


def stored_config(model: Any, keeps: list[dict[str, Tensor]], kept: list[int] | None) -> dict[str, Any]:
    """The config that is made from config.json as the uncut model has it."""
    source = json.loads(model.config.to_json_string())
    spaces = [all_spaces(model.config, i, block) for i, block in enumerate(blocks_of(model))]
    return export(source, model, find_blocks(model), spaces, keeps, kept).config


def count(model: nn.Module) -> int:
    return sum(t.numel() for t in model.state_dict().values())


def taken(model: Any, index: int, keep: dict[str, Tensor]) -> int:
    block = blocks_of(model)[index]
    spaces = {space.name: space for space in all_spaces(model.config, index, block)}
    return sum(parameters_per_unit(block, spaces[name]) * (spaces[name].units - len(units)) for name, units in keep.items())


@pytest.mark.parametrize(("name", "pattern"), cases(works=False))
def test_what_cannot_be_cut_is_refused_with_the_reason(name: str, pattern: str) -> None:
    model = tiny(name)
    with pytest.raises(RequestError, match=f"cannot be cut by {pattern}: ") as refused:
        spaces_of(model.config, 0, blocks_of(model)[0], pattern)
    assert refused.value.hint
    assert refused.value.message.count("\n") == 0


SEEN_BEFORE = ("experts", "layers", "olmo2-heads", "olmo2-kv-groups")  # by a router, by a norm over all heads


@pytest.mark.parametrize(("name", "pattern"), [case for case in cases(works=True) if not case.id.endswith(SEEN_BEFORE)])
def test_a_unit_takes_only_what_is_its_own(name: str, pattern: str) -> None:
    """Zeros in what reads the units (or, in the residual stream, in what writes it) are as good as zeros in all that belongs to them."""
    model = tiny(name)
    keeps = random_keeps(model, pattern)
    least = copy.deepcopy(model)
    spaces = [spaces_of(model.config, i, b, pattern) for i, b in enumerate(blocks_of(model))]
    for block, own, keep in zip(blocks_of(least), spaces, keeps, strict=True):
        mask_block(block, [essential(space) for space in own], keep)
    if pattern == "hidden":
        mask_block(least, [essential(outer_space(least))], keeps[0])
    assert (logits(least) - logits(masked(model, keeps))).abs().max() < ROUNDING


def essential(space: Space) -> Space:
    writers = ("o_proj", "down_proj", "out_proj", "embed", "post_attention_layernorm", "post_feedforward_layernorm")
    axes = [a for a in space.axes if space.pattern == "hidden" and any(part in a.parameter for part in writers)]
    if space.pattern == "kernel":
        axes = [a for a in space.axes if "x_proj" in a.parameter]  # Mamba's inner channels are read twice
    return Space(space.pattern, space.name, space.units, tuple(axes), space.readers, space.groups)


RULES = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "gemma3_text": {"layer_types": None, "sliding_window_pattern": 3},
    "cohere2": {"layer_types": None, "sliding_window_pattern": 2},
    "smollm3": {"no_rope_layers": None, "no_rope_layer_interval": 2},
    "gpt_oss": {"layer_types": None},
    "qwen3_moe": {"mlp_only_layers": [3], "decoder_sparse_step": 2},
    "deepseek_v3": {"first_k_dense_replace": 2},
    "lfm2": {"layer_types": None, "full_attn_idxs": [0, 4]},
    "qwen3_next": {"layer_types": None, "full_attention_interval": 2},
    "mamba": {},
    "falcon": {},
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kept", [[0, 2, 3, 4], [1, 4]], ids=str)
def test_layers_keep_what_a_rule_gave_them(name: str, kept: list[int], tmp_path: Path) -> None:
    """Sliding windows, positions, dense and linear layers are counted before layers go."""
    model = tiny(name, num_hidden_layers=5, **RULES[name])
    sliced = slice_model(model, [{}] * 5, kept)
    with passed_by(model, kept):
        assert (logits(sliced) - logits(model)).abs().max() < ROUNDING
    generates_alike(sliced)
    sliced.save_pretrained(tmp_path)
    assert torch.equal(logits(reloaded(tmp_path)), logits(sliced))


def test_layers_must_be_sorted_and_there() -> None:
    model = tiny("llama")
    for wrong in ([], [2, 1], [0, 0], [3]):
        with pytest.raises(RequestError, match="kept"):
            slice_model(model, [{}] * 3, wrong)
    with pytest.raises(RequestError, match="none of them has attention"):
        slice_model(tiny("lfm2"), [{}] * 2, [0])


def test_keeps_that_break_the_groups_are_refused() -> None:
    model = tiny("mixtral")
    block = blocks_of(model)[0]
    spaces = all_spaces(model.config, 0, block)
    wrong = {
        "self_attn.heads": [[0, 1, 2, 4], [0], [4, 0, 2, 6], [0, 2, 4, 8]],
        "mlp.experts": [[1], [1, 1]],
        "self_attn.groups": [[]],
    }
    for name, choices in wrong.items():
        for keep in choices:
            with pytest.raises(RequestError, match=r"kept"):
                slice_parameters(block, spaces, {name: torch.tensor(keep, dtype=torch.long)})
    with pytest.raises(RequestError, match="intermediate_size would be"):
        rebuild(block, model.config, 0, spaces, {"mlp.experts[0]": torch.arange(8), "mlp.experts[1]": torch.arange(16)})
    with pytest.raises(RequestError, match="num_attention_heads is changed by"):
        rebuild(block, model.config, 0, spaces, {"self_attn.heads": torch.arange(0, 8, 2), "self_attn.groups": torch.arange(2)})
    with pytest.raises(RequestError, match="router"):
        mask_block(block, spaces, {"mlp.experts": torch.arange(2)})


def test_patterns_can_be_cut_together(tmp_path: Path) -> None:
    model = tiny("gpt_oss")
    parts = [random_keeps(model, pattern) for pattern in ("channels", "heads", "hidden")]
    keeps = [a | b | c for a, b, c in zip(*parts, strict=True)]
    sliced = slice_model(model, keeps)
    assert (logits(sliced) - logits(masked(model, keeps))).abs().max() < ROUNDING
    experts = [cut | own for cut, own in zip(keeps, random_keeps(model, "experts"), strict=True)]
    other = masked(model, keeps)
    with without_experts(other, experts):
        expected = logits(other)
    smallest = slice_model(model, experts)
    assert (logits(smallest) - expected).abs().max() < ROUNDING
    smallest.save_pretrained(tmp_path)
    assert torch.equal(logits(reloaded(tmp_path)), logits(smallest))


def test_what_is_trained_and_how_it_computes_is_taken_over() -> None:
    model = tiny("llama").to(torch.bfloat16).train()
    model.requires_grad_(False)
    model.model.layers[2].mlp.up_proj.weight.requires_grad_(True)
    model.set_attn_implementation("eager")
    sliced = slice_model(model, random_keeps(model, "channels"), [0, 2])
    assert [n for n, p in sliced.named_parameters() if p.requires_grad] == ["model.layers.1.mlp.up_proj.weight"]
    assert sliced.config._attn_implementation == "eager"
    assert sliced.training
    assert {p.dtype for p in sliced.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in [*sliced.parameters(), *sliced.buffers()])


@pytest.mark.parametrize("pattern", ["unstructured", "channels"])
def test_a_live_model_keeps_the_mode_of_every_module(pattern: str) -> None:
    model = tiny("llama").train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    report = llmprune.prune(model, 0.5, pattern, calibration=WINDOWS)
    for result in [model] if report.model is None else [model, report.model]:
        assert {name: module.training for name, module in result.named_modules()} == modes


def test_no_table_no_cut() -> None:
    model = tiny("stablelm")
    assert "no table" in str(refusal(model.config, "hidden"))
    assert "not a structured pattern" in str(refusal(tiny("llama").config, "rows"))
    with pytest.raises(RequestError, match="no table"):
        outer_space(model)


def test_the_table_has_a_row_for_every_family() -> None:
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table().splitlines() if line.startswith("| ")][1:]
    assert set(rows) == {FAMILIES[name][0] for name in NAMES}


def test_the_table_in_the_docs_is_up_to_date() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "structured.md").read_text()
    assert f"\n{table()}\n" in page, "python tests/cuts.py prints it"


def test_what_only_some_configs_of_a_family_refuse() -> None:
    by_depth = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(RequestError, match="number of the layer"):
        slice_model(by_depth, [{}, {}], [1])
    factors = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [1.0, 2.0], "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    long = tiny("phi3", rope_parameters=factors, original_max_position_embeddings=32)
    assert "rotary factors" in str(refusal(long.config, "heads"))
    with pytest.raises(RequestError, match="rotary factors"):
        spaces_of(long.config, 0, blocks_of(long)[0], "kv-groups")


def test_weights_that_count_from_one_keep_their_digits_in_bfloat16() -> None:
    model = tiny("gemma2").to(torch.bfloat16)
    keeps = random_keeps(model, "hidden")
    kept = keeps[0]["hidden"]
    before_K = model.model.norm.weight.data[kept].double()
    expected_K = (1 + before_K) / (len(kept) / 32) ** 0.5 - 1
    assert torch.equal(slice_model(model, keeps).model.norm.weight, expected_K.to(torch.bfloat16))
