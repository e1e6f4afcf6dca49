"""Layers and units of architectures without a table: the smaller config is found by trying, and what it cannot express is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuts import ROUNDING, WINDOWS, blocks_of, half, logits, passed_by, reloaded, tiny
from families import BASE, FAMILIES, TOKENS, uneven
from often import often
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llmprune
from llmprune.errors import RequestError
from llmprune.export.live import slice_model
from llmprune.model.blocks import find_blocks
from llmprune.model.families.lookup import TABLES
from llmprune.model.matrices import block_matrices
from llmprune.structured.counted import COUNTS
from llmprune.structured.derived import inexpressible
from llmprune.structured.derived_units import Proof, derived_spaces
from llmprune.structured.spaces import refusal, spaces_of
from llmprune.structured.trial import Trial

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
    assert report.reloaded.difference < 1e-4
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


def without_readers(model: Any, keeps: list[Any], spaces: Any) -> Any:
    """A copy whose readers have zeros in the columns of the dropped units; nothing else is changed, so that the writers' layout plays no part."""
    copied = copy.deepcopy(model)
    for block, found, keep in zip(blocks_of(copied), spaces, keeps, strict=True):
        matrices = {m.name: m for m in block_matrices(block)}
        for space in found:
            gone = [unit for unit in range(space.units) if unit not in keep[space.name].tolist()]
            for reader in space.readers:
                matrices[reader.matrix].view(block).data[:, reader.columns_UK[gone].flatten()] = 0
    return copied


KINDS = {
    "phi": "a bias on both sides",
    "ctrl": "unnamed layers in a row",
    "granitemoe": "experts with gate and up in one stack",
    "llama4_text": "stored transposed",
    "dots1": "dense, routed and shared experts",
    "glm4": "gate and up in one matrix",
    "gptj": "no width in the config",
    "exaone4": "norms after the FFN",
    "biogpt": "the FFN lies in the block itself",
    "gemma4_text": "its own config has sizes of single layers",
}


def half_of_each_field(spaces: Any) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{s.name: half(s, generator) for s in found} for found in spaces]


HEADS = {
    "phi": "biases",
    "glm4": "gate and up in one matrix, norms after both",
    "exaone4": "norms inside a head",
    "dots1": "dense and sparse layers",
    "granitemoe": "another scale",
    "llama4_text": "blocks without positions",
}
UNITS = [*(("channels", name) for name in KINDS), *((pattern, name) for name in HEADS for pattern in ("heads", "kv-groups"))]
EVERY_TIME = [("heads", "exaone4"), ("kv-groups", "phi")]
EVERY_TIME += [("channels", n) for n in ("phi", "granitemoe", "llama4_text", "dots1", "gptj", "gemma4_text")]


@pytest.mark.parametrize(("pattern", "name"), often(UNITS, *EVERY_TIME))
def test_units_cut_are_units_that_nothing_reads(pattern: str, name: str, tmp_path: Any) -> None:
    model = model_of(name)
    assert model.config.model_type not in TABLES
    spaces = derived_spaces(model, find_blocks(model), pattern)
    assert all(spaces)
    keeps = half_of_each_field(spaces)
    slice_model(model, keeps).save_pretrained(tmp_path)
    assert float((logits(reloaded(tmp_path)) - logits(without_readers(model, keeps, spaces))).abs().max()) < ROUNDING


TABLED = ["llama", "phi3", "gpt_oss", "qwen3_next", "deepseek_v3", "olmo2", "gpt2", "opt", "mixtral", "starcoder2"]


@pytest.mark.parametrize("name", often(TABLED, "phi3", "gpt_oss", "olmo2"))
def test_what_is_derived_is_what_tables_say(name: str) -> None:
    model = tiny(name)
    path = find_blocks(model)
    for pattern in [p for p in COUNTS if refusal(model.config, p) is None]:
        for index, (block, spaces) in enumerate(zip(blocks_of(model), derived_spaces(model, path, pattern), strict=True)):
            table = spaces_of(model.config, index, block, pattern)
            assert places_of(block, spaces) == places_of(block, table), pattern
            assert {(s.config, s.groups, s.least) for s in spaces} == {(s.config, s.groups, s.least) for s in table}


def places_of(block: Any, spaces: Any) -> set[Any]:
    """(parameter, expert, dimension, the places of every unit), of readers too."""
    matrices = {m.name: m for m in block_matrices(block)}
    found = {(a.parameter, a.expert, a.dim, str(a.index_UK.sort(1).values.tolist())) for s in spaces for a in s.axes}
    for reader in (r for s in spaces for r in s.readers):
        m = matrices[reader.matrix]
        found.add((m.parameter, m.expert, 0 if m.transposed else 1, str(reader.columns_UK.tolist())))
    return found


@pytest.mark.slow
def test_a_checkpoint_with_fewer_channels(tmp_path: Any) -> None:
    model = model_of("dots1")
    model.save_pretrained(tmp_path / "model")
    report = llmprune.prune(tmp_path / "model", 0.5, "channels", calibration=WINDOWS, output=str(tmp_path / "out"))
    assert report.smaller.difference < 1e-4
    config = reloaded(tmp_path / "out").config
    assert (config.intermediate_size, config.moe_intermediate_size) == (model.config.intermediate_size // 2, model.config.moe_intermediate_size // 2)


def test_units_in_the_wrong_places_are_not_proved() -> None:
    """Gate and up of granitemoe's experts lie one after the other; here they are taken for neighbours."""
    model = model_of("granitemoe")
    path = find_blocks(model)
    (count,) = [c for c in COUNTS["channels"](model, path) if c.fields == (("intermediate_size", 1),)]
    units, fewer = count.units, count.units // 2
    spaces = derived_spaces(model, path, "channels")[0]
    wrong = [replace(s, axes=tuple(replace(a, index_UK=torch.arange(2 * units).view(units, 2)) for a in s.axes)) for s in spaces]
    smaller = Proof(model, path, "channels", count).smaller(fewer)
    trial = Trial(model, smaller, path)
    assert trial.differs(0, spaces, fewer, "channels") == ""
    assert "differs by" in trial.differs(0, wrong, fewer, "channels")


def test_what_is_not_proved_is_refused_with_the_step() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["bitnet"](**FOUR))
    with pytest.raises(RequestError, match=r"bitnet cannot be cut by channels: intermediate_size: mlp.ffn_sub_norm.weight is cut too"):
        derived_spaces(model, "model.layers", "channels")
    by_heads = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gptj"](**TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}))
    with pytest.raises(RequestError, match="gptj cannot be cut by heads: no field of its config gives fewer heads of the same size"):
        derived_spaces(by_heads, "transformer.h", "heads")
    with pytest.raises(RequestError, match="no space is named 'mlp'"):
        slice_model(model, [{"mlp": torch.arange(8)}] * 4)


def test_blocks_of_two_kinds_have_conversions_of_their_own(tmp_path) -> None:
    """Three short convolutions of Bailing's linear attention are joined on loading, and its experts in other blocks: each block has its way back."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "layer_group_size": 2}
    latent = {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
    }
    groups = {"head_dim": 8, "n_group": 1, "topk_group": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["bailing_hybrid"](**FOUR | sizes | latent | groups))
    uneven(model)
    model.save_pretrained(tmp_path / "model")
    report = llmprune.prune(
        tmp_path / "model", 0.25, "channels", method="magnitude", round_to=4, calibration=WINDOWS, output=str(tmp_path / "out"), accept_damage=True
    )
    assert report.reloaded.difference < 1e-4
