"""Which file, tensor and class count is what transformers decides; what is not a causal language model is named for what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TOKENS, save_tiny, tiny_model, tiny_windows
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

import llmprune
from llmprune.checkpoint.source import INDEX, open_folder
from llmprune.errors import RequestError
from llmprune.model.kinds import longest_sequence
from llmprune.model.matrices import Selection
from llmprune.recipe.reading import read_recipe
from llmprune.report.inspection import inspect
from llmprune.run.prepare import prepare

ASK: dict[str, Any] = {"method": "wanda", "calibration": tiny_windows(), "device": "cpu", "accept_damage": True}
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def asked(pattern: str, live: bool = False) -> dict[str, Any]:
    left_out = ("method",) * (pattern == "layers") + ("device",) * live
    return {name: value for name, value in ASK.items() if name not in left_out}


def prune(folder: Path, sparsity: float | None = 0.5, pattern: str = "unstructured", **options: Any) -> Path:
    out = folder.parent / f"{folder.name}-{pattern}"
    llmprune.prune(folder, sparsity, pattern, output=str(out), **asked(pattern) | options)
    return out


def change(folder: Path, **values: Any) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    return dict(model.state_dict())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model", torch.float32)


# --- files ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("complete", [True, False], ids=["older shards", "shards are gone"])
def test_a_whole_file_goes_before_an_index(model: Path, tmp_path: Path, complete: bool) -> None:
    older = save_tiny("llama", tmp_path / "older", torch.float32, max_shard_size="20KB")
    index = json.loads((older / INDEX).read_text())
    for file in {INDEX, *(index["weight_map"].values() if complete else ())}:
        shutil.copy(older / file, model / file)
    rewrite(model, lambda tensors: {name: value * 2 for name, value in tensors.items()})
    wanted = loaded(model)
    out = prune(model)
    assert torch.equal(loaded(out)[EMBEDDINGS], wanted[EMBEDDINGS])
    assert not (out / INDEX).exists()


def test_an_index_without_metadata_is_completed(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", torch.float32, max_shard_size="20KB")
    index = json.loads((model / INDEX).read_text())
    (model / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))
    out = prune(model)
    assert json.loads((out / INDEX).read_text())["weight_map"] == index["weight_map"]
    loaded(out)


def test_another_file_that_the_config_names_is_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "mine.safetensors")
    change(model, transformers_weights="mine.safetensors")
    with pytest.raises(RequestError, match=r"transformers_weights names 'mine.safetensors'"):
        prune(model)


# --- ties -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.5), ("channels", 0.25), ("layers", 0.34)])
def test_a_head_of_its_own_is_kept_under_tied_embeddings(model: Path, pattern: str, sparsity: float) -> None:
    change(model, tie_word_embeddings=True)
    wanted = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert not torch.equal(wanted[HEAD], wanted[EMBEDDINGS])  # what transformers decides
    found = AutoModelForCausalLM.from_pretrained(prune(model, sparsity, pattern)).state_dict()
    assert torch.equal(found[HEAD], wanted[HEAD])
    assert torch.equal(found[EMBEDDINGS], wanted[EMBEDDINGS])


@pytest.mark.parametrize(("pattern", "sparsity"), [("channels", 0.25), ("layers", 0.34)])
def test_a_live_models_own_head_is_kept(model: Path, pattern: str, sparsity: float) -> None:
    change(model, tie_word_embeddings=True)
    live = AutoModelForCausalLM.from_pretrained(model)
    wanted = live.lm_head.weight.clone()
    smaller = llmprune.prune(live, sparsity, pattern, **asked(pattern, live=True)).model
    assert torch.equal(smaller.lm_head.weight, wanted)
    assert not torch.equal(smaller.get_input_embeddings().weight, wanted)


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.5), ("channels", 0.25)])
@pytest.mark.parametrize("stored", ["head alone", "both, equal"])
def test_a_tied_pair_is_stored_under_either_name(tmp_path: Path, stored: str, pattern: str, sparsity: float) -> None:
    model = save_tiny("llama_tied", tmp_path / "model", torch.float32)
    plain = prune(model, sparsity, pattern)

    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        table = tensors.pop(EMBEDDINGS)
        return tensors | ({HEAD: table} if stored == "head alone" else {HEAD: table, EMBEDDINGS: table.clone()})

    shutil.copytree(model, tmp_path / "other")
    rewrite(tmp_path / "other", edit)
    found, wanted = loaded(prune(tmp_path / "other", sparsity, pattern)), loaded(plain)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_neither_of_a_tied_pair_is_missing_by_name(tmp_path: Path) -> None:
    model = save_tiny("llama_tied", tmp_path / "model", torch.float32)
    rewrite(model, lambda tensors: {name: value for name, value in tensors.items() if name != EMBEDDINGS})
    with pytest.raises(RequestError, match=f"1 tensors missing: {EMBEDDINGS}"):
        prune(model)


# --- values -----------------------------------------------------------------------------------------------------------------------------------


def with_bound(value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: tensors | {"vision_tower.bound": torch.tensor([value])}


def test_an_infinite_bound_outside_the_model_is_no_damage(model: Path) -> None:
    rewrite(model, with_bound(float("-inf")))
    out = prune(model)
    assert load_file(out / "model.safetensors")["vision_tower.bound"].isneginf().all()


def test_an_infinite_buffer_is_no_damage_and_an_infinite_weight_is(tmp_path: Path) -> None:
    model = save_tiny("deepseek_v3", tmp_path / "model", torch.float32)
    name = next(name for name in load_file(model / "model.safetensors") if name.endswith("e_score_correction_bias"))
    rewrite(model, lambda tensors: tensors | {name: tensors[name].index_fill(0, torch.tensor([0]), float("inf"))})
    assert prepare(read_recipe(None, {"model": str(model), "sparsity": 0.5, "pattern": "unstructured"}), tiny_windows()).source.hashes
    rewrite(model, lambda tensors: tensors | {HEAD: tensors[HEAD] / 0})
    with pytest.raises(RequestError, match=f"NaN or infinite weights in {HEAD}"):
        prune(model)


def test_nan_is_damage_anywhere(model: Path) -> None:
    rewrite(model, with_bound(float("nan")))
    with pytest.raises(RequestError, match=r"vision_tower.bound \(1\)"):
        prune(model)


@pytest.mark.parametrize(("pattern", "sparsity"), [("channels", 0.25), ("layers", 0.34)])
def test_a_cut_names_the_tensors_that_it_leaves_out(model: Path, pattern: str, sparsity: float) -> None:
    rewrite(model, lambda tensors: tensors | {"score.weight": torch.ones(2, 32), "v_head.summary.bias": torch.ones(1)})
    out = prune(model, sparsity, pattern)
    (note,) = json.loads((out / "llmprune.json").read_text())["smaller"]["notes"]
    assert note.endswith(": score.weight, v_head.summary.bias")
    assert "score.weight" not in load_file(out / "model.safetensors")
    assert "score.weight" in load_file(prune(model) / "model.safetensors")


# --- code -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "layers"])
def test_a_result_of_uneven_layers_is_pruned_again(model: Path, pattern: str) -> None:
    cut = prune(model, 0.3, "channels", allocation="sensitivity")
    assert (cut / "modeling_pruned.py").exists()
    again = prune(cut, 0.34 if pattern == "layers" else 0.5, pattern)
    AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)


def test_a_result_of_uneven_heads_is_cut_again(tmp_path: Path) -> None:
    """The units of its blocks are counted by the config of each."""
    model = save_tiny("qwen2", tmp_path / "model", torch.float32)
    uneven = prune(model, 0.25, "kv-groups", allocation="sensitivity")
    thin = prune(uneven, 0.5, "channels", round_to=1)
    own = json.loads((thin / "config.json").read_text())["per_layer_config"]
    assert list(own.values()) == [{"num_attention_heads": 2, "num_key_value_heads": 1}]
    AutoModelForCausalLM.from_pretrained(thin, trust_remote_code=True)
    prune(uneven, 0.5, "layers")


def test_uneven_layers_are_not_cut_again_without_a_table(tmp_path: Path) -> None:
    uneven = prune(save_tiny("stablelm", tmp_path / "model", torch.float32), 0.3, "channels", allocation="sensitivity", round_to=1)
    with pytest.raises(RequestError, match="stablelm cannot be cut by channels: an earlier cut has left its layers in different sizes"):
        prune(uneven, 0.5, "channels")


def test_uneven_layers_without_a_table_can_be_dropped(tmp_path: Path) -> None:
    """Those that are kept have the sizes that they had."""
    torch.manual_seed(0)
    config = tiny_model("stablelm").config
    config.num_hidden_layers = 3
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    uneven = prune(tmp_path / "model", 0.3, "channels", allocation="sensitivity", round_to=1)
    widths = [t.shape[0] for name, t in sorted(load_file(uneven / "model.safetensors").items()) if "gate_proj" in name]
    assert len({*widths}) > 1
    fewer = prune(uneven, 0.34, "layers")
    model = AutoModelForCausalLM.from_pretrained(fewer, trust_remote_code=True)
    kept = [block.mlp.gate_proj.out_features for block in model.model.layers]
    assert len({*kept}) == 2
    assert kept in ([widths[i] for i in left] for left in ((0, 1), (0, 2), (1, 2)))


def test_code_is_copied_with_what_it_imports_and_not_run(model: Path) -> None:
    (model / "modeling_own.py").write_text("from .helper_own import x\nraise SystemExit('this was run')\n")
    (model / "helper_own.py").write_text("x = 1\n")
    (model / "unnamed.py").write_text("x = 2\n")
    change(model, auto_map={"AutoModelForCausalLM": "modeling_own.Own", "AutoModel": "org/repo--modeling_far.Far"})
    out = prune(model)
    assert {path.name for path in out.glob("*.py")} == {"modeling_own.py", "helper_own.py"}
    assert (out / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_code_that_is_nowhere_is_not_named(model: Path) -> None:
    change(model, auto_map={"AutoModelForCausalLM": "modeling_gone.Gone"})
    out = prune(model)
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)


# --- other kinds ------------------------------------------------------------------------------------------------------------------------------

CODER = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART = BartConfig(**TOKENS, **CODER, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64)
BERT: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def test_an_encoder_decoder_is_named_and_its_decoder_alone_is_pruned(tmp_path: Path) -> None:
    BartForConditionalGeneration(BART).save_pretrained(tmp_path / "whole")
    with pytest.raises(RequestError, match="encoder-decoder"):
        prune(tmp_path / "whole")
    BartForCausalLM(BART).save_pretrained(tmp_path / "decoder")
    loaded(prune(tmp_path / "decoder"))


def test_a_masked_model_is_named_and_a_causal_one_of_its_kind_is_pruned(tmp_path: Path) -> None:
    masked = BertLMHeadModel(BertConfig(**BERT))
    masked.save_pretrained(tmp_path / "masked")
    for refused in (lambda: prune(tmp_path / "masked"), lambda: llmprune.prune(masked, 0.5, **asked("unstructured", live=True))):
        with pytest.raises(RequestError, match="masked language model"):
            refused()
    with pytest.raises(RequestError, match="masked language model"):
        llmprune.evaluate(tmp_path / "masked", "bundled-evaluation")
    BertLMHeadModel(BertConfig(**BERT, is_decoder=True)).save_pretrained(tmp_path / "causal")
    prune(tmp_path / "causal")


@pytest.mark.parametrize(("attention", "reason"), [("bi", "is not a causal language model"), ("uni", "see more or fewer hidden states than tokens")])
def test_xlnet_is_refused_for_what_it_is(tmp_path: Path, attention: str, reason: str) -> None:
    config = XLNetConfig(**TOKENS, d_model=32, n_layer=2, n_head=4, d_inner=64, attn_type=attention)
    assert config.max_position_embeddings == -1, "transformers writes no limit of length so"
    assert longest_sequence(config) is None
    XLNetLMHeadModel(config).save_pretrained(tmp_path / "model")
    with pytest.raises(RequestError, match=reason):
        prune(tmp_path / "model")


@pytest.mark.parametrize("beside", [True, False], ids=["beside weights", "alone"])
def test_an_adapter_is_named(model: Path, tmp_path: Path, beside: bool) -> None:
    folder = model if beside else tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "me/base"}))
    with pytest.raises(RequestError, match=r"adapter \(LORA\)") as refused:
        prune(folder)
    assert "merge" in refused.value.hint
    assert "me/base" in refused.value.hint


@pytest.mark.parametrize("config", [True, False])
def test_gguf_is_named(model: Path, config: bool) -> None:
    (model / "model.safetensors").rename(model / "model.gguf")
    if not config:
        (model / "config.json").unlink()
    with pytest.raises(RequestError, match=r"only GGUF \(model.gguf\)"):
        prune(model)
    with pytest.raises(RequestError, match="a GGUF file"):
        llmprune.prune(str(model / "model.gguf"), 0.5)


def test_a_single_file_is_no_folder(model: Path) -> None:
    with pytest.raises(RequestError, match="a file, not a checkpoint's folder"):
        llmprune.prune(str(model / "model.safetensors"), 0.5)


def test_the_meta_device_holds_no_values(model: Path) -> None:
    with pytest.raises(RequestError, match="'meta': holds no values"):
        prune(model, device="meta")


# --- names ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "channels"])
def test_a_skip_that_matches_nothing_is_refused(model: Path, pattern: str) -> None:
    with pytest.raises(RequestError, match=r"skip 'layers.7': matches no parameter"):
        prune(model, pattern=pattern, skip="layers.7")
    with pytest.raises(RequestError, match=r"skip 'layers.7'"):
        llmprune.prune(tiny_model("llama"), 0.5, pattern, skip="layers.7", **asked(pattern, live=True))


def test_a_skip_of_what_is_left_alone_anyway_is_taken(model: Path) -> None:
    out = prune(model, skip="lm_head")
    shutil.move(out, model.parent / "skipped")
    assert (model.parent / "skipped" / "model.safetensors").read_bytes() == (prune(model) / "model.safetensors").read_bytes()


def test_inspection_refuses_such_a_skip_too(model: Path) -> None:
    with pytest.raises(RequestError, match="matches no parameter"):
        inspect(open_folder(model, "model"), Selection(skip="layers.7"))


# --- what stays dense -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [False, True], ids=["folder", "live"])
def test_much_that_is_not_recognised_as_matrices_does_not_stay_dense_without_a_word(tmp_path: Path, monkeypatch, live: bool) -> None:
    """DBRX's experts lie flat in parameters of two dimensions; here as if nothing were known of that."""
    monkeypatch.setattr("llmprune.model.matrices._flat_stacks", lambda module: 0)
    given = tiny_model("dbrx") if live else save_tiny("dbrx", tmp_path / "model", torch.float32)
    asked_for = asked("2:4", live) | ({} if live else {"output": str(tmp_path / "out")})
    with pytest.raises(RequestError, match=r"6 parameters with \d\d% of the blocks' weights .* would stay dense: \S+\.mlp\.w1, ") as refused:
        llmprune.prune(given, pattern="2:4", **asked_for)
    assert "--skip" in refused.value.hint
    llmprune.prune(given, pattern="2:4", skip=r"\.mlp\.", **asked_for)


def test_the_little_that_is_not_among_the_matrices_is_named(tmp_path: Path) -> None:
    asked_for = {"model": str(save_tiny("mamba", tmp_path / "model")), "output": str(tmp_path / "out"), "sparsity": 0.5}
    job = prepare(read_recipe(None, asked_for), tiny_windows())
    assert "of theirs, mixer.A_log not among them; " in str(job)


@pytest.mark.parametrize(
    ("pattern", "sparsity", "options"),
    [("channels", 0.25, {"quality": "fast"}), ("hidden", 0.5, {}), ("unstructured", 0.3, {"quality": "balanced"})],
    ids=["channels", "hidden", "unstructured"],
)
def test_zeros_of_a_sparse_source_that_a_repair_fills_are_counted(model: Path, tmp_path: Path, pattern: str, sparsity: float, options: Any) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: w * (torch.arange(w.shape[-1]) % 4 < 2) if "_proj" in name else w for name, w in tensors.items()}

    def notes(**options: Any) -> list[str]:
        out = str(tmp_path / "out")
        report = llmprune.prune(model, sparsity, pattern, output=out, overwrite=True, **asked("layers") | options)
        return [note for note in report.notes if "zeros were filled by the repair" in note]

    assert not notes(**options)
    rewrite(model, halve)
    assert notes(**options)
    assert not notes(target="symmetric", **({} if pattern == "hidden" else {"criterion": "wanda", "solver": "mask_only"}))
