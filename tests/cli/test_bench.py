"""``llmprune bench``: figures that agree with independent counts, and refusals before any load. No ratio of times is asserted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli.test_refusals import refused
from families import FAMILIES, save_tiny, tiny_model
from forked import running
from safetensors.torch import load_file

import llmprune
from llmprune.benchmark import run, worker

FRESH = run._process
CONFIG = FAMILIES["llama"][1]
SHORT = ("--prompt-length", 12, "--new-tokens", 5, "--repeat", 3, "--threads", 1, "--device", "cpu")


@pytest.fixture(scope="module", autouse=True)
def _forks() -> Iterator[None]:
    """The models' processes are forks of this one, but in the test that asks for fresh ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmprune.benchmark.run._process", lambda: running(worker.main))
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny model, and one of half its feed-forward width that stands for what was pruned."""
    place = tmp_path_factory.mktemp("bench")
    dense = save_tiny("llama", place / "dense", torch.float32)
    pruned = save_tiny("llama_one_block", place / "pruned", torch.float32)
    return dense, pruned


@pytest.fixture(scope="module")
def found(pair) -> dict:
    """The JSON of one run of both."""
    dense, pruned = pair
    options = {"prompt_length": 12, "new_tokens": 5, "repeat": 3, "threads": 1, "device": "cpu", "batch": 2}
    return json.loads(json.dumps(llmprune.bench(pruned, dense, **options).to_json()))


def test_setting_is_told(found):
    told = found["setting"]
    assert (told["prompt_length"], told["new_tokens"], told["batch"], told["repeat"]) == (12, 5, 2, 3)
    assert (told["device"], told["threads"], told["torch"]) == ("cpu", 1, torch.__version__)


def test_rates_and_times_agree(found):
    for model in found["models"]:
        for key in ("prefill", "decode", "first_token"):
            assert 0 < model[key]["lowest"] <= model[key]["median"] <= model[key]["highest"]
        assert model["first_token"]["median"] >= 2 * 12 / model["prefill"]["highest"]


def test_cache_is_what_the_shape_says(found):
    head_dim = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    for model, layers in zip(found["models"], (3, 1), strict=True):
        assert model["kv_cache"] == 2 * layers * CONFIG["num_key_value_heads"] * head_dim * 12 * 4 * 2


def test_sizes_are_counted_from_the_files(found, pair):
    for model, folder in zip(found["models"], pair, strict=True):
        tensors = load_file(folder / "model.safetensors")
        assert model["parameters"] == sum(t.numel() for t in tensors.values())
        assert model["disk"] == (folder / "model.safetensors").stat().st_size


def test_peak_memory_is_told(found):
    for model in found["models"]:
        assert model["peak_memory"] is None or model["peak_memory"] > 0


def test_ratios_are_pruned_over_dense(found):
    (dense, pruned), (ratio,) = found["models"], found["ratios"]
    assert [m["role"] for m in found["models"]] == ["dense", "pruned"]
    for key in ("kv_cache", "parameters", "disk"):
        assert ratio[key] == pruned[key] / dense[key]
    for key in ("prefill", "decode", "first_token"):
        assert ratio[key]["lowest"] <= ratio[key]["median"] <= ratio[key]["highest"]
        assert pruned[key]["lowest"] / dense[key]["highest"] <= ratio[key]["median"] <= pruned[key]["highest"] / dense[key]["lowest"]


def test_tied_weights_count_once(tmp_path, monkeypatch):
    """In a fresh process, as everywhere but in these tests."""
    monkeypatch.setattr("llmprune.benchmark.run._process", FRESH)
    folder = save_tiny("llama_tied", tmp_path / "tied", torch.float32)
    (model,) = llmprune.bench(folder, prompt_length=4, new_tokens=2, repeat=1, threads=1, device="cpu").models
    assert model.parameters == tiny_model("llama_tied").num_parameters()
    assert model.role == "model"


def test_table_of_the_bundled_model(cli):
    ran = cli("bench", "llama", "--against", "llama", *SHORT)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("llama: the small bundled Llama")
    for words in ("prefill, tokens/s", "decode, tokens/s", "peak memory", "parameters", "on disk", "2:4 kernels need CUDA (Ampere or newer)"):
        assert words in " ".join(ran.out.split())
    assert "prompt 12, 5 new tokens, batch 1" in ran.out


def test_json_and_half_precision_computed_in_float32(cli, tmp_path):
    folder = save_tiny("llama", tmp_path / "half", torch.float16)
    ran = cli("bench", folder, *SHORT, "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told.keys() == {"format", "setting", "models", "ratios", "kernels", "notes"}
    assert told["ratios"] == told["kernels"] == []
    (model,) = told["models"]
    assert (model["role"], model["dtype"]) == ("model", "float32")
    assert any("float16, computed in float32" in note for note in told["notes"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--prompt-length", 60, "--new-tokens", 5), "a prompt of 60 and 5 new tokens: pruned has 64 positions"),
        (("--new-tokens", 64), "64 new tokens after a prompt: pruned has 64 positions"),
        (("--prompt-length", 0, "--new-tokens", 5), "prompt length 0"),
        (("--new-tokens", 0), "new tokens 0"),
        (("--batch", 0), "batch 0"),
        (("--repeat", 0), "repeat 0"),
        (("--threads", 0), "threads 0"),
        (("--repeat", "x"), "--repeat"),
        (("--device", "cuda:99"), "device 'cuda:99'"),
        (("--device", "meta"), "device 'meta': holds no values"),
        (("--dtype", "int8"), "dtype 'int8' is unknown"),
        (("--dtype", "float16", "--device", "cpu"), "dtype float16 on CPU"),
        (("--against", "./absent"), "no such folder"),
    ],
)
def test_refused_before_any_load(cli, pair, monkeypatch, words, says):
    monkeypatch.setattr("llmprune.benchmark.run._process", None)  # no process is started
    refused(cli, "bench", pair[1], *words, says=says, hint="hint: ")


def edited(folder: Path, place: Path, **changes: object) -> Path:
    """A copy of a checkpoint with another config."""
    place.mkdir()
    (place / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (place / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    return place


def test_own_code_is_not_run_unasked(cli, pair, tmp_path, monkeypatch):
    own = {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}
    folder = edited(pair[0], tmp_path / "own", **own, per_layer_config={"0": {"intermediate_size": 48}})
    monkeypatch.setattr("llmprune.benchmark.run._process", None)
    refused(cli, "bench", folder, says="comes with its own model code", hint="--trust-remote-code")


OWN_CODE = '''
from transformers import LlamaForCausalLM

class Own(LlamaForCausalLM):
    """Counts as another model: its blocks are one fewer than the config says."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers = self.model.layers[:2]
'''


def test_own_code_runs_when_it_is_trusted(cli, pair, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    folder = edited(pair[0], tmp_path / "trusted", **own, per_layer_config={"0": {"intermediate_size": 48}})
    (folder / "modeling_own.py").write_text(OWN_CODE)
    ran = cli("bench", folder, *SHORT, "--trust-remote-code", "--json")
    assert ran.code == 0, ran.err
    (model,) = json.loads(ran.out)["models"]
    layer = sum(t.numel() for n, t in load_file(folder / "model.safetensors").items() if ".layers.2." in n)
    assert model["parameters"] == tiny_model("llama").num_parameters() - layer


def test_what_transformers_cannot_load_is_refused_in_a_line(cli, pair, tmp_path):
    folder = edited(pair[0], tmp_path / "wider", intermediate_size=80)
    refused(cli, "bench", folder, *SHORT, says="transformers cannot load it")


def test_lacking_weights_are_not_drawn_at_random(cli, pair, tmp_path):
    folder = edited(pair[0], tmp_path / "deeper", num_hidden_layers=4)
    refused(cli, "bench", folder, *SHORT, says="the checkpoint lacks")


def test_a_model_without_a_cache_is_refused(cli, tmp_path):
    folder = save_tiny("openai_gpt", tmp_path / "old", torch.float32)
    refused(cli, "bench", folder, *SHORT, says="takes no key-value cache")
