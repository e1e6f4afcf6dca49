"""The head, where --only names it: pruned like any matrix, on what the last block hands it; refused where it is not its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, TYPICAL, save_tiny, tiny_model, tiny_windows
from often import often
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llmprune
from llmprune.errors import RequestError

WINDOWS_NL = tiny_windows()
UNTIED = [family for family, (kind, values) in FAMILIES.items() if not CONFIG_MAPPING[kind](**values).tie_word_embeddings]
ONLY_HEAD = {"sparsity": 0.5, "calibration": WINDOWS_NL, "only": r"^lm_head"}


def head_inputs(model: nn.Module) -> Tensor:
    """[T, C]: what plain transformers gives the head."""
    seen: list[Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(WINDOWS_NL, use_cache=False)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("family", often(UNTIED, *(family for family in UNTIED if family in TYPICAL)))
def test_the_head_alone_is_pruned_on_its_own_inputs(family: str, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "source", torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager").eval()
    report = llmprune.prune(source, **ONLY_HEAD, method="wanda", output=str(tmp_path / "out"), device="cpu")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()

    score_RC = dense.lm_head.weight.abs() * head_inputs(dense).square().sum(0).sqrt()
    smallest_RC = score_RC.argsort(dim=1, stable=True)[:, : score_RC.shape[1] // 2]
    expected_RC = dense.lm_head.weight.detach().scatter(1, smallest_RC, 0.0)
    assert torch.equal(pruned.lm_head.weight, expected_RC)
    for (name, before), after in zip(dense.named_parameters(), pruned.parameters(), strict=True):
        assert name == "lm_head.weight" or torch.equal(before, after), name
    assert [row.matrix for row in report.rows] == ["lm_head.weight"]
    assert report.sparsity == 0.5
    with torch.no_grad():
        ours, theirs = (m(WINDOWS_NL, use_cache=False).logits.double() for m in (pruned, dense))
    assert report.blocks[-1].output_error == pytest.approx(float((ours - theirs).square().sum() / theirs.square().sum()), rel=1e-4)


@pytest.mark.parametrize("choice", [{"quality": "balanced"}, {"method": "sparsegpt"}, {"criterion": "gblm"}, {"quality": "fast", "pattern": "2:4"}])
def test_blocks_and_head_together(choice: dict[str, Any], tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(source)
    ask = ONLY_HEAD | {"only": "proj|lm_head"} | choice
    report = llmprune.prune(source, **ask, output=str(tmp_path / "out"), device="cpu")
    assert [row.matrix for row in report.rows][-1] == "lm_head.weight"
    assert report.rows[-1].zeros == round(report.rows[-1].asked * report.rows[-1].rows * report.rows[-1].columns)
    assert report.sparsity == pytest.approx(0.5, abs=1e-4)
    llmprune.prune(model, **ask)
    for (name, live), stored in zip(model.named_parameters(), parameters_of(tmp_path / "out"), strict=True):
        assert torch.equal(live, stored), name


def parameters_of(folder: Path) -> list[Tensor]:
    return list(AutoModelForCausalLM.from_pretrained(folder).parameters())


def test_a_repair_of_the_head_lowers_its_error(tmp_path: Path) -> None:
    errors = {}
    for method in ("wanda", "sparsegpt", "alps"):
        model = tiny_model("llama")
        errors[method] = llmprune.prune(model, **ONLY_HEAD, method=method).blocks[-1].output_error
    assert errors["alps"] < errors["sparsegpt"] < errors["wanda"]


@pytest.mark.parametrize(
    ("family", "only", "says"),
    [
        ("llama", "embed|proj", "model.embed_tokens.weight: embeddings are looked up"),
        ("llama_tied", "lm_head", "lm_head.weight: is tied to the embeddings"),
        ("gpt2", "lm_head|mlp", "lm_head.weight: is tied to the embeddings"),
    ],
)
def test_what_cannot_be_pruned_is_refused(family: str, only: str, says: str, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "source")
    ask = ONLY_HEAD | {"only": only, "method": "wanda"}
    with pytest.raises(RequestError, match=says):
        llmprune.prune(source, **ask, output=str(tmp_path / "out"))
    with pytest.raises(RequestError, match=says):
        llmprune.prune(tiny_model(family), **ask)
    assert not (tmp_path / "out").exists()
