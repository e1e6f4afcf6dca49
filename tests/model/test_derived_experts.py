"""Experts of architectures without a table: dropped with their rows of the router, or refused with the step of the proof that failed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuts import ROUNDING, WINDOWS, half, logits, reloaded, without_experts
from families import BASE, FAMILIES, uneven
from often import often
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llmprune
from llmprune.errors import RequestError
from llmprune.export.live import slice_model
from llmprune.model.blocks import find_blocks
from llmprune.model.families.lookup import TABLES
from llmprune.structured import counted
from llmprune.structured.derived_units import derived_spaces
from llmprune.structured.fields import fields_of
from llmprune.structured.spaces import refusal

GROUPS = FAMILIES["deepseek_v3"][1] | {"num_key_value_heads": 2, "n_shared_experts": 1, "head_dim": 8}
LATENT = FAMILIES["deepseek_v3"][1] | {"topk_method": "group_limited_greedy", "head_dim": 8}
FEW = BASE | {"moe_intermediate_size": 16, "head_dim": 8}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "granitemoe": FAMILIES["granitemoe"],
    "dots1": ("dots1", GROUPS),  # two groups of experts, of which a token chooses one
    "glm4_moe": ("glm4_moe", GROUPS),
    "deepseek_v2": ("deepseek_v2", LATENT),  # a group is judged by its best expert
    "dbrx": FAMILIES["dbrx"],  # bare two-dimensional parameters; counted in a config inside the config
    "nemotron_h": FAMILIES["nemotron_h"],
    "lara_mini": FAMILIES["lara_mini"],
    "ernie4_5_moe": ("ernie4_5_moe", FEW | {"moe_num_experts": 6, "moe_k": 2}),  # the choice has a bias of two dimensions
    "hunyuan_v1_moe": ("hunyuan_v1_moe", FEW | {"num_experts": 4, "moe_topk": [2, 2]}),  # a list of numbers
    "gemma4_moe": (  # experts beside a dense FFN, their outputs scaled one by one
        "gemma4_text",
        FEW | {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2} | {"hidden_size_per_layer_input": 0, "sliding_window": 8},
    ),
    "cohere2_moe": ("cohere2_moe", BASE | {"num_experts": 4, "num_experts_per_tok": 2}),
}


def model_of(kind: str, values: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values))
    uneven(model)
    for name, buffer in model.named_buffers():
        if "bias" in name:
            buffer.copy_(0.1 * torch.rand(buffer.shape))
    return model.eval()


@pytest.mark.parametrize("name", often(KINDS, "granitemoe", "dots1", "dbrx", "ernie4_5_moe", "gemma4_moe"))
def test_experts_cut_are_experts_that_no_token_chooses(name: str, tmp_path: Any) -> None:
    kind, values = KINDS[name]
    model = model_of(kind, values)
    assert kind not in TABLES
    spaces = derived_spaces(model, find_blocks(model), "experts")
    generator = torch.Generator().manual_seed(3)
    keeps = [{s.name: half(s, generator) for s in found} for found in spaces]
    assert any(keeps)
    slice_model(model, keeps).save_pretrained(tmp_path)
    smaller = logits(reloaded(tmp_path))
    assert float((smaller - logits(model)).abs().max()) > 100 * ROUNDING
    with without_experts(model, keeps, spaces):
        assert float((smaller - logits(model)).abs().max()) < ROUNDING


@pytest.mark.parametrize("name", often(("dots1", "gemma4_moe"), "dots1"))
def test_a_checkpoint_without_its_least_experts(name: str, tmp_path: Any) -> None:
    model = model_of(*KINDS[name])
    model.save_pretrained(tmp_path / "model")
    report = llmprune.prune(tmp_path / "model", 0.5, "experts", calibration=WINDOWS, output=str(tmp_path / "out"), accept_damage=True)
    assert report.reloaded.difference < 1e-4
    spaces = derived_spaces(model, find_blocks(model), "experts")
    kept = [{s.name: torch.tensor(row.kept) for s, row in zip(found, b.rows, strict=True)} for found, b in zip(spaces, report.blocks, strict=True)]
    assert all(len(keep) == 4 for block in kept for keep in block.values())
    with without_experts(model, kept, spaces):
        assert float((logits(reloaded(tmp_path / "out")) - logits(model)).abs().max()) < ROUNDING


def test_each_group_keeps_as_many_as_a_token_may_choose_there() -> None:
    model = model_of("glm4_moe", GROUPS | {"n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 5})
    dense, mixture = derived_spaces(model, "model.layers", "experts")
    assert [(s.units, s.groups, s.least, s.config) for s in mixture] == [(12, 3, 9, (("n_routed_experts", 1),))]
    assert not dense


def test_groups_that_are_not_known_are_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "EXPERT_GROUPS", ())
    with pytest.raises(RequestError, match="glm4_moe cannot be cut by experts: n_routed_experts: the smaller block's output differs by"):
        derived_spaces(model_of("glm4_moe", GROUPS), "model.layers", "experts")


def test_experts_that_no_field_counts_are_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(counted.COUNTS, "experts", lambda model, path: iter(()))
    with pytest.raises(RequestError, match="granitemoe cannot be cut by experts: no field of its config counts them"):
        derived_spaces(model_of(*KINDS["granitemoe"]), "model.layers", "experts")


REFUSED = {
    "llama4_text": (FAMILIES["llama4_text"], "not called with hidden states, the chosen experts and their gates"),
    "jetmoe": (("jetmoe", BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}), "not called with hidden states"),
    "all chosen": (("granitemoe", BASE | {"num_local_experts": 2, "num_experts_per_tok": 2}), r"cannot be fewer \(at least 2\)"),
    "dense": (("phi", BASE), "phi cannot be cut by experts: it has no experts"),
    "dense blocks alone": (("dots1", GROUPS | {"first_k_dense_replace": 2}), "it has no experts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_proved_is_refused_with_the_step(name: str) -> None:
    (kind, values), why = REFUSED[name]
    with pytest.raises(RequestError, match=why):
        derived_spaces(model_of(kind, values), "model.layers", "experts")


def test_a_dense_model_is_told_so_before_any_work(tmp_path: Any) -> None:
    model_of("phi", BASE).save_pretrained(tmp_path / "model")
    with pytest.raises(RequestError, match="it has no experts"):
        llmprune.prune(tmp_path / "model", 0.5, "experts", calibration=WINDOWS, output=str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))
    assert "no table of its structure, so only channels, heads, kv-groups, experts, layers can be cut" in str(
        refusal(CONFIG_MAPPING["phi"](**BASE), "hidden")
    )


def test_tables_by_number_in_a_config_are_no_fields() -> None:
    """Aria's has one from patches to queries."""
    assert list(fields_of({"text_config": {"num_experts": 4, "patches": {1225: 128}}, "top": 1})) == [("text_config.num_experts", 4), ("top", 1)]
