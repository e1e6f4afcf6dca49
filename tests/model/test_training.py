"""Training of what survives: block reconstruction and whole-model distillation, with frozen masks."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import parameters_of, save_tiny, tiny_model, tiny_windows
from often import often
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.errors import RequestError
from llmprune.maths.masked_adam import SurvivorAdam, vectors
from llmprune.maths.mixed_precision import CPU_SUPPORT, mixed_precision
from llmprune.model.matrices import Selection
from llmprune.solvers.reconstruct import Reconstruct

IDS_NL = tiny_windows(8)
FAMILIES = ["llama", "gpt2", "phi3", "mixtral", "gpt_oss", "falcon", "gemma2", "mamba", "lfm2", "gemma4_text", "qwen3_next", "bloom"]


def test_steps_are_those_of_plain_adam_on_the_survivors() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 8, dtype=torch.float64).where(torch.rand(6, 8) < 0.5, 0.0).float(), requires_grad=False)
    scale = nn.Parameter(torch.rand(6), requires_grad=False)
    inputs, wanted = torch.randn(20, 8), torch.randn(20, 6)

    def loss(w: Tensor, s: Tensor) -> Tensor:
        return (s * (inputs @ w.T) - wanted).square().mean()

    survivors = [(i, j) for i in range(6) for j in range(8) if weight[i, j] != 0]
    plain = [weight[i, j].clone().requires_grad_() for i, j in survivors] + [scale[i].clone().requires_grad_() for i in range(6)]
    sizes = [weight[weight != 0].square().mean().sqrt()] * len(survivors) + [scale.square().mean().sqrt()] * 6
    adam = torch.optim.Adam([{"params": [p]} for p in plain], betas=(0.9, 0.95))
    ours = SurvivorAdam([weight], [scale], steps=10, rate=0.05)
    for step in range(10):
        dense = torch.zeros(6, 8)
        for (i, j), p in zip(survivors, plain, strict=False):
            dense[i, j] = p
        adam.zero_grad()
        loss(dense, torch.stack(plain[len(survivors) :])).backward()
        for group, size in zip(adam.param_groups, sizes, strict=True):
            group["lr"] = 0.05 * float(size) * min(1, (step + 1) / 2) * 0.5 * (1 + math.cos(math.pi * step / 10))
        adam.step()
        ours.add(loss(weight, scale) / 2)  # gradients of several losses add up
        ours.add(loss(weight, scale) / 2)
        ours.step()
    ours.keep = True
    ours.__exit__()
    assert not weight.requires_grad
    torch.testing.assert_close(torch.stack([weight[i, j] for i, j in survivors]), torch.stack(plain[: len(survivors)]).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scale.data, torch.stack(plain[len(survivors) :]).detach(), rtol=1e-4, atol=1e-5)
    assert int((weight != 0).sum()) == len(survivors)


def test_what_gains_nothing_is_undone() -> None:
    weight = nn.Parameter(torch.eye(4), requires_grad=False)
    before = weight.clone()
    inputs = torch.randn(10, 4)
    assert not Reconstruct().fit([weight], [], lambda batch: (inputs @ weight.T, inputs), 1)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("family", "solver"),
    often(product(FAMILIES, ["reconstruct", "admm+reconstruct"]), ("llama", "admm+reconstruct"), ("gpt2", "reconstruct"), ("mixtral", "reconstruct")),
)
def test_reconstruction_lowers_the_error_of_a_block(family: str, solver: str, tmp_path: Path) -> None:
    """Zeros stay where they were, vectors that moved are listed, and all other tensors are the source's."""
    save_tiny(family, tmp_path / "model", torch.float32)
    ask: dict[str, Any] = {"calibration": IDS_NL, "pattern": "2:4", "device": "cpu"}
    named = {"criterion": "wanda"} if solver == "reconstruct" else {}
    without = {"criterion": "wanda"} if solver == "reconstruct" else {"solver": "admm"}
    plain = llmprune.prune(tmp_path / "model", output=str(tmp_path / "plain"), **without, **ask)
    trained = llmprune.prune(tmp_path / "model", output=str(tmp_path / "out"), solver=solver, **named, **ask)
    assert trained.blocks[0].output_error < plain.blocks[0].output_error
    assert all(2 * row.zeros == row.rows * row.columns for row in trained.rows)

    dense, base, model = (AutoModelForCausalLM.from_pretrained(tmp_path / f) for f in ("model", "plain", "out"))
    first = model.get_submodule(trained.blocks[0].block)
    changed = {name for block in trained.blocks for name in block.changed}
    pruned = parameters_of(model, trained)
    assert changed >= {f"{trained.blocks[0].block}.{name}" for name in vectors(first) if Selection().takes(name)}
    assert all(Selection().takes(name) for name in changed)  # neither routers' biases nor Mamba's time steps
    for (name, was), before, now in zip(dense.named_parameters(), base.parameters(), model.parameters(), strict=True):
        assert torch.equal(was, now) or name in changed | pruned, name
        if name.startswith(trained.blocks[0].block + ".") and name in pruned:  # later blocks see other inputs, so get other masks
            assert torch.equal(now == 0, before == 0), name
    stored = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert {name for block in stored["blocks"] for name in block["changed"]} == changed

    live = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert llmprune.prune(live, solver=solver, **named, **{key: value for key, value in ask.items() if key != "device"}).blocks == trained.blocks
    for (name, ours), theirs in zip(live.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.requires_grad, name


def divergence(dense: nn.Module, pruned: nn.Module) -> float:
    with torch.no_grad():
        theirs, ours = (m(IDS_NL, use_cache=False).logits.double().log_softmax(-1) for m in (dense, pruned))
    return float(F.kl_div(ours.flatten(0, 1), theirs.flatten(0, 1), log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("family", often(FAMILIES, "llama", "phi3", "gpt_oss"))
@pytest.mark.parametrize("method", ["wanda", None])
def test_distillation_comes_nearer_to_the_dense_model(family: str, method: str | None, tmp_path: Path) -> None:
    """Both figures equal plain transformers'; zeros stay; embeddings, final norm and head are the source's."""
    save_tiny(family, tmp_path / "model", torch.float32)
    ask: dict[str, Any] = {"calibration": IDS_NL, "sparsity": 0.5, "method": method, "device": "cpu"}
    plain = llmprune.prune(tmp_path / "model", output=str(tmp_path / "plain"), **ask)
    report = llmprune.prune(tmp_path / "model", output=str(tmp_path / "out"), polish="kd", polish_steps=12, **ask)
    dense, base, model = (AutoModelForCausalLM.from_pretrained(tmp_path / f, experts_implementation="eager") for f in ("model", "plain", "out"))
    assert report.polish is not None
    assert report.polish.divergence_before == pytest.approx(divergence(dense, base), rel=1e-3, abs=1e-6)
    assert report.polish.divergence_after == pytest.approx(divergence(dense, model), rel=1e-3, abs=1e-6)
    assert report.polish.divergence_after <= report.polish.divergence_before
    if method:  # else some of these random models are so near already that so few steps gain nothing
        assert report.polish.divergence_after < 0.9 * report.polish.divergence_before
    assert [row.zeros for row in report.rows] == [row.zeros for row in plain.rows]
    pruned = parameters_of(model, report)
    for (name, was), before, now in zip(dense.named_parameters(), base.parameters(), model.parameters(), strict=True):
        assert torch.equal(was, now) or name in pruned.union(report.polish.changed), name
        if name in pruned:
            assert torch.equal(now == 0, before == 0), name


def test_a_live_model_is_distilled_like_a_checkpoint(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", torch.float32)
    ask: dict[str, Any] = {"calibration": IDS_NL, "sparsity": 0.5, "quality": "max", "polish_steps": 5}
    report = llmprune.prune(tmp_path / "model", output=str(tmp_path / "out"), device="cpu", **ask)
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert llmprune.prune(live, **ask).polish == report.polish
    for ours, theirs in zip(live.parameters(), AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        ({"polish_steps": 5}, "5 polish steps without a polish"),
        ({"polish_steps": 5, "quality": "balanced"}, "5 polish steps without a polish"),
        ({"polish": "kd", "only": "proj|lm_head"}, "polish kd with a pruned head"),
        ({"solver": "reconstruct"}, "needs a criterion"),
        ({"solver": "admm+refit"}, "only a solver for blocks can follow another: reconstruct"),
        ({"solver": "reconstruct+reconstruct", "criterion": "wanda"}, "only a solver for blocks can follow another: reconstruct"),
        ({"solver": "adm+reconstruct"}, "did you mean 'admm'"),
    ],
)
def test_refused(ask: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as refused:
        llmprune.prune(tiny_model("llama"), 0.5, calibration=IDS_NL, **ask)
    assert says.replace(".", "+") in f"{refused.value.message} {refused.value.hint}"


def test_a_model_too_large_to_train_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.run.preflight.memory_of", lambda device: 1000)
    with pytest.raises(RequestError, match="training the whole model takes"):
        llmprune.prune(tiny_model("llama"), 0.5, calibration=IDS_NL, quality="max")
    llmprune.prune(tiny_model("llama"), 0.5, calibration=IDS_NL, quality="max", polish="none")


@pytest.mark.parametrize(("dtype", "there"), [("auto", True), ("auto", False), ("float32", True)])
def test_training_steps_are_in_mixed_precision_where_the_cpu_is_faster_so(
    dtype: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of training steps alone: statistics, measured errors and divergences are in float32, and an explicit dtype is obeyed."""
    for ask in CPU_SUPPORT:
        monkeypatch.setattr(torch.cpu, ask, lambda: there, raising=False)
    save_tiny("llama", tmp_path / "model", torch.float32)
    seen: set[tuple[bool, torch.dtype]] = set()
    hook = register_module_forward_hook(
        lambda module, _, out: seen.add((torch.is_grad_enabled(), out.dtype)) if isinstance(module, nn.Linear) else None
    )
    try:
        ask: dict[str, Any] = {"calibration": IDS_NL, "sparsity": 0.5, "polish": "kd", "polish_steps": 12, "device": "cpu"}
        report = llmprune.prune(tmp_path / "model", output=str(tmp_path / "out"), solver="admm+reconstruct", dtype=dtype, **ask)
    finally:
        hook.remove()
    assert seen == {(False, torch.float32), (True, torch.bfloat16 if dtype == "auto" and there else torch.float32)}
    assert report.polish is not None
    assert report.polish.divergence_after < report.polish.divergence_before
    assert sum(row.zeros for row in report.rows) * 2 == sum(row.rows * row.columns for row in report.rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_stays_as_it_is(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for ask in CPU_SUPPORT:
        monkeypatch.setattr(torch.cpu, ask, lambda: True, raising=False)
    for given, enabled in ((dtype, False), (torch.float32, True)):
        with mixed_precision(torch.device("cpu"), given, True):
            assert torch.is_autocast_enabled("cpu") == enabled
