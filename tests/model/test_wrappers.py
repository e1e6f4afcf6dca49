"""Vision-language wrappers: the text decoder inside is pruned, and the rest of the checkpoint is what it was. Plain transformers is the reference."""

from __future__ import annotations

import json
import math
import re
import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cli.runner import ROOT, Cli
from often import often
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPImageProcessor, LlavaConfig, LlavaProcessor

import llmprune
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.checkpoint.source import open_folder
from llmprune.data.windows import Windows
from llmprune.errors import ConversionError, RequestError
from llmprune.evaluation.perplexity import perplexity
from llmprune.model.wrappers import towers
from llmprune.run.prepare import open_stream

TYPES = (
    *("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "mistral3", "internvl", "aya_vision"),
    *("gemma3", "gemma4", "got_ocr2", "git", "llama4", "qwen3_5"),
    *("fuyu", "glm4v", "idefics2", "lfm2_vl", "ovis2", "video_llava", "qwen3_vl_moe", "aria"),
)
REFUSED = {
    "paligemma": "'paligemma' with use_bidirectional_attention is not a causal language model",
    "blip-2": "Blip2ForConditionalGeneration: its forward takes no text without pixel_values",
    "instructblip": "InstructBlipForConditionalGeneration: its forward takes no text without pixel_values, qformer_input_ids",
    "kosmos-2": "Kosmos2ForConditionalGeneration: takes no text alone",
    "mllama": "MllamaForCausalLM: its blocks do not run once each, in order",
    "t5gemma2": "model_type 't5gemma2' with is_encoder_decoder is an encoder-decoder",
    "udop": "model_type 'udop' with is_encoder_decoder is an encoder-decoder",
    "vision-encoder-decoder": "is an encoder-decoder, not a causal language model",
}
ASK: dict[str, Any] = {"pattern": "2:4", "method": "wanda", "accept_damage": True}
VOCABULARY = 2048  # of the bundled tokenizer


def save_tiny(model_type: str, folder: Path) -> Path:
    runpy.run_path(str(ROOT / "scripts" / "tiny_types.py"))["save_tiny"](model_type, folder, True)
    return folder


def ids(count: int = 3, length: int = 16) -> Tensor:
    return torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(1))


def stored(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dict


def load(folder: Path) -> Any:
    """As any user does, with no tensor missing, left over or of another shape."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval().requires_grad_(False)


def plain_perplexity(model: Any, windows_NL: Iterable[Tensor]) -> float:
    losses = [F.cross_entropy(model(input_ids=w[None], use_cache=False).logits[0, :-1].double(), w[1:]) for w in windows_NL]
    return math.exp(float(torch.stack(losses).mean()))


@pytest.mark.parametrize("kind", often(TYPES, "llava", "qwen2_vl"))
def test_the_result_is_the_source_but_for_the_masks(tmp_path, kind):
    source, out = save_tiny(kind, tmp_path / "model"), tmp_path / "out"
    report = llmprune.prune(source, calibration=ids(), output=str(out), **ASK)
    dense, pruned = stored(source), stored(out)
    assert dense.keys() == pruned.keys()
    changed = {key for key in dense if not torch.equal(dense[key], pruned[key])}
    assert changed
    now = dict(load(out).named_parameters())
    others = {name for name, p in load(source).named_parameters() if not torch.equal(p, now[name])}
    assert others
    assert not [name for name in others if name.startswith(report.source.towers.paths)]
    for key in changed:
        mask = pruned[key] != 0
        assert torch.equal(pruned[key], dense[key] * mask), key
        assert any((m.reshape(-1, 4).sum(-1) == 2).all() for m in (mask, mask.mT) if m.shape[-1] % 4 == 0), key
    assert sum(int((pruned[key] == 0).sum()) for key in changed) == report.zeros
    for folder in (source, out):
        stream = open_stream(open_folder(folder, folder.name), torch.float32, torch.device("cpu"))
        own = perplexity(stream, Windows(ids(), "random", "all")).value
        assert own == pytest.approx(plain_perplexity(text_model(folder), ids()), rel=1e-5)


def text_model(folder: Path) -> Any:
    """Llama 4's wrapper fails on text alone in transformers 5.24: its decoder is taken out of it, as AutoModelForCausalLM does."""
    if json.loads((folder / "config.json").read_text())["model_type"] != "llama4":
        return load(folder)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", often(REFUSED, "blip-2", "mllama"))
def test_what_reads_no_text_alone_is_refused_for_what_it_is(tmp_path, kind):
    source = save_tiny(kind, tmp_path / "model")
    with pytest.raises(RequestError, match=re.escape(REFUSED[kind])):
        llmprune.prune(source, calibration=ids(), output=str(tmp_path / "out"), **ASK)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_towers_are_counted_and_not_loaded(tmp_path):
    source = save_tiny("llava", tmp_path / "model")
    model = load(source)
    parts = {"model.vision_tower": model.model.vision_tower, "model.multi_modal_projector": model.model.multi_modal_projector}
    assert towers(model) == {path: sum(p.numel() for p in part.parameters()) for path, part in parts.items()}
    stream = open_stream(open_folder(source, "llava"), torch.float32, torch.device("cpu"))
    with stream.whole():
        empty = {name for name, p in stream.skeleton.named_parameters() if p.is_meta}
    first, *others = [name for name, _ in model.named_parameters() if name.startswith(tuple(parts))]
    assert empty == set(others), first  # of the first parameter transformers takes the device
    report = llmprune.prune(source, calibration=ids(), output=str(tmp_path / "out"), **ASK)
    assert report.source.towers.share == sum(towers(model).values()) / sum(p.numel() for p in model.parameters())
    assert json.loads((tmp_path / "out" / "llmprune.json").read_text())["source"]["towers"]["paths"] == list(parts)


def test_a_live_wrapper_is_pruned_as_its_checkpoint(tmp_path):
    source = save_tiny("llava", tmp_path / "model")
    live = load(source)
    report = llmprune.prune(live, calibration=ids(), **ASK)
    llmprune.prune(source, calibration=ids(), output=str(tmp_path / "out"), **ASK)
    again = load(tmp_path / "out")
    assert report.sparsity == 0.5
    assert tuple(towers(live)) == report.source.towers.paths
    for (name, ours), (_, theirs) in zip(live.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_whole_model_in_memory_gives_the_same(tmp_path, monkeypatch):
    def no_names(*_: Any) -> None:
        raise ConversionError("tried out")

    source = save_tiny("llava", tmp_path / "model")
    usual = llmprune.prune(source, calibration=ids(), output=str(tmp_path / "usual"), **ASK)
    monkeypatch.setattr("llmprune.checkpoint.loader.parameter_names", no_names)
    whole = llmprune.prune(source, calibration=ids(), output=str(tmp_path / "whole"), **ASK)
    assert usual.environment.block_by_block
    assert not whole.environment.block_by_block
    assert whole.source.towers == usual.source.towers
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (tmp_path / "usual" / "model.safetensors").read_bytes()


@pytest.fixture
def with_processor(tmp_path) -> Path:
    """A tiny LLaVA with the bundled tokenizer and a processor."""
    folder = tmp_path / "model"
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128}
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision | {"model_type": "clip_vision_model"}, text_config=text, image_token_index=5)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "llama")
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
    LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default").save_pretrained(folder)
    return folder


def test_the_command_line(tmp_path, monkeypatch, capsys, with_processor):
    monkeypatch.chdir(tmp_path)
    words = ("--calibration", "bundled-calibration", "--samples", 4, "--sequence-length", 128, "--eval", "bundled-evaluation", "--no-bos")
    ran = Cli(capsys)("prune", "--model", with_processor, "--pattern", "2:4", "--method", "wanda", *words, "--output", "out")
    assert ran.code == 0, ran.err
    share = towers(load(with_processor))
    said = f"model.vision_tower, model.multi_modal_projector ({sum(share.values()) / load(with_processor).num_parameters():.1%} of all weights)"
    assert said in ran.out.splitlines()[0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert said in card
    assert "pipeline_tag: image-text-to-text" in card
    lines = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(lines[1].replace("path/to/this/model", "out"), names)
    assert type(names["model"]) is type(load(with_processor))
    assert isinstance(AutoProcessor.from_pretrained("out"), LlavaProcessor)
    assert type(llmprune.load("out")[0]) is type(names["model"])
    found = json.loads((tmp_path / "out" / "llmprune.json").read_text())["perplexity"][0]["pruned"]
    again = llmprune.evaluate("out", "bundled-evaluation", window=128, samples=found["windows"], bos=False)[0]
    assert again.value == pytest.approx(found["value"], rel=1e-6)
    tokens = names["tokenizer"]((ROOT / "llmprune/data/bundled/evaluation.txt").read_text())["input_ids"]
    windows = torch.tensor(tokens[: again.windows * 128]).reshape(-1, 128)
    assert again.value == pytest.approx(plain_perplexity(load(Path("out")), windows), rel=1e-5)
    inspected = Cli(capsys)("inspect", "out", "--verify", "2:4")
    assert inspected.code == 0, inspected.err


@pytest.mark.parametrize("kind", often(("llava", "gemma3", "qwen2_vl"), "llava"))
def test_fewer_layers_keep_the_towers(tmp_path, kind):
    source, out = save_tiny(kind, tmp_path / "model"), tmp_path / "out"
    report = llmprune.prune(source, 0.25, "layers", calibration=ids(), output=str(out), target="symmetric", accept_damage=True)
    dense, pruned = load(source), load(out)
    path, kept = report.blocks[0].block.rpartition(".")[0], report.smaller.layers
    assert len(kept) == len(pruned.get_submodule(path)) == 3
    for name, parameter in pruned.named_parameters():
        old = re.sub(rf"^{re.escape(path)}\.(\d+)\.", lambda found: f"{path}.{kept[int(found[1])]}.", name)
        assert torch.equal(parameter, dense.get_parameter(old)), name


def test_what_would_cut_a_tower_is_refused(tmp_path):
    source = save_tiny("llava", tmp_path / "llava")
    with pytest.raises(RequestError, match=r"pattern hidden: model\.vision_tower, model\.multi_modal_projector of Llava"):
        llmprune.prune(source, 0.25, "hidden", calibration=ids(), output=str(tmp_path / "out"))
    source = save_tiny("qwen3_5", tmp_path / "qwen3_5")
    with pytest.raises(RequestError, match=r"pattern layers: Qwen3_5ForCausalLM leaves model\.visual behind"):
        llmprune.prune(source, 0.25, "layers", calibration=ids(), output=str(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["llava", "step3p7"])  # a tower of the second has matrices that are stored in parts
def test_channels_are_cut_in_the_text_decoder_alone(tmp_path, kind):
    source, out = save_tiny(kind, tmp_path / "model"), tmp_path / "out"
    llmprune.prune(source, 0.5, "channels", calibration=ids(), output=str(out), accept_damage=True)
    dense, pruned = load(source), load(out)
    assert pruned.config.text_config.intermediate_size < dense.config.text_config.intermediate_size
    assert pruned.config.vision_config.to_dict() == dense.config.vision_config.to_dict()
    for path in towers(dense):
        for ours, theirs in zip(pruned.get_submodule(path).parameters(), dense.get_submodule(path).parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_tower_of_absurd_depth_is_refused_before_it_is_built(tmp_path):
    source = save_tiny("llava", tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3_000_000
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=r"vision_config\.num_hidden_layers is 3000000"):
        llmprune.prune(source, calibration=ids(), output=str(tmp_path / "out"), **ASK)
