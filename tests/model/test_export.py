"""What a cut model is saved as: its own kind, another kind that can say its sizes, layers of different sizes, or zeros up to the widest."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from cuts import ROUNDING, blocks_of, generates_alike, logits, masked, random_keeps, reloaded, tiny, without_experts
from transformers import AutoModelForCausalLM
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

from llmprune.errors import RequestError
from llmprune.export.config import export, padded
from llmprune.export.live import empty_model, save_sliced, slice_model
from llmprune.model.blocks import find_blocks
from llmprune.model.skeleton import build_skeleton
from llmprune.structured.slicing import widened
from llmprune.structured.spaces import all_spaces, closest_count, legal_counts, spaces_of


@pytest.mark.parametrize("pattern", ["kv-groups", "hidden"])
def test_llama_becomes_mistral_where_its_config_is_too_strict(pattern: str, tmp_path: Path) -> None:
    model = tiny("llama_one_block", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0})
    kept = torch.tensor([0, 1, 3]) if pattern == "kv-groups" else torch.arange(30)
    name = spaces_of(model.config, 0, blocks_of(model)[0], pattern)[0].name
    keeps = [{name: kept} for _ in blocks_of(model)]
    exported = save_sliced(model, tmp_path, keeps)
    again = reloaded(tmp_path)
    assert type(again).__name__ == "MistralForCausalLM"
    assert again.config.sliding_window is None
    assert "saved as mistral" in exported.notes[0]
    assert (logits(again) - logits(masked(model, keeps))).abs().max() < ROUNDING
    generates_alike(again)


def test_the_counts_that_a_config_can_say() -> None:
    gemma = tiny("gemma2")
    groups = spaces_of(gemma.config, 0, blocks_of(gemma)[0], "kv-groups")[0]
    assert legal_counts(gemma.config, groups) == [1, 2, 4]
    assert legal_counts(gemma.config, groups, native=False) == [1, 2, 3, 4]
    with pytest.raises(RequestError, match="6 heads do not divide"):
        slice_model(gemma, [{groups.name: torch.arange(3)}] * 2)
    llama = tiny("llama")
    heads, mlp = (spaces_of(llama.config, 0, blocks_of(llama)[0], pattern)[0] for pattern in ("heads", "channels"))
    assert legal_counts(llama.config, heads) == [4, 8]
    assert legal_counts(llama.config, mlp, round_to=8) == [8, 16, 24, 32, 40, 48]
    assert closest_count(legal_counts(llama.config, mlp, round_to=8), 36) == 40
    experts = spaces_of(tiny("deepseek_v3").config, 1, blocks_of(tiny("deepseek_v3"))[1], "experts")[0]
    assert legal_counts(tiny("deepseek_v3").config, experts) == [4, 6, 8]


UNEVEN = {
    "llama": "kv-groups",
    "gemma2": "heads",
    "phi3": "kv-groups",
    "olmo2": "kv-groups",
    "opt": "channels",
    "gpt2": "channels",
    "gpt_neox": "channels",
    "falcon": "channels",
    "mixtral": "experts",
    "qwen3_moe": "channels",
    "gpt_oss": "heads",
    "deepseek_v3": "heads",
    "mamba": "kernel",
    "lfm2": "channels",
    "qwen3_next": "experts",
}


@pytest.mark.parametrize("name", UNEVEN)
def test_layers_of_different_sizes_need_their_own_code(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    keeps = random_keeps(model, UNEVEN[name], layers=(0,))
    sliced = slice_model(model, keeps)
    if UNEVEN[name] == "experts":
        other = copy.deepcopy(model)
        whole = random_keeps(model, "experts")
        every = [keeps[0], *({n: torch.arange(12 if name == "qwen3_moe" else 4) for n in keep} for keep in whole[1:])]
        with without_experts(other, every):
            expected = logits(other)
    else:
        expected = logits(masked(model, keeps))
    assert (logits(sliced) - expected).abs().max() < ROUNDING
    generates_alike(sliced)
    exported = save_sliced(model, tmp_path, keeps)
    assert exported.per_layer
    assert len(exported.files["modeling_pruned.py"].splitlines()) < 25
    (tmp_path / "config.json").write_text(json.dumps(exported.config | {"dtype": "float32"}))
    with pytest.raises((AmbiguousGlobalPerLayerAttributeError, RuntimeError), match=r"per-layer attribute|mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    again = reloaded(tmp_path, trust_remote_code=True)
    assert torch.equal(logits(again), logits(sliced))
    generates_alike(again)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(reloaded(tmp_path / "again", trust_remote_code=True)), logits(sliced))


@pytest.mark.parametrize(("name", "pattern"), [("llama", "channels"), ("gemma2", "heads"), ("olmo2", "kv-groups"), ("mamba", "kernel")])
def test_padded_with_zeros_to_the_widest_layer(name: str, pattern: str, tmp_path: Path) -> None:
    model = tiny(name)
    spaces = [all_spaces(model.config, i, b) for i, b in enumerate(blocks_of(model))]
    keeps = random_keeps(model, pattern)
    space = next(s for s in spaces[0] if s.name in keeps[0])
    keeps[0][space.name] = widened(space, keeps[0][space.name], 3 * space.units // 4 if space.groups == 1 else space.units)
    zeros = masked(model, keeps)
    wide = padded(spaces, keeps)
    assert len({len(keep[space.name]) for keep in wide}) == 1
    slice_model(zeros, wide).save_pretrained(tmp_path)
    assert (logits(reloaded(tmp_path)) - logits(zeros)).abs().max() < ROUNDING


def test_experts_are_not_padded() -> None:
    model = tiny("mixtral")
    spaces = [all_spaces(model.config, i, b) for i, b in enumerate(blocks_of(model))]
    with pytest.raises(RequestError, match="router would choose"):
        padded(spaces, [{"mlp.experts": torch.arange(2)}, {"mlp.experts": torch.arange(3)}])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "lfm2", "gpt_neox"])
def test_a_skeleton_and_a_stored_config_say_the_same(name: str, tmp_path: Path) -> None:
    """Nothing needs the weights but the slicing itself."""
    model = tiny(name)
    model.save_pretrained(tmp_path)
    source = json.loads((tmp_path / "config.json").read_text())
    skeleton = build_skeleton(source, torch.float32)
    keeps = random_keeps(model, "channels")
    spaces = [all_spaces(skeleton.config, i, b) for i, b in enumerate(blocks_of(skeleton))]
    assert all(p.is_meta for p in skeleton.parameters())
    exported = export(source, skeleton, find_blocks(skeleton), spaces, keeps)
    sliced = slice_model(model, keeps)
    assert build_skeleton(exported.config, torch.float32).config.to_dict() == sliced.config.to_dict()
    assert set(exported.config) - set(source) <= {"n_inner"}
    layers = range(len(spaces))
    for export_layers in (keeps, [{}, *keeps[1:]]):
        exported = export(source, skeleton, find_blocks(skeleton), spaces, export_layers)
        empty = empty_model(skeleton, exported, find_blocks(skeleton), spaces, export_layers, layers)
        shapes = {n: p.shape for n, p in slice_model(model, export_layers).named_parameters(remove_duplicate=False)}
        assert {n: p.shape for n, p in empty.named_parameters(remove_duplicate=False) if p.is_meta} == shapes


def test_a_substitute_needs_no_defaults_of_its_own() -> None:
    """An old Llama's config leaves to defaults what Mistral's defaults say otherwise."""
    source = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 8, "vocab_size": 96}
    source |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    skeleton = build_skeleton(source, torch.float32)
    spaces = [all_spaces(skeleton.config, i, b) for i, b in enumerate(blocks_of(skeleton))]
    exported = export(source, skeleton, find_blocks(skeleton), spaces, [{"self_attn.heads": torch.arange(5)}])
    other = build_skeleton(exported.config, torch.float32).config
    assert (other.model_type, other.num_key_value_heads, other.num_attention_heads, other.head_dim) == ("mistral", 5, 5, 4)
    for same in ("rope_parameters", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "hidden_act"):
        assert getattr(other, same) == getattr(skeleton.config, same), same
