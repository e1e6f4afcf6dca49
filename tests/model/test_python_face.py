"""The Python face as users call it: their values and models, in a notebook's cell or an editor; and a live model's result as a folder."""

from __future__ import annotations

import inspect
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_windows
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

import llmprune
from llmprune.checkpoint.manifest import manifest_of
from llmprune.recipe.keywords import PruneOptions
from llmprune.recipe.recipe import Recipe
from llmprune.report.stored import read_run

BUNDLED = Path(llmprune.__file__).parent / "data" / "bundled" / "llama"
IDS = tiny_windows(4, 24)
KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64}


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, **SIZES)).eval()


def quantised() -> PreTrainedModel:
    model = tiny()
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return model


def adapted() -> nn.Module:
    return get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def with_loaded_adapter() -> PreTrainedModel:
    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), tiny())


def bert() -> PreTrainedModel:
    return BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (adapted, "PeftModel.*merge_and_unload"),
        (with_loaded_adapter, "LlamaForCausalLM: has adapters of peft.*merge"),
        (bert, "masked language model"),
        (lambda: tiny().model, "LlamaModel: has no language model head"),
        (lambda: LlamaForSequenceClassification(tiny().config), "has no language model head"),
        (lambda: nn.Linear(3, 3), "Linear: is not a transformers model"),
        (lambda: torch.compile(tiny()), "OptimizedModule: is not a transformers model.*the model inside"),
        (lambda: nn.DataParallel(tiny()), "DataParallel: is not a transformers model.*the model inside"),
        (quantised, "weights are quantised"),
        (lambda: tiny().to("meta"), "on the meta device"),
        (lambda: None, "model: NoneType"),
        (lambda: 3, "model: int"),
        (lambda: tiny().config, "model: LlamaConfig"),
        (lambda: [str(BUNDLED)], "model: list"),
    ],
)
def test_what_is_no_causal_language_model(made: Callable[[], Any], said: str) -> None:
    """One line for each, of every function that takes a model."""
    for call in (
        lambda model: llmprune.prune(model, 0.5, calibration=IDS),
        lambda model: llmprune.evaluate(model, "bundled-evaluation", **({"tokenizer": object()} if isinstance(model, nn.Module) else {})),
    ):
        with pytest.raises(llmprune.RequestError) as refused:
            call(made())
        assert re.search(said, str(refused.value).replace("\n", " "))
        assert len(str(refused.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"calibration": IDS[0]}, "of shape .24."),
        ({"calibration": IDS.float()}, "float32"),
        ({"calibration": IDS[:, :0]}, "of shape .4, 0."),
        ({"sampels": 3}, "did you mean 'samples'"),
        ({"sparsity": 1}, "outside 0 <= sparsity < 1"),
        ({"sparsity": "half"}, "is not a number"),
        ({"pattern": (2, 4)}, "pattern"),
        ({"skip": ["q_proj", 3]}, "skip"),
        ({"dtype": torch.float32}, "dtype with a model in memory"),
        ({"device": torch.device("cpu")}, "device with a model in memory"),
        ({"revision": "main"}, "revision with a model in memory"),
        ({"restart": True}, "restart"),
        ({"tokenizer": object()}, "a tokenizer with token ids"),
        ({"eval": "bundled-evaluation"}, "without its tokenizer"),
        ({"eval": 3}, "eval: int"),
        ({"eval_samples": 3}, "without data to evaluate on"),
        ({"push": "me/x"}, "push with a model in memory"),
    ],
)
def test_values_that_a_live_model_cannot_obey(given: dict[str, Any], said: str) -> None:
    with pytest.raises(llmprune.RequestError, match=said):
        llmprune.prune(tiny(), **{"sparsity": 0.5, "calibration": IDS} | given)


@pytest.mark.parametrize(
    "given",
    [
        {"sparsity": np.float32(0.5)},
        {"sparsity": torch.tensor(0.5)},
        {"sparsity": "50%"},
        {"seed": np.int64(3), "samples": np.int32(4)},
        {"skip": ["q_proj", "k_proj"]},
        {"skip": ("q_proj",), "only": ["proj"]},
    ],
)
def test_values_as_users_have_them(given: dict[str, Any]) -> None:
    report = llmprune.prune(tiny(), **{"sparsity": 0.5, "calibration": IDS, "method": "magnitude"} | given)
    skipped = given.get("skip", ())
    assert report.sparsity == 0.5
    assert {row.matrix.split(".")[-2] for row in report.rows} == KINDS - {*skipped}


def test_dtypes_and_devices_of_torch(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "model")
    about = {"calibration": IDS, "method": "wanda", "overwrite": True}
    said = llmprune.prune(tmp_path / "model", 0.5, output=tmp_path / "a", dtype="float32", device="cpu", **about)
    given = llmprune.prune(tmp_path / "model", 0.5, output=tmp_path / "b", dtype=torch.float32, device=torch.device("cpu"), **about)
    assert said == given
    assert said.recipe == given.recipe


def test_the_options_stand_in_the_signature() -> None:
    """Those of a recipe, by the same names, with their defaults; editors read them off a TypedDict, and help() explains each."""
    own = {"model", "sparsity", "pattern", "calibration"}
    assert {*PruneOptions.__annotations__} == {*Recipe.model_fields} - own
    signature = inspect.signature(llmprune.prune)
    assert {*Recipe.model_fields} <= {*signature.parameters}
    assert signature.parameters["seed"].default == 0
    assert all(f"    {name}: " in (llmprune.prune.__doc__ or "") for name in PruneOptions.__annotations__)
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())


def test_what_can_be_imported() -> None:
    assert {"RequestError", "StoppedError", "PromiseError", "Report", "prune", "save"} <= {*dir(llmprune)}
    assert issubclass(llmprune.RequestError, llmprune.LlmpruneError)
    assert str(llmprune.RequestError("a", "b")) == "a\nhint: b"
    assert str(llmprune.StoppedError("a")) == "a"


@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "channels", "structured", "layers"])
def test_a_live_result_as_a_folder(pattern: str, tmp_path: Path) -> None:
    """By ``output=`` and by ``Report.save``: what plain transformers loads is the model in memory, with record, card and page."""
    model = tiny()
    report = llmprune.prune(
        model, 0.5, pattern, calibration=IDS, accept_damage=True, output=tmp_path / "out", **({"round_to": 4} if pattern == "structured" else {})
    )
    assert report.output == tmp_path / "out"
    assert report.reloaded is not None
    assert {"config.json", "llmprune.json", "README.md", "report.html", "model.safetensors"} <= {path.name for path in report.output.iterdir()}
    pruned = model if report.model is None else report.model
    loaded = AutoModelForCausalLM.from_pretrained(report.output, trust_remote_code=True)
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, pruned(IDS).logits, atol=1e-5)
    assert read_run(report.output) == report
    assert json.loads((report.output / "llmprune.json").read_bytes())["files"] == manifest_of(report.output).files


def test_saved_later_and_only_once(tmp_path: Path) -> None:
    model = tiny()
    report = llmprune.prune(model, 0.5, "2:4", calibration=IDS)
    assert report.output is None
    saved = report.save(tmp_path / "out")
    assert saved.zeros == report.zeros
    with pytest.raises(llmprune.RequestError, match="exists already"):
        report.save(tmp_path / "out")
    with pytest.raises(llmprune.RequestError, match="of no model in memory"):
        saved.save(tmp_path / "again")
    with pytest.raises(llmprune.RequestError, match="exists already"):  # before any work
        llmprune.prune(model, 0.75, calibration=IDS, output=tmp_path / "out")
    assert report.save(tmp_path / "out", overwrite=True) == saved


def test_a_live_model_is_measured_as_it_is(tmp_path: Path) -> None:
    """As its checkpoint is; a model that is trained stays so."""
    found, tokenizer = llmprune.load(BUNDLED)
    about = {"window": 64, "samples": 4}
    (live,) = llmprune.evaluate(found.float().train(), "bundled-evaluation", tokenizer=tokenizer, **about)
    (stored,) = llmprune.evaluate(BUNDLED, "bundled-evaluation", dtype=torch.float32, **about)
    assert live.value == pytest.approx(stored.value, rel=1e-6)
    assert found.training
    with pytest.raises(llmprune.RequestError, match="without its tokenizer"):
        llmprune.evaluate(found, "bundled-evaluation")
    with pytest.raises(llmprune.RequestError, match="which has its own"):
        llmprune.evaluate(BUNDLED, "bundled-evaluation", tokenizer=tokenizer)
    with pytest.raises(llmprune.RequestError, match="with a model in memory"):
        llmprune.evaluate(found, "bundled-evaluation", tokenizer=tokenizer, dtype=torch.float32)


def test_a_live_model_is_measured_before_and_after(tmp_path: Path) -> None:
    """On what was given to evaluate on, as transformers' own forward measures it; perplexities and divergence are in the folder too."""
    model, unseen = tiny(), tiny_windows(9, 24)[4:]
    before = plain_perplexity(model, unseen)
    report = llmprune.prune(model, 0.5, "2:4", calibration=IDS, eval=unseen, eval_samples="all", output=tmp_path / "out")
    (found,) = report.perplexity
    assert found.dense.value == pytest.approx(before, rel=1e-5)
    assert found.pruned.value == pytest.approx(plain_perplexity(model, unseen), rel=1e-5)
    assert found.divergence.kl > 0
    assert found.pruned.windows == 5
    assert read_run(tmp_path / "out").perplexity == report.perplexity
    assert f"{found.pruned.value:.4g}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("pattern", ["channels", "layers"])
def test_a_smaller_live_model_is_measured(pattern: str) -> None:
    report = llmprune.prune(tiny(), 0.5, pattern, calibration=IDS, eval=[IDS, IDS - 1], round_to=4 if pattern == "channels" else None)
    for found, ids_NL in zip(report.perplexity, (IDS, IDS - 1), strict=True):
        assert found.pruned.value == pytest.approx(plain_perplexity(report.model, ids_NL), rel=1e-4)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_live_model_on_text_gives_what_its_checkpoint_gives(pattern: str, tmp_path: Path) -> None:
    """The same windows are calibrated on, and held back to be measured."""
    model, tokenizer = llmprune.load(BUNDLED)
    about = {"calibration": "bundled-calibration", "samples": 6, "sequence_length": 64, "method": "wanda"}
    live = llmprune.prune(model.float(), 0.5, pattern, tokenizer=tokenizer, **about)
    stored = llmprune.prune(BUNDLED, 0.5, pattern, dtype="float32", output=tmp_path / "out", eval=[], **about)
    assert live.calibration == stored.calibration
    assert [row.zeros for row in live.rows] == [row.zeros for row in stored.rows]
    (found,) = live.perplexity
    assert found.pruned.split.endswith("held back")


@torch.no_grad()
def plain_perplexity(model: PreTrainedModel, ids_NL: torch.Tensor) -> float:
    return float(model(ids_NL, labels=ids_NL).loss.exp())


def test_bars_where_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("llmprune.report.bars.is_progress_bar_enabled", lambda: True)  # other tests may have switched them off
    llmprune.prune(tiny(), 0.5, calibration=IDS, method="wanda")
    assert "prune: 100%" in terminal.getvalue()
    heard: list[tuple[str, int, int]] = []
    llmprune.prune(tiny(), 0.5, calibration=IDS, method="wanda", on_progress=lambda *said: heard.append(said))
    assert heard[-1] == ("prune", 2, 2)
    assert terminal.getvalue().count("prune: 100%") == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True
