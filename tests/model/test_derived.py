"""Layers of architectures without a table: the smaller config is found by trying, and what it cannot express is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuts import ROUNDING, WINDOWS, logits, passed_by, reloaded, tiny
from families import BASE, FAMILIES, TOKENS, uneven
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llmprune
from llmprune.errors import RequestError
from llmprune.export.live import slice_model
from llmprune.model.families.lookup import TABLES
from llmprune.structured.derived import inexpressible

FOUR = BASE | {"num_hidden_layers": 4}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "dots1": (
        "dots1",
        FAMILIES["deepseek_v3"][1] | {"num_hidden_layers": 4, "num_key_value_heads": 2, "first_k_dense_replace": 2, "n_shared_experts": 1},
    ),
    "cohere2_moe": ("cohere2_moe", FOUR | {"num_experts": 4, "num_experts_per_tok": 2}),
    "glm4": ("glm4", FOUR | {"head_dim": 8}),
    "exaone4": ("exaone4", FOUR | {"sliding_window": 8, "sliding_window_pattern": 2}),
    "ctrl": ("ctrl", TOKENS | {"n_embd": 32, "dff": 48, "n_layer": 4, "n_head": 4, "n_positions": 64}),
    "biogpt": ("biogpt", FOUR),
}
SOME = ["phi", "gptj", "biogpt", "granitemoe", "llama4_text", "dots1", "exaone4", "ctrl"]


def model_of(name: str) -> Any:
    if name in FAMILIES:
        return tiny(name, **({"n_layer": 4} if "n_layer" in FAMILIES[name][1] else {"num_hidden_layers": 4}))
    kind, values = MORE[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values))
    uneven(model)
    return model.eval()


@pytest.mark.parametrize("name", [*SOME, *(pytest.param(n, marks=pytest.mark.slow) for n in ("glm4", "cohere2_moe", "stablelm"))])
def test_each_layer_left_out_is_the_model_that_passes_it_by(name: str, tmp_path: Any) -> None:
    model = model_of(name)
    assert model.config.model_type not in TABLES
    for dropped in range(4):
        kept = [i for i in range(4) if i != dropped]
        slice_model(model, [{}] * 4, kept).save_pretrained(tmp_path / str(dropped))
        with passed_by(model, kept):
            wanted = logits(model)
        assert float((logits(reloaded(tmp_path / str(dropped))) - wanted).abs().max()) < ROUNDING


@pytest.mark.parametrize("name", ["dots1", "phi"])
def test_a_checkpoint_without_its_least_layers(name: str, tmp_path: Any) -> None:
    model = model_of(name)
    model.save_pretrained(tmp_path / "model")
    report = llmprune.prune(
        tmp_path / "model", 0.5, "layers", target="symmetric", calibration=WINDOWS, output=str(tmp_path / "out"), accept_damage=True
    )
    assert report.smaller.difference < 1e-4
    with passed_by(model, list(report.smaller.layers)):
        wanted = logits(model)
    assert float((logits(reloaded(tmp_path / "out")) - wanted).abs().max()) < ROUNDING


def test_what_follows_from_a_layers_number_is_refused() -> None:
    """Differential attention starts from a constant that each layer computes from its number."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["diffllama"](**FOUR))
    assert inexpressible(model, "model.layers", [0, 1, 2]) is None
    with pytest.raises(RequestError, match=r"block 1 of the smaller config would be another kind of block than block 2 \(self_attn.lambda_init\)"):
        slice_model(model, [{}] * 4, [0, 2, 3])
