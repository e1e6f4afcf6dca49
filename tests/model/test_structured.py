"""Structured pruning of tiny models of many families, from a folder to a folder that plain transformers loads.

The pruned weights are compared with the uncut pruned model, which the same request leaves in memory, with zeros for the units that the report
says have gone.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuts import NAMES, generates_alike, logits, masked, passed_by, reloaded, tiny, without_experts
from families import FAMILIES, tiny_windows
from faults.runs import contents
from often import often
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llmprune
import llmprune.pruners.layers
from llmprune.checkpoint.source import open_folder
from llmprune.errors import PromiseError, RequestError
from llmprune.evaluation.divergence import after_blocks
from llmprune.export.live import save_sliced
from llmprune.export.reload import Reloader
from llmprune.recipe.reading import read_recipe
from llmprune.report.result import Report
from llmprune.run.job import run
from llmprune.run.prepare import open_stream, prepare
from llmprune.structured.spaces import refusal, spaces_of

IDS = tiny_windows(8, 24)
PATTERNS = ("channels", "heads", "kv-groups", "kernel", "layers", "experts", "hidden")
ROUNDING = 1e-5
HALF = 0.5


def works(family: str, pattern: str) -> bool:
    kind, values = FAMILIES[family]
    return refusal(CONFIG_MAPPING[kind](**values), pattern) is None


CASES = [(f, p) for f in NAMES for p in PATTERNS if works(f, p)]
EVERY_TIME = ("llama", "gemma2", "gpt2", "phi3", "qwen3_moe", "deepseek_v3", "mamba", "lfm2")
IMPOSSIBLE = [pytest.param(f, p, id=f"{f}-{p}") for f in NAMES for p in PATTERNS if not works(f, p)]


def stored(family: str, folder: Path, **values: Any) -> Any:
    model = tiny(family, **values)
    model.save_pretrained(folder)
    return model


def cut(folder: Path, pattern: str, sparsity: float | None = HALF, **options: Any) -> Report:
    options = {"round_to": 1 if pattern in ("channels", "kernel", "hidden", "structured") else None, "accept_damage": True} | options
    return llmprune.prune(folder, sparsity, pattern, calibration=IDS, output=str(folder.parent / "out"), **options)


def keeps_of(model: Any, report: Report) -> list[dict[str, Tensor]]:
    """What the report says of each block, by the names of its spaces."""
    rows = {row.matrix: row for row in report.rows}
    keeps: list[dict[str, Tensor]] = []
    for index, block in enumerate(model.get_submodule(path_of(report))):
        path, found = report.blocks[index].block, {}
        for pattern in report.smaller.patterns:
            for space in spaces_of(model.config, 0, block, pattern):
                row = rows[f"{path}.{space.readers[0].matrix if space.readers else space.name}"]
                found[space.name] = torch.tensor(row.kept)
        keeps.append(found)
    return keeps


def path_of(report: Report) -> str:
    return report.blocks[0].block.rpartition(".")[0]


def parameters(model: Any) -> int:
    return sum({t.data_ptr(): t.numel() for t in model.state_dict().values()}.values())  # what is tied counts once


MORE = {"llama": {"num_hidden_layers": 4}, "qwen3_moe": {"num_hidden_layers": 4}}  # an even number of layers


@pytest.mark.parametrize(("family", "pattern"), often(CASES, *(case for case in CASES if case[0] in EVERY_TIME)))
def test_a_family_cut_and_loaded_again(family, pattern, tmp_path):
    dense = stored(family, tmp_path / "model", **MORE.get(family, {}))
    plain = {"layers": {"target": "symmetric"}, "experts": {}, "hidden": {"target": "symmetric", "criterion": "magnitude"}}.get(
        pattern, {"method": "magnitude"}
    )
    report = cut(tmp_path / "model", pattern, **plain)
    if pattern != "layers":  # which may differ
        assert report.sparsity == pytest.approx(HALF)
    smaller = reloaded(tmp_path / "out")
    assert parameters(smaller) == parameters(dense) - report.zeros
    assert report.reloaded.difference < 1e-4
    generates_alike(smaller)
    wanted = logits_without(dense, pattern, report)
    assert float((logits(smaller) - wanted).abs().max()) < ROUNDING


def logits_without(dense: Any, pattern: str, report: Report) -> Tensor:
    """Magnitude changes no weight that stays, so the uncut model tells everything."""
    if pattern == "layers":
        with passed_by(dense, list(report.smaller.layers)):
            return logits(dense)
    keeps = keeps_of(dense, report)
    if pattern == "experts":
        with without_experts(dense, keeps):
            return logits(dense)
    return logits(masked(dense, keeps))


@pytest.mark.parametrize(("family", "pattern"), IMPOSSIBLE)
def test_what_cannot_be_cut_is_refused_with_the_reason(family, pattern, tmp_path):
    stored(family, tmp_path / "model")
    with pytest.raises(RequestError, match="cannot be cut by"):
        cut(tmp_path / "model", pattern)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


REPAIRED = [
    {"quality": "fast"},
    {"quality": "balanced"},
    {"quality": "max", "polish_steps": 2},
    {"method": "taylor"},
    {"solver": "admm"},
    {"criterion": "obd_fisher", "solver": "reconstruct"},
]


@pytest.mark.parametrize("named", REPAIRED)
def test_every_quality_loads_as_it_was_measured(named, tmp_path):
    """The run itself compares logits; here the live model is compared with the folder too."""
    model = stored("qwen3", tmp_path / "model")
    report = cut(tmp_path / "model", "structured", 0.4, uniform=True, **named)
    assert report.reloaded.difference < 1e-4
    live = llmprune.prune(model, 0.4, "structured", calibration=IDS, uniform=True, round_to=1, accept_damage=True, **named)
    assert parameters(live.model) == parameters(reloaded(tmp_path / "out"))
    assert float((logits(live.model) - logits(reloaded(tmp_path / "out"))).abs().max()) < 1e-4
    generates_alike(live.model)


@pytest.mark.parametrize(
    ("pattern", "family"), [("layers", "llama"), ("experts", "mixtral"), ("heads", "olmo2"), ("hidden", "llama"), ("hidden", "gemma2")]
)
def test_live_models_are_cut_as_folders_are(pattern, family, tmp_path):
    model = stored(family, tmp_path / "model", **MORE.get(family, {}))
    cut(tmp_path / "model", pattern)
    live = llmprune.prune(model, HALF, pattern, calibration=IDS, accept_damage=True)
    assert float((logits(live.model) - logits(reloaded(tmp_path / "out"))).abs().max()) < ROUNDING


@pytest.mark.parametrize("pad", [False, True])
def test_layers_of_different_sizes(pad, tmp_path):
    """Saved with their own sizes and code that reads them, or with zeros and none."""
    stored("llama", tmp_path / "model", num_hidden_layers=4)
    report = cut(tmp_path / "model", "structured", 0.3, pad=pad)
    assert abs(report.sparsity - 0.3) * report.weights <= min(row.parameters // row.units for row in report.rows)
    assert len({len(row.kept) for row in report.rows}) > 2
    assert report.smaller.remote_code == (not pad)
    smaller = reloaded(tmp_path / "out", trust_remote_code=not pad)
    generates_alike(smaller)
    stream = open_stream(open_folder(tmp_path / "out", "out"), torch.float32, torch.device("cpu"))  # eval and inspect run none of its code
    with torch.no_grad():
        ours = torch.cat([logits for _, logits in after_blocks(stream, IDS).logits()])
        assert float((ours - smaller(IDS).logits).abs().max()) < ROUNDING
    if not pad:
        with pytest.raises((ValueError, RuntimeError, AttributeError)):
            reloaded(tmp_path / "out", trust_remote_code=False)


def test_budgets_of_parameters_and_bytes(tmp_path):
    dense = stored("llama_tied", tmp_path / "model")
    total = parameters(dense)
    unit = 2 * 3 * 32  # one channel in each of the two layers
    report = cut(tmp_path / "model", "channels", None, target_params=total - 3000)
    assert abs(report.smaller.parameters - (total - 3000)) <= unit / 2
    size = sum(p.stat().st_size for p in (tmp_path / "model").glob("*.safetensors"))
    report = cut(tmp_path / "model", "channels", None, target_size=size - 12_000, overwrite=True)
    assert abs(report.smaller.bytes - (size - 12_000)) <= 4 * unit
    assert report.smaller.bytes == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))


def test_nothing_asked_nothing_changed(tmp_path):
    stored("llama", tmp_path / "model")
    cut(tmp_path / "model", "channels", 0.0)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("pattern", "got", "said"),
    [
        ("layers", 2 / 7, "0.2857 is the nearest possible: 2 of 7 layers"),
        ("heads", 1 / 3, "0.3333 is the nearest possible: 3 of 9 heads in each layer"),
        ("kv-groups", 1 / 3, "0.3333 is the nearest possible: 1 of 3 kv-groups in each layer"),
        ("channels", 8 / 40, "0.2 is the nearest possible: 8 of 40 channels in each layer"),
        ("hidden", 16 / 72, "0.2222 is the nearest possible: 16 of 72 residual channels"),
        ("structured", None, ""),
    ],
)
def test_a_quarter_of_sizes_that_have_none(pattern, got, said, tmp_path):
    """Seven layers, nine heads in three groups: rounded to the nearest size that exists, which the first line of the plan says."""
    config = LlamaConfig(
        hidden_size=72,
        intermediate_size=40,
        num_hidden_layers=7,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=96,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    asked = {"model": str(tmp_path / "model"), "pattern": pattern, "sparsity": 0.25, "output": str(tmp_path / "out"), "accept_damage": True}
    job = prepare(read_recipe(None, asked), IDS)
    assert f"{pattern} at 0.25{f' ({said})' if said else ''} by" in str(job).splitlines()[0]
    report = run(job)
    assert report.asked == 0.25
    assert got is None or abs(report.sparsity - got) < 0.001
    assert report.sparsity > 0
    reloaded(tmp_path / "out", trust_remote_code=pattern == "structured")


@pytest.mark.parametrize(
    ("pattern", "sparsity", "options", "said"),
    [
        ("heads", 0.3, {"exact": True}, "legal sparsities: 0.5"),
        ("kv-groups", 0.3, {"exact": True}, "legal sparsities: 0.25 .3 kept., 0.5 .2 kept., 0.75"),
        ("channels", 0.3, {"exact": True}, "33.6 would be kept"),
        ("layers", 0.5, {"exact": True}, "legal sparsities"),
        ("heads", 0.2, {}, "the nearest legal number to 6.4 is all 8.*legal sparsities: 0.5"),
        ("kv-groups", 0.1, {}, "is all 4.*legal sparsities: 0.25"),
        ("layers", 0.1, {}, "0.3 of 3 blocks.*legal sparsities: 0.3333"),
        ("structured", 0.001, {}, "is the least"),
        ("structured", 0.001, {"uniform": True}, "too little to cut anything.*is the least"),
        ("structured", 0.5, {"exact": True}, "omit --exact"),
        ("channels", 0.5, {"exact": True, "allocation": "owl"}, "omit --exact"),
        ("channels", None, {"exact": True, "target_params": "30k"}, "omit --exact"),
        ("unstructured", 0.5, {"exact": True}, "structured patterns"),
        ("channels", 0.5, {"round_to": 64}, "none of the 48 can be dropped"),
        ("channels", 0.5, {"pad": True}, "omit --pad"),
        ("channels", 0.5, {"permute": True}, "omit --permute"),
        ("channels", 0.5, {"solver": "sparsegpt"}, "block_obs"),
        ("row", 0.5, {"method": "sparsegpt"}, "slab by slab"),
        ("unstructured", 0.5, {"criterion": "taylor"}, "structured patterns alone"),
        ("channels", 0.5, {"method": "sparsegpt"}, "magnitude, flap, taylor"),
        ("channels", None, {}, "add --sparsity"),
        ("structured", 0.5, {"uniform": True, "allocation": "owl"}, "omit one"),
        ("layers", 0.5, {"quality": "max"}, "leave quality out"),
        ("channels", 0.5, {"rotate": True}, "for hidden alone"),
        ("hidden", 0.5, {"skip": "mlp"}, "every matrix reads or writes"),
        ("hidden", 0.5, {"criterion": "measured"}, "magnitude"),
        ("unstructured", 0.5, {"pad": True}, "structured patterns"),
        ("unstructured", None, {"target_size": 1000}, "target-params"),
        ("unstructured", 0.5, {"solver": "block_obs"}, "structured patterns alone"),
        ("2:4", None, {"target_size": 1000}, "target-params"),
    ],
)
def test_refusals(pattern, sparsity, options, said, tmp_path):
    stored("llama", tmp_path / "model")
    with pytest.raises(RequestError) as refused:
        cut(tmp_path / "model", pattern, sparsity, **options)

    assert re.search(said, f"{refused.value.message} {refused.value.hint}")


def test_a_result_that_predicts_otherwise_is_not_published(tmp_path, monkeypatch):
    stored("llama", tmp_path / "model")
    load = Reloader.load
    monkeypatch.setattr(Reloader, "load", lambda *about: replace(found := load(*about), logits_1LV=found.logits_1LV * 1.01))
    with pytest.raises(PromiseError, match="differ"):
        cut(tmp_path / "model", "channels")
    assert not (tmp_path / "out").exists()


def test_one_head_count_that_no_config_can_say_beside_channels_that_differ(tmp_path):
    """Six heads do not divide a width of 32; as layers have configs of their own, the config of the whole model keeps its eight."""
    model = stored("llama", tmp_path / "model")
    keeps = [{"self_attn.groups": torch.tensor([0, 1, 3]), "mlp": torch.arange(40 + 2 * i)} for i in range(3)]
    save_sliced(model, tmp_path / "out", keeps)
    smaller = reloaded(tmp_path / "out", trust_remote_code=True)
    assert float((logits(smaller) - logits(masked(model, keeps))).abs().max()) < ROUNDING
    generates_alike(smaller)


class Stop(Exception):
    pass


def run_until(step: str, done: int, folder: Path, pattern: str, options: dict[str, Any]) -> None:
    """Start a run and stop it when it has reported so much of this step."""

    def progress(at: str, now: int, total: int) -> None:
        if (at, now) == (step, done):
            raise Stop

    with pytest.raises(Stop):
        cut(folder, pattern, on_progress=progress, **options)


@pytest.mark.parametrize(
    ("family", "pattern", "steps"),
    [
        ("llama", "channels", [("prune", 1), ("prune", 4)]),
        ("llama", "structured", [("trials", 1), ("prune", 2)]),
        ("olmo2", "heads", [("prune", 1)]),
        ("mixtral", "experts", [("prune", 1), ("prune", 2)]),
        ("mixtral", "channels", [("prune", 1)]),
        ("llama", "hidden", [("hidden", 2), ("prune", 2), ("prune", 4)]),
        ("llama", "layers", [("layers", 1), ("layers", 2), ("prune", 2), ("prune", 4)]),
    ],
)
def test_resumed_equals_uninterrupted(family, pattern, steps, tmp_path):
    stored(family, tmp_path / "model", **MORE.get(family, {}))
    cut(tmp_path / "model", pattern)
    (tmp_path / "out").rename(tmp_path / "whole")
    for step, done in steps:
        run_until(step, done, tmp_path / "model", pattern, {})
        assert not (tmp_path / "out").exists()
    cut(tmp_path / "model", pattern)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "whole"]


@pytest.mark.parametrize(("family", "values"), [("gpt2", {}), ("opt", {}), ("llama", {"attention_bias": True, "mlp_bias": True})])
def test_biases_make_up_for_the_means_of_what_goes(family, values, tmp_path):
    """FLAP: the outputs of a reader have the mean that they had."""
    model = stored(family, tmp_path / "model", **values)
    report = cut(tmp_path / "model", "channels", method="flap")
    smaller = reloaded(tmp_path / "out")
    space = spaces_of(model.config, 0, model.get_submodule(report.blocks[0].block), "channels")[0]
    reader = f"{report.blocks[0].block}.{space.readers[0].matrix}".removesuffix(".weight")
    means = [mean_of(m, reader) for m in (model, smaller)]
    assert torch.allclose(*means, atol=1e-5)


def mean_of(model: Any, path: str) -> Tensor:
    found = []
    hook = model.get_submodule(path).register_forward_hook(lambda module, given, out: found.append(out.flatten(0, -2).mean(0)))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("criterion", ["magnitude", "gradient"])
@pytest.mark.parametrize(("pattern", "reader", "written"), [("channels", "mlp.down_proj", "mlp"), ("kv-groups", "self_attn.o_proj", "self_attn")])
def test_a_criterion_is_summed_over_all_that_goes(criterion, pattern, reader, written, tmp_path):
    """Against autograd and a loop over the rows and columns of every unit, in the first block: the blocks before it are as they were."""
    model = stored("llama", tmp_path / "model")
    report = cut(tmp_path / "model", pattern, 0.25, criterion=criterion, solver="mask_only")
    block = model.model.layers[0]
    model.zero_grad()
    for ids_L in IDS:
        F.cross_entropy(model(ids_L[None]).logits[0, :-1], ids_L[1:], reduction="sum").backward()
    score = {n: (p * p.grad).abs() if criterion == "gradient" else p.abs() for n, p in block.named_parameters()}
    down_RC = score[f"{reader}.weight"]
    units = 4 if pattern == "kv-groups" else down_RC.shape[1]
    total_U = down_RC.sum(0).view(units, -1).sum(1)
    for name, part in score.items():
        if name.startswith(f"{written}.") and not name.startswith(reader):
            total_U = total_U + part.sum(1).view(units, -1).sum(1)
    row = next(row for row in report.rows if row.matrix.endswith(f"layers.0.{reader}.weight"))
    assert set(row.kept) == set(total_U.argsort(descending=True)[: len(row.kept)].tolist())


def test_flap_without_biases_is_refused(tmp_path):
    stored("llama", tmp_path / "model")
    with pytest.raises(RequestError, match="has no bias"):
        cut(tmp_path / "model", "channels", method="flap")


@pytest.mark.parametrize(("pattern", "dim"), [("row", 1), ("column", 0)])
def test_rows_and_columns_of_one_matrix_are_zeroed(pattern, dim, tmp_path):
    """The matrix keeps its shape, and the model its config."""
    model = stored("qwen2", tmp_path / "model")
    report = cut(tmp_path / "model", pattern, 0.25, quality="fast", allocation="uniform")
    assert report.sparsity == pytest.approx(0.25)
    pruned = reloaded(tmp_path / "out")
    assert parameters(pruned) == parameters(model)
    for row in report.rows:
        lines = (pruned.get_parameter(row.matrix) == 0).all(dim)
        assert int(lines.sum()) == len(lines) // 4


def test_layers_that_stay_make_up_for_those_that_go(tmp_path, monkeypatch):
    """On the calibration windows the repaired model is nearer to the uncut one."""
    model = stored("qwen3", tmp_path / "model", num_hidden_layers=4)
    monkeypatch.setattr(llmprune.pruners.layers, "choose_layers", lambda *about: {0: 0.0})
    apart = []
    for target in ("symmetric", None):
        report = cut(tmp_path / "model", "layers", 0.25, target=target, overwrite=True)
        with torch.no_grad():
            apart.append(float((reloaded(tmp_path / "out")(IDS).logits - model(IDS).logits).square().mean()))
    assert apart[1] < apart[0]
    assert report.smaller.layers == (1, 2, 3)
