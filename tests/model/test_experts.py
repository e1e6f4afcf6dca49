"""Experts in unequal numbers by layer, chosen by measured errors; scores by the gates that a model uses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import ROUNDING, blocks_of, generates_alike, logits, reloaded, tiny, without_experts
from families import tiny_windows
from faults.runs import contents
from often import often
from torch import Tensor, nn

import llmprune
from llmprune.errors import RequestError
from llmprune.pruners.experts import Routed
from llmprune.recipe.reading import read_recipe
from llmprune.report.result import Report
from llmprune.run.job import run
from llmprune.run.prepare import prepare
from llmprune.types import Listener

IDS = tiny_windows(8, 24)
FULL, SLIDING = "full_attention", "sliding_attention"
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_hidden_layers": 4, "mlp_only_layers": [1], "output_router_logits": True},
    "mixtral": {"num_local_experts": 8, "num_hidden_layers": 3},
    "olmoe": {"num_hidden_layers": 3},
    "gpt_oss": {"num_hidden_layers": 4, "num_local_experts": 8, "layer_types": [SLIDING, FULL, SLIDING, FULL]},
    "deepseek_v3": {"num_hidden_layers": 4},
}


def stored(family: str, folder: Path, **values: Any) -> Any:
    """A tiny mixture whose later layers' experts add more, so that the layers differ in what they can spare."""
    model = tiny(family, **MIXTURES[family] | values)
    for i, block in enumerate(blocks_of(model)):
        for name, parameter in block.named_parameters():
            if "experts.down_proj" in name:
                parameter.data.mul_(0.2 + 2 * i)
    model.save_pretrained(folder)
    return model


def cut(folder: Path, sparsity: float, out: str = "out", **options: Any) -> Report:
    options = {"allocation": "sensitivity"} | options
    return llmprune.prune(folder, sparsity, "experts", calibration=IDS, output=str(folder.parent / out), accept_damage=True, **options)


def kept_by(model: Any, report: Report) -> list[dict[str, Tensor]]:
    rows = {row.matrix: row for row in report.rows}
    stacks = [{"mlp.experts": f"{block.block}.mlp.experts"} for block in report.blocks]
    return [{space: torch.tensor(rows[name].kept) for space, name in stack.items() if name in rows} for stack in stacks]


@contextmanager
def without_loss(model: Any) -> Iterator[None]:
    model.config.output_router_logits, before = False, getattr(model.config, "output_router_logits", False)
    yield
    model.config.output_router_logits = before


@pytest.mark.parametrize("family", often(MIXTURES, "qwen3_moe", "gpt_oss", "deepseek_v3"))
def test_unequal_numbers_load_again(family: str, tmp_path: Path) -> None:
    """As transformers itself computes where the dense model's routers cannot choose the dropped experts."""
    model = stored(family, tmp_path / "model")
    report = cut(tmp_path / "model", 0.25)
    counts = [len(row.kept or ()) for row in report.rows]
    assert len(set(counts)) > 1
    assert sum(counts) * 4 == sum(row.units or 0 for row in report.rows) * 3
    smaller = reloaded(tmp_path / "out", trust_remote_code=True)
    with without_experts(model, kept_by(model, report)), without_loss(model):
        wanted = logits(model)
    assert float((logits(smaller) - wanted).abs().max()) < ROUNDING
    generates_alike(smaller)
    assert [len(router.weight) for router in routers(smaller)] == counts
    live = llmprune.prune(stored(family, tmp_path / "again"), 0.25, "experts", allocation="sensitivity", calibration=IDS, accept_damage=True)
    assert float((logits(live.model) - logits(smaller)).abs().max()) < ROUNDING


def routers(model: Any) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith((".mlp.gate", ".mlp.router"))]


def test_plain_loading_without_the_class_fails(tmp_path: Path) -> None:
    stored("qwen3_moe", tmp_path / "model")
    report = cut(tmp_path / "model", 0.25)
    assert any("output_router_logits is off" in note for note in report.smaller.notes)
    with pytest.raises(Exception, match=r"per-layer attribute|mismatch"):
        reloaded(tmp_path / "out")


def block_output(model: Any, index: int) -> Tensor:
    found: list[Tensor] = []
    hook = blocks_of(model)[index].register_forward_hook(lambda block, args, out: found.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    return found[0].double()


def test_errors_are_those_of_the_blocks_output(tmp_path: Path) -> None:
    """The number behind a ratio is measured again by hooks on transformers' own forward, for the first block, whose inputs are the same."""
    model = stored("mixtral", tmp_path / "model")
    report = cut(tmp_path / "model", 0.5, "out")
    row, keeps = report.rows[0], kept_by(model, report)
    assert 2 <= len(row.kept or ()) < 8
    whole = block_output(model, 0)
    with without_experts(model, [keeps[0], *({"mlp.experts": torch.arange(8)} for _ in keeps[1:])]):
        restricted = block_output(model, 0)
    error = float((whole - restricted).square().sum() / whole.square().sum())
    assert report.reasons[row.matrix] == pytest.approx(error, rel=1e-4)


def test_equal_numbers_are_as_they_were(tmp_path: Path) -> None:
    stored("mixtral", tmp_path / "model")
    report = cut(tmp_path / "model", 0.25, "default", allocation=None)
    cut(tmp_path / "model", 0.25, "uniform", allocation="uniform")
    assert {len(row.kept or ()) for row in report.rows} == {6}
    assert not report.reasons
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "default" / name).read_bytes() == (tmp_path / "uniform" / name).read_bytes()


@pytest.mark.parametrize("solver", [None, "refit"])
def test_a_resumed_run_keeps_its_numbers(solver: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are measured once; the end is byte-identical."""
    stored("mixtral", tmp_path / "model")
    cut(tmp_path / "model", 0.25, "whole", solver=solver)
    ask = {"pattern": "experts", "allocation": "sensitivity", "solver": solver, "accept_damage": True}
    ask |= {"model": str(tmp_path / "model"), "sparsity": 0.25}

    def stop(step: str, done: int, total: int) -> None:
        if (step, done) == ("prune", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(prepare(read_recipe(None, ask | {"output": str(tmp_path / "out")}), IDS), Listener(progress=stop))
    monkeypatch.setattr("llmprune.ratios.measured.expert_errors", None)
    report = cut(tmp_path / "model", 0.25, solver=solver)
    assert report.timings.resumed_blocks == 2
    whole, resumed = contents(tmp_path / "whole"), contents(tmp_path / "out")
    for name in ("model.safetensors", "config.json", "modeling_pruned.py"):
        assert resumed[name] == whole[name]


def test_an_uneven_result_is_cut_again(tmp_path: Path) -> None:
    """Fields have the names that the config stores them by, and blocks are rebuilt in the sizes that they have."""
    stored("qwen3_moe", tmp_path / "model")
    before = cut(tmp_path / "model", 0.25)
    after = cut(tmp_path / "out", 1 / 3, "again")
    assert [row.units for row in after.rows] == [len(row.kept or ()) for row in before.rows]
    generates_alike(reloaded(tmp_path / "again", trust_remote_code=True))
    llmprune.prune(
        tmp_path / "out", 0.5, "channels", calibration=IDS, output=str(tmp_path / "thin"), method="magnitude", round_to=1, accept_damage=True
    )
    thin = reloaded(tmp_path / "thin", trust_remote_code=True)
    assert [len(router.weight) for router in routers(thin)] == [row.units for row in after.rows]
    generates_alike(thin)
    with pytest.raises(RequestError, match="experts in equal numbers: layers have"):
        cut(tmp_path / "out", 0.5, "equal", allocation=None)


def stack_outputs(model: Any, index: int) -> Tensor:
    found: list[Tensor] = []
    hook = blocks_of(model)[index].mlp.experts.register_forward_hook(lambda experts, args, out: found.append(out))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    return found[0].double().flatten()


@pytest.mark.parametrize("family", often(MIXTURES, "mixtral", "gpt_oss"))
def test_gates_are_scaled_by_least_squares(family: str, tmp_path: Path) -> None:
    """The scale of the first mixture, whose inputs are the dense model's, against lstsq on the outputs that hooks see."""
    model = stored(family, tmp_path / "model")
    plain = cut(tmp_path / "model", 0.5, "plain", allocation=None)
    report = cut(tmp_path / "model", 0.5, allocation=None, solver="refit")
    first = {"deepseek_v3": 1}.get(family, 0)
    before = reloaded(tmp_path / "plain")
    with without_loss(model), without_loss(before):
        whole, kept = stack_outputs(model, first), stack_outputs(before, first)
    scale = float(torch.linalg.lstsq(kept[:, None], whole[:, None]).solution)
    after = reloaded(tmp_path / "out")
    for name, parameter in blocks_of(after)[first].mlp.experts.named_parameters():
        factor = scale if "down_proj" in name else 1
        assert torch.allclose(parameter, blocks_of(before)[first].mlp.experts.get_parameter(name) * factor, rtol=1e-4, atol=1e-6)
    assert [row.kept for row in report.rows][:1] == [row.kept for row in plain.rows][:1]
    assert any(f"gates scaled by {scale:.3f}"[:-1] in note for note in report.rows[0].notes)
    again = llmprune.prune(stored(family, tmp_path / "live"), 0.5, "experts", solver="refit", calibration=IDS, accept_damage=True)
    with without_loss(again.model), without_loss(after):
        assert float((logits(again.model) - logits(after)).abs().max()) < ROUNDING


REFUSED = [
    (0.25, {"solver": "admm"}, "solver 'admm' with pattern experts; use refit or mask_only"),
    (0.25, {"solver": "refit", "options": {"damping": 0.1}}, "options with pattern experts, whose parts have none"),
    (0.25, {"allocation": "owl"}, "allocation 'owl' with pattern experts; use sensitivity or uniform"),
    (0.25, {"allocation": "explicit", "ratios": {"experts": 0.25}}, "allocation 'explicit' with pattern experts; use sensitivity or uniform"),
    (0.25, {"allocation": "sensitive"}, "allocation 'sensitive' is unknown"),
    (0.25, {"uniform": True}, "uniform sizes with allocation 'sensitivity'"),
    (0.9, {}, "experts at sparsity 0.9: 0.04167 is the least that can be dropped, 0.75 the most"),
    (0.02, {}, "experts at sparsity 0.02: 0.04167 is the least that can be dropped, 0.75 the most"),
]


@pytest.mark.parametrize(("sparsity", "options", "says"), REFUSED)
def test_what_cannot_be_shared_out_is_refused_at_once(sparsity: float, options: dict[str, Any], says: str, tmp_path: Path) -> None:
    stored("mixtral", tmp_path / "model")
    with pytest.raises(RequestError) as refused:
        cut(tmp_path / "model", sparsity, **options)
    assert says in f"{refused.value.message}; {refused.value.hint}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("renormalised", [True, False])
def test_scores_are_by_the_gates_that_the_model_uses(renormalised: bool) -> None:
    """Where a model renormalises its chosen gates, so does the score (REAP's correction of March 2026)."""
    model = tiny("qwen3_moe", norm_topk_prob=renormalised)
    mixture = blocks_of(model)[0].mlp
    hidden_TD = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), Routed(mixture.experts, 12) as routed:
        model.set_experts_implementation("eager")
        mixture(hidden_TD[None])
    chances_TE = (hidden_TD @ mixture.gate.weight.T).softmax(1)
    wanted, experts = [], mixture.experts
    for e in range(12):
        chosen_T = (chances_TE.argsort(1, descending=True)[:, :2] == e).any(1)
        gate_up, x = experts.gate_up_proj[e], hidden_TD[chosen_T]
        gate, up = (x @ gate_up.T).chunk(2, dim=1)
        norms = ((nn.functional.silu(gate) * up) @ experts.down_proj[e].T).norm(dim=1)
        two = chances_TE[chosen_T].topk(2, dim=1).values
        weight = chances_TE[chosen_T, e] / (two.sum(1) if renormalised else 1)
        wanted.append(float((weight * norms).mean().detach()) if len(x) else 0.0)
    assert routed.score_E.tolist() == pytest.approx(wanted, rel=1e-4)


def test_a_source_that_returns_its_routers_logits(tmp_path: Path) -> None:
    """Its balancing loss, which needs every block in place, is left out while blocks run alone."""
    stored("qwen3_moe", tmp_path / "model")
    report = llmprune.prune(tmp_path / "model", 0.5, calibration=IDS, output=str(tmp_path / "out"), method="magnitude", accept_damage=True)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["output_router_logits"] is True
