"""Masks before training, against scores computed in another way: gradients of the model's own loss, differences of gradients, a plain loop."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cli.runner import Cli
from families import save_tiny, tiny_model, tiny_windows
from often import often
from torch import Tensor
from torch.func import functional_call, grad, jvp
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import llmprune
from llmprune import SparsityCallback
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.errors import RequestError
from llmprune.recipe.named import build_pattern
from llmprune.training import initial
from llmprune.training.initial import ALLOCATIONS, CRITERIA, initial_masks
from llmprune.training.masks import matrices_by_parameter, read_masks

IDS_NL = tiny_windows(3)
FAMILIES = ("llama", "gpt2", "mixtral", "gemma2", "mamba")


def loss(model: Any, ids_NL: Tensor = IDS_NL) -> Tensor:
    """The summed next-token loss, by transformers."""
    return model(input_ids=ids_NL, labels=ids_NL).loss * ids_NL[:, 1:].numel()


def gradients(model: Any, names: list[str]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss(model), [model.get_parameter(name) for name in names], materialize_grads=True)
    return dict(zip(names, found, strict=True))


def tuned(family: str) -> tuple[Any, list[str]]:
    model = tiny_model(family).float().eval().requires_grad_(False)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    names = list(matrices_by_parameter(model))
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return model, names


def whole(found: dict[str, list[Tensor]], model: Any) -> dict[str, Tensor]:
    """Scores laid out as the parameters are."""
    chosen = matrices_by_parameter(model)
    laid = {name: torch.zeros_like(model.get_parameter(name), dtype=torch.float32) for name in found}
    for name, scores in found.items():
        for matrix, score_RC in zip(chosen[name], scores, strict=True):
            matrix.view_of(laid[name]).copy_(score_RC)
    return laid


def scores(model: Any, criterion: str) -> dict[str, Tensor]:
    chosen = matrices_by_parameter(model)
    with initial.ready(model, chosen) as weights:
        return whole(initial.scores_of(model, weights, chosen, criterion, IDS_NL, 0), model)


@pytest.mark.parametrize("family", often(FAMILIES, "llama", "gpt2"))
def test_snip_is_weight_times_gradient(family):
    model, names = tuned(family)
    wanted, got = gradients(model, names), scores(model, "snip")
    for name in names:
        reference = (model.get_parameter(name) * wanted[name]).abs().detach().float()
        torch.testing.assert_close(got[name], reference, rtol=1e-4, atol=1e-6 * float(reference.max()))


@pytest.mark.parametrize("family", often(FAMILIES, "llama", "gpt2"))
def test_grasp_is_weight_times_the_change_of_the_gradient_along_itself(family):
    """H g by forward differentiation of the gradient, by torch.func."""
    model, names = tuned(family)
    along = gradients(model, names)

    def total(weights: dict[str, Tensor]) -> Tensor:
        logits_NLV = functional_call(model, weights, kwargs={"input_ids": IDS_NL, "use_cache": False}).logits
        return F.cross_entropy(logits_NLV[:, :-1].flatten(0, 1), IDS_NL[:, 1:].flatten(), reduction="sum")

    values = {name: model.get_parameter(name).detach() for name in names}
    _, change = jvp(grad(total), (values,), (along,))
    got = scores(model, "grasp")
    for name in names:
        reference = values[name] * change[name]
        torch.testing.assert_close(got[name], reference, rtol=1e-2, atol=1e-4 * float(reference.abs().max()))


def test_synflow_is_a_plain_loop(monkeypatch):
    monkeypatch.setattr(initial, "ROUNDS", 5)
    model = tiny_model("llama").eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    chosen = matrices_by_parameter(model)
    masks = initial_masks(model, chosen, "synflow", build_pattern("unstructured"), 0.7, "uniform", seed=3)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    plain = copy.deepcopy(model).double().requires_grad_(True)
    for parameter in plain.parameters():
        parameter.data.abs_()
    ids_NL = torch.randint(plain.config.vocab_size, initial.PROBE, generator=torch.Generator().manual_seed(3))
    entering, original = plain.get_input_embeddings()(ids_NL).detach(), {name: plain.get_parameter(name).data.clone() for name in chosen}
    keep = {name: torch.ones_like(value, dtype=torch.bool) for name, value in original.items()}
    for round_ in range(1, 6):
        for name in chosen:
            plain.get_parameter(name).data = original[name] * keep[name]
        plain.zero_grad()
        plain(inputs_embeds=entering).logits.sum().backward()
        for name in chosen:
            parameter = plain.get_parameter(name)
            score = (parameter.detach() * parameter.grad).abs().flatten()
            drop = round((1 - 0.3 ** (round_ / 5)) * score.numel())
            keep[name] = torch.ones(score.numel(), dtype=torch.bool).scatter_(0, score.argsort(stable=True)[:drop], False).view(parameter.shape)
    for name in chosen:
        assert torch.equal(masks.keep[name], keep[name]), name


@pytest.mark.parametrize("family", often(FAMILIES, "mixtral"))
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("criterion", often([c for c in CRITERIA if c != "synflow"], "random", "snip"))
def test_as_many_weights_are_masked_as_asked(family, criterion, allocation):
    model = tiny_model(family).eval()
    chosen = matrices_by_parameter(model)
    masks = initial_masks(model, chosen, criterion, build_pattern("unstructured"), 0.3, allocation, IDS_NL)
    sizes = [m.rows * m.columns for ms in chosen.values() for m in ms]
    wanted = sum(round(0.3 * size) for size in sizes) if allocation == "uniform" else round(0.3 * sum(sizes))
    assert masks.masked == wanted
    two_of_four = initial_masks(model, chosen, criterion, build_pattern("2:4"), 0.5, "uniform", IDS_NL)
    assert two_of_four.holds(model, 2, 4)
    assert two_of_four.masked == sum(sizes) // 2


def test_one_threshold_that_empties_a_matrix_is_refused():
    model = tiny_model("llama").eval()
    model.model.layers[0].self_attn.q_proj.weight.data.mul_(1e-9)
    with pytest.raises(RequestError, match=r"magnitude at sparsity 0\.5: model\.layers\.0\.self_attn\.q_proj\.weight would lose all its weights"):
        initial_masks(model, matrices_by_parameter(model), "magnitude", build_pattern("unstructured"), 0.5, "threshold")


@pytest.fixture
def config(tmp_path) -> Path:
    """A folder with the bundled model's config and tokenizer, and no weights."""
    folder = tmp_path / "small"
    shutil.copytree(BUNDLED / "llama", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}))
    return folder


def test_a_config_is_initialised_masked_saved_and_trained(config, tmp_path):
    ask: dict[str, Any] = {"data": "bundled-calibration", "samples": 2, "sequence_length": 32}
    report = llmprune.init_mask(config, 0.8, criterion="snip", output=tmp_path / "out", **ask)
    model, _ = llmprune.load(tmp_path / "out")
    again = llmprune.init_mask(config / "config.json", 0.8, criterion="snip", output=tmp_path / "again", **ask)
    assert again.tensors == report.tensors
    assert llmprune.init_mask(config, 0.8, criterion="snip", seed=1, output=tmp_path / "other", **ask).tensors != report.tensors
    masks = read_masks(tmp_path / "out", model)
    assert masks.masked == report.zeros == round(0.8 * report.weights)
    assert not masks.unrecorded
    windows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 2048, (8, 16))]
    args = TrainingArguments(output_dir=str(tmp_path / "run"), max_steps=3, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
    callback = SparsityCallback("constant", masks=masks)
    Trainer(model, args, train_dataset=windows, callbacks=[callback]).train()
    masks.check(model)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), llmprune.load(tmp_path / "out")[0].parameters(), strict=True))


def test_a_model_keeps_its_weights(tmp_path):
    save_tiny("llama", tmp_path / "model", torch.float32)
    llmprune.init_mask(tmp_path / "model", pattern="2:4", criterion="magnitude", output=tmp_path / "out")
    source, masked = (dict(AutoModelForCausalLM.from_pretrained(tmp_path / name).named_parameters()) for name in ("model", "out"))
    for name, parameter in masked.items():
        assert torch.equal(parameter, source[name] * (parameter != 0)), name
    assert sum(int((p == 0).sum()) for p in masked.values()) > 0


def test_weights_in_other_files_are_not_made_again(config, tmp_path):
    (config / "pytorch_model.bin").write_bytes(b"weights")
    with pytest.raises(RequestError, match="safetensors"):
        llmprune.init_mask(config, 0.5, criterion="random", output=tmp_path / "out")
    report = llmprune.init_mask(config / "config.json", 0.5, criterion="random", output=tmp_path / "out")  # as it says
    assert report.recipe["initialised"]


def test_a_tokenizer_of_another_model_is_refused(config, tmp_path):
    values = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(values | {"vocab_size": 100}))
    with pytest.raises(RequestError, match=r"token id .*, the model's vocabulary is 0 to 99"):
        llmprune.init_mask(config, 0.5, data="bundled-calibration", samples=2, sequence_length=32, output=tmp_path / "out")


FAULTS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"criterion": "snap", "sparsity": 0.5}, "criterion 'snap' is unknown"),
    ({"criterion": "snip", "sparsity": 0.5}, "criterion snip needs data"),
    ({"criterion": "random", "sparsity": 0.5, "data": "bundled-calibration"}, "criterion random looks at no data"),
    ({"criterion": "random"}, "without a sparsity"),
    ({"criterion": "random", "sparsity": 1.5}, "sparsity 1.5"),
    ({"criterion": "random", "sparsity": 0.5, "samples": 3}, "samples or sequence_length without data"),
    ({"criterion": "random", "pattern": "2:4", "allocation": "erk"}, "allocation erk with pattern 2:4"),
    ({"criterion": "random", "sparsity": 0.5, "skip": "nothing"}, "skip 'nothing': matches no matrix"),
    ({"criterion": "random", "sparsity": 0.5, "allocation": "owl"}, "allocation 'owl' is unknown"),
    ({"criterion": "snip", "sparsity": 0.5, "data": "bundled-calibration", "sequence_length": 4096, "samples": 1}, "windows of 4096 tokens"),
    ({"criterion": "snip", "sparsity": 0.5, "data": "none.txt"}, "none.txt: no such file"),
)


@pytest.mark.parametrize(("ask", "said"), FAULTS, ids=[said for _, said in FAULTS])
def test_what_cannot_be_is_refused_in_a_line(config, tmp_path, ask, said):
    with pytest.raises(RequestError) as caught:
        llmprune.init_mask(config, **{"output": tmp_path / "out"} | ask)
    assert said in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_the_command_line(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = Cli(capsys)("init-mask", "small", "--criterion", "random", "--pattern", "2:4")
    assert ran.code == 0, ran.err
    assert "saved: small-initial-2of4" in ran.out
    assert Cli(capsys)("inspect", "small-initial-2of4", "--verify", "2:4").code == 0
    assert Cli(capsys)("init-mask", "small", "--criterion", "random", "--pattern", "2:4").code == 2
