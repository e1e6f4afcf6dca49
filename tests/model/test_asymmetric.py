"""Stages found from what feeds what, the statistics of two paths, and the target made of them."""

from __future__ import annotations

import math
import runpy
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from cli.runner import ROOT
from families import VOCABULARY, save_tiny, tiny_model, tiny_windows
from often import often
from torch import nn
from torch.nn.functional import kl_div

import llmprune
from llmprune.allocation.uniform import Uniform
from llmprune.checkpoint.source import open_folder
from llmprune.maths.asymmetric_target import DAMPING, asymmetric_target
from llmprune.maths.linalg import damped
from llmprune.model.carried import Call
from llmprune.model.matrices import Selection, block_matrices
from llmprune.patterns.unstructured import Unstructured
from llmprune.pruners.plan import Plan
from llmprune.solvers.admm import ADMM
from llmprune.solvers.kfac import KFAC
from llmprune.statistics import stages as statistics
from llmprune.statistics.stages import stage_by_stage
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.clock import Clock
from llmprune.stream.flow import Flow
from llmprune.stream.selected import selected
from llmprune.types import Stats

IDS_NL = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
PLAN = Plan(None, Unstructured(), ADMM(), Uniform(), 0.5, asymmetric=True)


def open_stream(family: str, folder) -> CheckpointStream:
    save_tiny(family, folder)
    return CheckpointStream(open_folder(folder, family), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("gemma2", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("gpt2", [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]),
        ("phi3", [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]),
        ("gpt_neox", [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]]),
        ("mixtral", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]),
        ("mamba", [["in_proj"], ["out_proj"]]),
    ],
)
@torch.no_grad()
def test_stages_follow_what_feeds_what(tmp_path, family, expected):
    stream = open_stream(family, tmp_path)
    flow = Flow(stream, IDS_NL)
    matrices = selected(stream, Selection())[0]
    with stream.block(0) as block:
        found = [stage for stage, _ in stage_by_stage(flow, flow.twin(), 0, block, matrices, PLAN.needs, Clock())]
    names = [list(dict.fromkeys(m.parameter.removesuffix(".weight").rpartition(".")[2] for m in stage)) for stage in found]
    assert names == expected
    assert sorted(m.name for stage in found for m in stage) == sorted(m.name for m in matrices)


@torch.no_grad()
def test_statistics_of_both_paths_equal_those_of_hooks(tmp_path):
    """Gram, cross and partner sums of a llama block whose two paths differ, against plain hooks on the block."""
    stream = open_stream("llama", tmp_path)
    flow = Flow(stream, IDS_NL)
    dense = flow.twin()
    for batch in range(len(flow)):
        flow.hidden[batch] = dense.hidden[batch] + 0.1 * torch.randn(dense.hidden[batch].shape, generator=torch.Generator().manual_seed(batch))
    matrices = selected(stream, Selection())[0]
    with stream.block(0) as block:
        stats = {}
        for _, statistics in stage_by_stage(flow, dense, 0, block, matrices, PLAN.needs, Clock()):
            stats |= statistics
        inputs = {}
        for path, which in (("pruned", flow), ("dense", dense)):
            for name in ("q_proj", "o_proj"):
                block.self_attn.get_submodule(name).register_forward_pre_hook(lambda m, args, key=(path, name): inputs.setdefault(key, args[0]))
            residual = which.hidden[0]
            which.run(0, block, 0)
            inputs[path, "residual"] = residual
            block.self_attn.q_proj._forward_pre_hooks.clear()
            block.self_attn.o_proj._forward_pre_hooks.clear()
    flat = {key: value.flatten(0, 1).double() for key, value in inputs.items()}
    assert len(flow) == 1
    for name in ("q_proj", "o_proj"):
        found = stats[f"self_attn.{name}.weight"]
        for got, wanted in (
            (found.gram_CC, flat["pruned", name].T @ flat["pruned", name]),
            (found.cross_CC, flat["dense", name].T @ flat["pruned", name]),
        ):
            assert float((got - wanted).norm() / wanted.norm()) < 1e-6
    partner_RC = (flat["dense", "residual"] - flat["pruned", "residual"]).T @ flat["pruned", "o_proj"]
    got_RC = stats["self_attn.o_proj.weight"].partner_RC
    assert float((got_RC - partner_RC).norm() / partner_RC.norm()) < 1e-6
    assert stats["self_attn.q_proj.weight"].partner_RC is None


STRAIGHT = ["llama", "gemma2", "gpt2", "phi3", "gpt_neox", "falcon", "gptj", "cohere2", "mamba", "lfm2", "bloom", "opt"]


@pytest.mark.parametrize("family", often([*STRAIGHT, "mixtral", "deepseek_v3"], "llama", "gptj", "mixtral"))
def test_forwards_that_wait_equal_forwards_that_start_anew(tmp_path, family, monkeypatch):
    """Bit for bit, whether all micro-batches wait side by side or memory is too short for that; threads end with the block."""
    save_tiny(family, tmp_path / "model")
    monkeypatch.setitem(sys.modules["llmprune.stream.flow"].TOKENS_PER_BATCH, "cpu", 16)
    passages = {"Waiting": 0, "Repeated": 0}
    for kind in passages:
        made = getattr(statistics, kind)

        def counted(*args, kind=kind, made=made):
            passages[kind] += 1
            return made(*args)

        monkeypatch.setattr(statistics, kind, counted)
    threads = threading.active_count()
    reports = [llmprune.prune(tmp_path / "model", 0.5, calibration=IDS_NL, output=str(tmp_path / "waiting"))]
    waited = passages["Waiting"]
    assert threading.active_count() == threads
    monkeypatch.setattr(statistics, "memory_of", lambda device: 0)
    reports.append(llmprune.prune(tmp_path / "model", 0.5, calibration=IDS_NL, output=str(tmp_path / "anew")))
    assert reports[0].blocks == reports[1].blocks
    for path in (tmp_path / "waiting").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "anew" / path.name).read_bytes()
    assert waited == passages["Repeated"] == passages["Waiting"]
    assert (waited > 0) == (family in [*STRAIGHT, "deepseek_v3"])  # its first block is dense


def test_threads_end_when_a_run_breaks_off(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path / "model")

    def fails(*args):
        raise RuntimeError("in the middle of a stage")

    monkeypatch.setattr(KFAC, "solve", fails)
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="in the middle of a stage"):
        llmprune.prune(tmp_path / "model", 0.5, calibration=IDS_NL, output=str(tmp_path / "out"))
    assert threading.active_count() == threads


class Moody(nn.Module):
    """A block whose operations depend on what enters it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_NLD):
        out = self.first(hidden_NLD)
        if float(hidden_NLD[0, 0, 0]) > 0:
            out = out + 1
        return hidden_NLD + self.second(out)


@pytest.mark.parametrize("signs", [(1, 1, 1), (1, -1, 1), (-1, 1, 1)])
@torch.no_grad()
def test_a_block_that_runs_otherwise_is_followed_mark_by_mark(signs):
    torch.manual_seed(0)
    block = Moody()
    hidden = [torch.randn(2, 5, 8) for _ in signs]
    for value, sign in zip(hidden, signs, strict=True):
        value[0, 0, 0] = 3.0 * sign
    walk = SimpleNamespace(replay=lambda block, hidden_NLD, call: block(hidden_NLD), model=SimpleNamespace(config=None))
    stream = SimpleNamespace(walk=walk, names=["block"], path_of=["block"].__getitem__, scratch=None, device_of=lambda index: torch.device("cpu"))
    paths = []
    for shift in (0.0, 0.1):
        path = Flow.__new__(Flow)
        path.stream, path.ids, path.calls = stream, list(hidden), [[Call((), {})]] * len(hidden)
        path.hidden = {i: h + shift * torch.ones_like(h) for i, h in enumerate(hidden)}
        path.outputs = {}
        paths.append(path)
    dense, flow = paths
    found = dict(zip(("first", "second"), stage_by_stage(flow, dense, 0, block, block_matrices(block), PLAN.needs, Clock()), strict=True))
    assert [[m.name for m in stage] for stage, _ in found.values()] == [["first.weight"], ["second.weight"]]
    middle = [[block.first(p.hidden[i]) + (p.hidden[i][0, 0, 0] > 0) for i in range(len(hidden))] for p in (dense, flow)]
    dense_TC, pruned_TC = (torch.cat([m.flatten(0, 1) for m in side]) for side in middle)
    apart_TR = torch.cat([(dense.hidden[i] - flow.hidden[i]).flatten(0, 1) for i in range(len(hidden))])
    stats = found["second"][1]["second.weight"]
    torch.testing.assert_close(stats.gram_CC, pruned_TC.T @ pruned_TC)
    torch.testing.assert_close(stats.cross_CC, dense_TC.T @ pruned_TC)
    torch.testing.assert_close(stats.partner_RC, apart_TR.T @ pruned_TC)
    for i in range(len(hidden)):
        assert torch.equal(flow.outputs[i], block(flow.hidden[i]))
        assert torch.equal(dense.outputs[i], block(dense.hidden[i]))


def test_the_target_is_the_damped_least_squares_correction():
    generator = torch.Generator().manual_seed(0)
    dense_TC, noise_TC = (torch.randn(200, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    pruned_TC = dense_TC + 0.3 * noise_TC
    apart_TR = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    weight_RC = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    stats = Stats(200, gram_CC=pruned_TC.T @ pruned_TC, cross_CC=dense_TC.T @ pruned_TC, partner_RC=apart_TR.T @ pruned_TC)
    residual_TR = (dense_TC - pruned_TC) @ weight_RC.T + apart_TR
    correction_RC = residual_TR.T @ pruned_TC @ torch.linalg.inv(damped(stats.gram_CC, DAMPING))
    for share in (0.5, 1.0):
        torch.testing.assert_close(asymmetric_target(weight_RC, stats, share), weight_RC + share * correction_RC, rtol=1e-10, atol=1e-10)
    assert asymmetric_target(weight_RC, Stats(200, gram_CC=stats.gram_CC)) is weight_RC


@pytest.mark.parametrize(
    "family",
    often(
        ["gpt2", "phi3", "mixtral", "gpt_neox", "gemma2", "mamba", "lfm2", "llama4_text", "qwen3_next", "nemotron_h", "deepseek_v3"],
        *("gpt2", "phi3", "mixtral", "mamba", "nemotron_h"),
    ),
)
def test_the_default_quality_works_on_any_family(tmp_path, family):
    """Exact counts and finite errors, with the dense path beside and rows weighed."""
    save_tiny(family, tmp_path / "model")
    report = llmprune.prune(tmp_path / "model", 0.5, calibration=IDS_NL, output=str(tmp_path / "out"))
    assert report.recipe["target"] == "asymmetric"
    assert all(row.zeros == round(row.asked * row.rows * row.columns) for row in report.rows)
    assert sum(row.zeros for row in report.rows) == round(0.5 * sum(row.rows * row.columns for row in report.rows))
    assert all(math.isfinite(block.output_error) for block in report.blocks)


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "at_most"), [("unstructured", 0.40), ("2:4", 0.62)])
def test_balanced_is_far_ahead_of_sparsegpt(assets, tmp_path, pattern, at_most):
    """Excess negative log-likelihood on stories260K, as a ratio to sparsegpt's, for one calibration draw."""
    texts = assets / "text"
    data = str(texts / "tinystories_ascii_eval.txt")
    ask = {"samples": 128, "sequence_length": 256, "calibration": str(texts / "tinystories_ascii_calib.txt"), "pattern": pattern}

    def excess(folder, **named) -> float:
        if named:
            llmprune.prune(assets / "stories260K", 0.5, output=str(folder), **ask, **named)
        return math.log(llmprune.evaluate(folder, data, window=256, samples=200)[0].value)

    dense = excess(assets / "stories260K")
    ours, theirs = excess(tmp_path / "ours", quality="balanced"), excess(tmp_path / "theirs", method="sparsegpt")
    assert (ours - dense) / (theirs - dense) <= at_most


OTHERS = [(family, pattern) for family in ("gpt2", "phi3", "bloom", "falcon_new", "mixtral", "gpt_oss") for pattern in ("unstructured", "2:4")]


@pytest.mark.parametrize(
    ("family", "pattern"), often(OTHERS, ("gpt2", "unstructured"), ("phi3", "2:4"), ("falcon_new", "unstructured"), ("mixtral", "2:4"))
)
def test_balanced_beats_sparsegpt_on_other_architectures(family, pattern):
    """Divergence from the dense model on tokens that were not calibrated on; random weights, so there is no structure to tune to."""
    calibration_NL = tiny_windows(48, 32)
    unseen_NL = torch.randint(3, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        dense_NLV = tiny_model(family)(unseen_NL).logits.log_softmax(-1)
    apart = {}
    for named in ({"quality": "balanced"}, {"method": "sparsegpt"}):
        model = tiny_model(family)
        llmprune.prune(model, 0.5, pattern, calibration=calibration_NL, **named)
        with torch.no_grad():
            apart[*named.values()] = float(kl_div(model(unseen_NL).logits.log_softmax(-1), dense_NLV, log_target=True, reduction="batchmean"))
    assert apart["balanced",] < 0.95 * apart["sparsegpt",]


def test_a_matrix_with_several_inputs_in_one_forward_is_noted(tmp_path):
    """One of Zaya's values is also made of the token before; what it saw on the dense path cannot be told apart."""
    runpy.run_path(str(ROOT / "scripts" / "tiny_types.py"))["save_tiny"]("zaya", tmp_path / "model")
    report = llmprune.prune(tmp_path / "model", 0.5, calibration=IDS_NL, output=str(tmp_path / "out"), accept_damage=True)
    noted = {row.matrix.rpartition(".layers.")[2] for row in report.rows if any("several inputs in one forward" in note for note in row.notes)}
    assert noted == {f"{i}.self_attn.qkv_proj.v_proj_delayed.weight" for i in range(4)}
