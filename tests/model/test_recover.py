"""Recovery: the kept weights are trained, every zero stays, and the result is never worse than the start on what decides."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import save_tiny, tiny_model, tiny_windows
from faults.runs import contents
from often import often
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

import llmprune
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.data.chat import tokens_of
from llmprune.data.windows import Windows
from llmprune.errors import RequestError
from llmprune.report.stored import read_run
from llmprune.run.dense import find_dense
from llmprune.run.recovered import run_recovery
from llmprune.run.recovery import prepare_recovery
from llmprune.training.arguments import Settings, check_machine, training_arguments
from llmprune.training.data import Packs
from llmprune.training.judge import Judge, best_of, perplexity_on
from llmprune.training.lora import Adapters
from llmprune.training.losses import NOT_LEARNED, Objective
from llmprune.training.masks import Masks
from llmprune.training.parameters import Trained
from llmprune.training.request import Request
from llmprune.training.trainer import RecoveryTrainer
from llmprune.types import Listener

QUICK: dict[str, Any] = {"steps": 6, "batch": 4, "every": 2, "sequence_length": 64}
PRUNED: dict[str, dict[str, Any]] = {
    "2:4": {"pattern": "2:4", "method": "wanda"},
    "unstructured": {"sparsity": 0.7, "method": "wanda"},
    "channels": {"pattern": "channels", "sparsity": 0.4, "allocation": "sensitivity"},
}


def text(folder: Path, characters: int = 16_000) -> Path:
    path = folder / "data.txt"
    path.write_text((BUNDLED / "calibration.txt").read_text()[20_000 : 20_000 + characters])
    return path


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a result of each kind, made of the bundled model, and a text."""
    place = tmp_path_factory.mktemp("pruned")
    data = text(place)
    for name, ask in PRUNED.items():
        shared: dict[str, Any] = {"samples": 8, "sequence_length": 64, "eval": [str(data)]}
        llmprune.prune("llama", output=str(place / name.replace(":", "of")), **shared, **ask)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        yield place


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer for the tiny models: a token for each letter."""
    made = Tokenizer(WordLevel({chr(97 + n): n + 4 for n in range(26)} | {"?": 3}, unk_token="?"))
    made.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is asked to recover a tiny random model towards its dense one, in a second."""
    place = tmp_path_factory.mktemp("tiny")
    save_tiny("llama", place / "dense", torch.float32)
    letters().save_pretrained(place / "dense")
    llmprune.prune(place / "dense", 0.5, method="wanda", calibration=tiny_windows(8), output=str(place / "result"), device="cpu")
    (place / "data.txt").write_text("".join(chr(97 + i % 7 + i % 3) for i in range(4000)))
    where = {"folder": str(place / "result"), "data": str(place / "data.txt"), "dense": str(place / "dense")}
    return QUICK | {"sequence_length": 32, "learning_rate": 1e-3, "mix": 0.5} | where


def zeros(folder: Path) -> dict[str, Tensor]:
    return {name: value == 0 for name, value in load_file(folder / "model.safetensors").items()}


def nll(folder: Path, ids_NL: Tensor, learn_NL: Tensor | None = None) -> float:
    """Mean over targets, by plain transformers, a window at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    labels_NL = ids_NL if learn_NL is None else ids_NL.masked_fill(~learn_NL, NOT_LEARNED)
    total, count = 0.0, 0
    for ids_L, labels_L in zip(ids_NL, labels_NL, strict=True):
        with torch.no_grad():
            logits_LV = model(ids_L[None]).logits[0].double()
        for t in range(len(ids_L) - 1):
            if labels_L[t + 1] != NOT_LEARNED:
                total -= float(logits_LV[t].log_softmax(-1)[labels_L[t + 1]])
                count += 1
    return total / count


KINDS = [(pattern, kind) for pattern in ("2of4", "unstructured") for kind in ("all", "norms", "lora")]


@pytest.mark.parametrize(("pattern", "kind"), often(KINDS, ("2of4", "all"), ("2of4", "norms"), ("unstructured", "lora")))
def test_zeros_stay_and_the_rest_improves(pattern: str, kind: str, pruned: Path, tmp_path: Path) -> None:
    """Untouched tensors are the pruned model's bit for bit; the tied head stays tied; the record has both, pruning and recovery."""
    out = tmp_path / "out"
    rate = {"all": 1e-3, "norms": 1e-2, "lora": 5e-3}[kind]
    report = llmprune.recover(pruned / pattern, str(pruned / "data.txt"), output=str(out), parameters=kind, learning_rate=rate, **QUICK)
    (found,) = report.recovered
    assert found.best > 0
    assert found.dense == "llama"
    before, after = zeros(pruned / pattern), zeros(out)
    named = {row.matrix for row in report.rows}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name for name in before if kind != "norms" and before[name].any() and name in named} <= set(found.changed)
    was, now = load_file(pruned / pattern / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name for name in was if not torch.equal(was[name], now[name])} == set(found.changed)
    assert ("model.embed_tokens.weight" in found.changed) == (kind == "all")
    assert kind != "norms" or all(was[name].dim() == 1 for name in found.changed)
    if pattern == "2of4":
        assert all((now[name].reshape(-1, 4) != 0).sum(1).max() <= 2 for name in named)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for one in found.measured:
        assert one.after.value < one.before.value
    stored = json.loads((out / "llmprune.json").read_text())
    assert stored["recipe"] == json.loads((pruned / pattern / "llmprune.json").read_text())["recipe"]
    assert stored["recovered"][0]["best"] == found.best
    assert "## Recovery" in (out / "README.md").read_text()
    assert "recovery0" in (out / "report.html").read_text()


@pytest.mark.parametrize("kind", ["all", "lora"])
def test_a_smaller_model_is_recovered_in_its_own_shapes(kind: str, pruned: Path, tmp_path: Path) -> None:
    """Layers of different widths, whose class lies beside the weights and is not run."""
    out = tmp_path / "out"
    ask = QUICK | {"parameters": kind, "learning_rate": {"all": 1e-3, "lora": 3e-3}[kind], "held_out": str(pruned / "data.txt")}
    report = llmprune.recover(pruned / "channels", str(pruned / "data.txt"), output=str(out), **ask)
    assert json.loads((out / "config.json").read_text()) == json.loads((pruned / "channels" / "config.json").read_text())
    was, now = load_file(pruned / "channels" / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: value.shape for name, value in was.items()} == {name: value.shape for name, value in now.items()}
    assert len({value.shape for name, value in now.items() if "gate_proj" in name}) > 1
    assert report.recovered[0].best > 0
    assert report.reloaded is not None
    assert "not run" in report.reloaded.instead
    one = report.recovered[0].measured[0]
    ids = AutoTokenizer.from_pretrained(out)((pruned / "data.txt").read_text(), verbose=False)["input_ids"]
    ids_NL = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)[:32]
    assert math.log(one.after.value) == pytest.approx(nll(out, ids_NL), rel=1e-5)
    assert math.log(one.before.value) == pytest.approx(nll(pruned / "channels", ids_NL), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("ask", "left"), [({"sparsity": 0.7}, 0.5), ({"pattern": "2:4"}, 0.6)], ids=["70 %", "2:4"])
def test_defaults_recover_half_of_what_a_pruning_has_cost(ask: dict[str, Any], left: float, tmp_path: Path) -> None:
    """Of the excess over the dense model's loss, on text that neither the pruning nor the recovery has seen."""
    llmprune.prune("llama", quality="balanced", output=str(tmp_path / "pruned"), **ask)
    report = llmprune.recover(tmp_path / "pruned", "bundled-calibration", eval=["bundled-evaluation"], output=str(tmp_path / "out"))
    found = report.recovered[0].measured[-1]
    assert not found.decides
    assert found.excess is not None
    assert found.excess <= left


def wrong(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.txt"
    words = (BUNDLED / "calibration.txt").read_text()[20_000:36_000].split(" ")
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
    lines = {"shuffled": " ".join(words[i] for i in order), "repeated": "the same line over and over again.\n" * 450}
    path.write_text(lines[kind])
    return path


@pytest.mark.parametrize("kind", ["repeated", "shuffled"])
def test_wrong_data_do_no_harm(kind: str, pruned: Path, tmp_path: Path) -> None:
    """At a rate that wrecks the model: on every text that decides, one of which the data have no part in, nothing is worse than at the start."""
    out = tmp_path / "out"
    ask = QUICK | {"learning_rate": 0.05, "loss": "ce", "steps": 8}
    report = llmprune.recover(pruned / "2of4", str(wrong(kind, tmp_path)), output=str(out), **ask)
    (found,) = report.recovered
    assert [one.after.dataset for one in found.measured] == [f"{kind}.txt", "bundled text"]
    ids = AutoTokenizer.from_pretrained(out)((BUNDLED / "calibration.txt").read_text(), verbose=False)["input_ids"]
    ids_NL = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)[-32:]
    worst = max(losses[1] for _, losses in found.held_out)
    assert worst > found.held_out[0][1][1] + 0.5  # the training itself does harm
    assert nll(out, ids_NL) <= nll(pruned / "2of4", ids_NL)
    assert all(one.after.value <= one.before.value for one in found.measured)
    if not found.best:
        better = any(losses[0] < found.held_out[0][1][0] for _, losses in found.held_out[1:])
        assert better == any("every step was worse than the start on bundled text (calibration)" in note for note in found.notes)
        assert (out / "model.safetensors").read_bytes() == (pruned / "2of4" / "model.safetensors").read_bytes()
        assert found.changed == ()


def test_the_best_candidate_is_no_worse_on_any_text() -> None:
    assert best_of([2.0, 3.0], []) == -1
    assert best_of([2.0, 3.0], [[1.0, 3.1], [1.9, 2.9], [1.9, 2.95], [2.5, 1.0]]) == 1
    assert best_of([2.0, 3.0], [[2.0, 3.0], [1.0, 4.0]]) == -1  # the start wins ties


def masked_tiny() -> nn.Module:
    model = tiny_model("llama").float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))) < 0.5)
    return model


def test_adapters_merge_exactly_and_keep_the_zeros() -> None:
    """The merged model computes what the adapted one does; a control, the same adapters merged by plain addition, loses the zeros."""
    model: Any = masked_tiny()
    plain = copy.deepcopy(model)
    masks = Masks.of_zeros(model)
    before = {name: parameter.detach() == 0 for name, parameter in model.named_parameters()}
    adapters = Adapters.attach(model, dict(masks.keep), rank=4, alpha=8.0)
    ids_NL = tiny_windows(2)
    assert torch.equal(model(ids_NL).logits, plain(ids_NL).logits)  # B is zero
    with torch.no_grad():
        for factor in adapters.trained():
            factor.add_(0.1 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(1)))
    adapted_NLV = model(ids_NL).logits.detach()
    parts = {name: (a.left.detach() @ a.right.detach() * a.scale) for name, a in adapter_parts(model)}
    adapters.detach()
    assert (model(ids_NL).logits - adapted_NLV).abs().max() <= 1e-5 * adapted_NLV.abs().max()
    assert (adapted_NLV - plain(ids_NL).logits).abs().max() > 1e-2 * adapted_NLV.abs().max()
    after = {name: parameter.detach() == 0 for name, parameter in model.named_parameters()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name, parameter in model.named_parameters():
        if name in parts:
            wanted = plain.get_parameter(name) + parts[name] * ~before[name]
            assert torch.equal(parameter, wanted)
            assert ((plain.get_parameter(name) + parts[name] == 0).sum()) == 0 < before[name].sum()  # the control


def adapter_parts(model: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name.removesuffix(".0").replace("parametrizations.", ""), module)
        for name, module in model.named_modules()
        if type(module).__name__ == "Adapter"
    ]


def test_a_plain_merge_by_peft_fills_the_zeros() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (the extra test has it)")
    model: Any = masked_tiny()
    before = {name: int((parameter == 0).sum()) for name, parameter in model.named_parameters() if "proj" in name}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    merged = adapted.merge_and_unload()
    after = {name: int((merged.get_parameter(name) == 0).sum()) for name in before}
    assert all(after[name] == 0 < before[name] for name in before)


@pytest.mark.parametrize("mix", [1.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_papers(temperature: float, mix: float) -> None:
    """T^2 KL(dense / T || pruned / T) and the next token's loss, token by token in float64, over two micro-batches of one step."""
    dense, model = tiny_model("llama").float().eval(), masked_tiny().eval()
    ids_NL = tiny_windows(4)
    labels_NL = ids_NL.masked_fill(torch.rand(ids_NL.shape, generator=torch.Generator().manual_seed(2)) < 0.3, NOT_LEARNED)
    count = int((labels_NL[:, 1:] != NOT_LEARNED).sum())
    objective = Objective("kd", dense, temperature, mix)
    got = sum(objective(model, ids_NL[k : k + 2], labels_NL[k : k + 2], count).item() for k in (0, 2))
    wanted = 0.0
    with torch.no_grad():
        theirs_NLV, ours_NLV = dense(ids_NL).logits.double(), model(ids_NL).logits.double()
    for n, labels_L in enumerate(labels_NL):
        for t in range(len(labels_L) - 1):
            if labels_L[t + 1] != NOT_LEARNED:
                p, q = (torch.softmax(z[n, t] / temperature, -1) for z in (theirs_NLV, ours_NLV))
                apart = float((p * (p / q).log()).sum()) * temperature**2
                wanted += mix * apart - (1 - mix) * float(torch.log_softmax(ours_NLV[n, t], -1)[labels_L[t + 1]])
    assert got == pytest.approx(wanted / count, rel=1e-5)


def test_ce_is_transformers_own_loss() -> None:
    model, ids_NL = masked_tiny().eval(), tiny_windows(3)
    labels_NL = ids_NL.masked_fill(torch.rand(ids_NL.shape, generator=torch.Generator().manual_seed(3)) < 0.3, NOT_LEARNED)
    got = Objective("ce")(model, ids_NL, labels_NL)
    assert float(got) == pytest.approx(float(model(input_ids=ids_NL, labels=labels_NL).loss), rel=1e-6)


def test_blocks_is_the_relative_error_of_hidden_states() -> None:
    dense, model, ids_NL = tiny_model("llama").float().eval(), masked_tiny().eval(), tiny_windows(2)
    got = Objective("blocks", dense)(model, ids_NL, ids_NL)
    with torch.no_grad():
        theirs, ours = (m(ids_NL, output_hidden_states=True).hidden_states[1:] for m in (dense, model))
    wanted = sum(float(((a - b).double() ** 2).sum() / (b.double() ** 2).sum()) for a, b in zip(ours, theirs, strict=True)) / len(ours)
    assert float(got) == pytest.approx(wanted, rel=1e-5)


class Count(TrainerCallback):
    """Sees that the masks hold after every step."""

    def __init__(self, masks: Masks) -> None:
        self.masks, self.steps = masks, 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.masks.check(model)
        self.steps += 1


@pytest.mark.parametrize("masked", [False, True])
def test_without_masks_a_step_is_that_of_transformers_trainer(masked: bool, tmp_path: Path) -> None:
    """The same arguments, data and order of windows: the same weights; with masks, those of a Trainer whose loop sets them to zero."""
    ours, theirs = (masked_tiny() for _ in range(2))
    masks = Masks.of_zeros(ours) if masked else Masks({})
    data = Packs(Windows(tiny_windows(8), "tiny", "all"))
    settings = Settings(steps=5, batch=4, learning_rate=1e-2, every=5, patience=9, seed=3, length=data.windows.ids_NL.shape[1])
    args = training_arguments(settings, tmp_path / "ours", torch.device("cpu"))
    args.per_device_train_batch_size, args.gradient_accumulation_steps, args.eval_strategy = 2, 2, "no"
    count = Count(masks)
    trained = Trained(ours, masks, "all", lambda name: torch.float32)
    RecoveryTrainer(trained, Objective("ce"), Judge((data,)), data, args, [count]).train()
    assert count.steps == 5

    class Zero(TrainerCallback):
        """The naive way: gradients before the clipping, weights after the step."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            masks.apply(model)

    for name, keep in masks.keep.items():
        theirs.get_parameter(name).register_hook(lambda gradient, keep=keep: gradient * keep)
    args = training_arguments(settings, tmp_path / "theirs", torch.device("cpu"))
    args.per_device_train_batch_size, args.gradient_accumulation_steps, args.eval_strategy = 2, 2, "no"
    Trainer(theirs, args, train_dataset=data, callbacks=[Zero()]).train()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


class Stop(Exception):
    pass


def stopped_at(step: int, out: Path, **ask: Any) -> None:
    def progress(at: str, done: int, total: int) -> None:
        if (at, done) == ("recover", step):
            raise Stop

    with pytest.raises(Stop):
        run_recovery(prepare_recovery(Request(output=str(out), **ask)), Listener(progress=progress))
    assert not out.exists()


@pytest.mark.parametrize("kind", ["all", "lora"])
def test_interrupted_ends_as_uninterrupted(kind: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    """Stopped before the first checkpoint, after one, after a damaged one, and after the last step."""
    ask = tiny | {"parameters": kind}
    whole = tmp_path / "whole" / "out"
    llmprune.recover(**ask, output=str(whole))
    out = tmp_path / "out"
    stopped_at(1, out, **ask)
    stopped_at(3, out, **ask)
    stopped_at(5, out, **ask)
    checkpoints = tmp_path / "out.partial" / "checkpoints"
    assert (checkpoints / "checkpoint-4").is_dir()
    with open(checkpoints / "checkpoint-4" / "optimizer.pt", "r+b") as file:
        file.write(b"broken")
    stopped_at(6, out, **ask)
    report = llmprune.recover(**ask, output=str(out))
    assert report.recovered[0].best > 0
    assert contents(out) == contents(whole)
    assert not (tmp_path / "out.partial").exists()


class Crash(BaseException):
    """The end of a process, wherever it is."""


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_crash_at_any_write_ends_as_uninterrupted(every: int, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file that is written whole is not written once, and the process ends there; from then on the command is repeated."""
    ask = tiny
    whole = tmp_path / "whole" / "out"
    writes: list[str] = []
    crash_at = 10**9
    plain = os.replace

    def counted(source: Any, target: Any) -> None:
        writes.append(Path(target).name)
        if len(writes) == crash_at:
            raise Crash
        plain(source, target)

    monkeypatch.setattr(os, "replace", counted)
    llmprune.recover(**ask, output=str(whole))
    names, out = list(writes), tmp_path / "out"
    assert {"identity.json", "start.json", "best.json", "saved.json", "trained.json", "llmprune.json"} <= set(names)
    for number in range(2, len(names) + 1, every):  # the first is the identity: its lock would end with the process
        writes.clear()
        crash_at = number
        with pytest.raises(Crash):
            llmprune.recover(**ask, output=str(out))
        crash_at = 10**9
        assert not out.exists()
        llmprune.recover(**ask, output=str(out))
        assert contents(out) == contents(whole), names[number - 1]
        assert not (tmp_path / "out.partial").exists()
        shutil.rmtree(out)


def test_a_recovered_model_is_recovered_again(tiny: dict[str, Any], tmp_path: Path) -> None:
    """The record has both; the card one section about them."""
    llmprune.recover(**tiny, output=str(tmp_path / "once"))
    report = llmprune.recover(**tiny | {"folder": str(tmp_path / "once")}, output=str(tmp_path / "twice"))
    assert len(report.recovered) == 2
    assert read_run(tmp_path / "twice") == report
    assert (tmp_path / "twice" / "README.md").read_text().count("## Recovery") == 1
    assert zeros(Path(tiny["folder"])).keys() == zeros(tmp_path / "twice").keys()


def test_shards_and_companions_stay_as_they_are(tiny: dict[str, Any], tmp_path: Path) -> None:
    """The same files with the same headers, the same index; whatever lies beside the weights comes along."""
    result = tmp_path / "result"
    dense = AutoModelForCausalLM.from_pretrained(tiny["dense"])
    dense.save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    letters().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "LICENSE").write_text("As you like.")
    llmprune.prune(tmp_path / "dense", 0.5, method="wanda", calibration=tiny_windows(8), output=str(result), device="cpu")
    report = llmprune.recover(**tiny | {"folder": str(result), "parameters": "norms", "learning_rate": 0.01}, output=str(tmp_path / "out"))
    shards = sorted(path.name for path in result.glob("*.safetensors"))
    assert len(shards) > 2
    names = {path.name for path in result.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    changed = {
        "README.md",
        "report.html",
        "llmprune.json",
        *(name for name in shards if parts_of(result / name) != parts_of(tmp_path / "out" / name)),
    }
    assert all((tmp_path / "out" / name).read_bytes() == (result / name).read_bytes() for name in names - changed)
    assert report.recovered[0].changed
    for name in shards:
        was, now = parts_of(result / name), parts_of(tmp_path / "out" / name)
        assert was.keys() == now.keys()
        assert {key for key in was if was[key] != now[key]} == set(report.recovered[0].changed) & was.keys()


def parts_of(file: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in load_file(file).items()}


def test_another_request_does_not_resume(tiny: dict[str, Any], tmp_path: Path) -> None:
    ask = tiny
    stopped_at(3, tmp_path / "out", **ask)
    with pytest.raises(RequestError, match="started with another request: seed"):
        llmprune.recover(**ask, output=str(tmp_path / "out"), seed=1)
    llmprune.recover(**ask, output=str(tmp_path / "out"), seed=1, restart=True)


def test_it_stops_when_nothing_improves(tiny: dict[str, Any], tmp_path: Path) -> None:
    ask = tiny | {"steps": 20, "every": 1, "patience": 2, "learning_rate": 5.0}
    report = llmprune.recover(**ask, output=str(tmp_path / "out"))
    (found,) = report.recovered
    assert found.best == 0
    assert found.done == 2
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (Path(tiny["folder"]) / "model.safetensors").read_bytes()


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>\n{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
DIALOGUE = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "How long is the river?"},
    {"role": "assistant", "content": "It is long."},
    {"role": "user", "content": "And how deep?"},
    {"role": "assistant", "content": "Nobody knows how deep it is, for nobody has been there."},
]


def test_only_the_assistants_tokens_are_learned() -> None:
    """As transformers' own mask of a template that marks what is generated."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "llama")
    tokenizer.chat_template = TEMPLATE
    ids, learn = tokens_of(DIALOGUE, tokenizer, "row 1")
    wanted = tokenizer.apply_chat_template(DIALOGUE, return_assistant_tokens_mask=True, return_dict=True)
    assert ids == wanted["input_ids"]
    assert learn == [bool(one) for one in wanted["assistant_masks"]]
    assert 0 < sum(learn) < len(learn)


def with_template(folder: Path, to: Path, template: str = TEMPLATE) -> Path:
    """A copy of a result whose tokenizer has a chat template, and which says so."""
    shutil.copytree(folder, to)
    (to / "chat_template.jinja").write_text(template)
    return to


def test_dialogues_are_packed_and_learned_in_part(pruned: Path, tmp_path: Path) -> None:
    words = (pruned / "data.txt").read_text().split(". ")
    rows = [[*DIALOGUE[:2], {"role": "assistant", "content": one}] for one in words[:30]]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    result = with_template(pruned / "2of4", tmp_path / "result")
    report = llmprune.recover(result, str(tmp_path / "chat.jsonl"), output=str(tmp_path / "out"), learning_rate=1e-3, **QUICK)
    (found,) = report.recovered
    assert 0 < found.learned < found.data.tokens
    tokenizer = AutoTokenizer.from_pretrained(result)
    encoded = [tokenizer.apply_chat_template(row, return_assistant_tokens_mask=True, return_dict=True) for row in rows]
    ids = [i for row in encoded for i in row["input_ids"]]
    learn = [bool(m) for row in encoded for m in row["assistant_masks"]]
    count = len(ids) // 64
    ids_NL, learn_NL = (torch.tensor(x[: count * 64]).view(count, 64) for x in (ids, learn))
    held = min(32, count // 8)
    train_NL, held_NL = learn_NL[: count - held, 1:], learn_NL[count - held :, 1:]
    assert found.learned == int(train_NL.sum())
    one = found.measured[0]
    assert one.after.tokens == int(held_NL.sum())
    some_N = held_NL.any(1)
    wanted = nll(tmp_path / "out", ids_NL[count - held :][some_N], learn_NL[count - held :][some_N])
    assert math.log(one.after.value) == pytest.approx(wanted, rel=1e-5)


def test_perplexity_is_of_the_tokens_that_are_learned() -> None:
    model, ids_NL = masked_tiny().eval(), tiny_windows(3)
    learn_NL = torch.rand(ids_NL.shape, generator=torch.Generator().manual_seed(4)) < 0.4
    found = perplexity_on(model, Packs(Windows(ids_NL, "tiny", "all"), learn_NL))
    with torch.no_grad():
        logits_NLV = model(ids_NL).logits
    wanted = F.cross_entropy(logits_NLV[:, :-1][learn_NL[:, 1:]].double(), ids_NL[:, 1:][learn_NL[:, 1:]])
    assert math.log(found.value) == pytest.approx(float(wanted), rel=1e-5)
    assert found.tokens == int(learn_NL[:, 1:].sum())


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss", "qwen3_next"])
def test_other_families(family: str, pruned: Path, tmp_path: Path) -> None:
    """Names that are converted, stacked experts, convolutions: the zeros stay, and the result loads as what was trained."""
    save_tiny(family, tmp_path / "dense", torch.float32)
    letters().save_pretrained(tmp_path / "dense")
    llmprune.prune(tmp_path / "dense", 0.5, method="wanda", calibration=tiny_windows(8), output=str(tmp_path / "result"), device="cpu")
    (tmp_path / "data.txt").write_text("".join(chr(97 + i % 7) for i in range(6000)))
    ask = QUICK | {"sequence_length": 32, "learning_rate": 1e-3, "loss": "ce"}
    report = llmprune.recover(tmp_path / "result", str(tmp_path / "data.txt"), output=str(tmp_path / "out"), **ask)
    assert report.recovered[0].best > 0
    before, after = zeros(tmp_path / "result"), zeros(tmp_path / "out")
    pruned_names = [name for name in before if before[name].float().mean() > 0.4]
    assert len(pruned_names) > 4
    assert all(torch.equal(before[name], after[name]) for name in pruned_names)
    assert report.reloaded is not None
    assert report.reloaded.instead == ""


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"data": ""}, "no data to train on"),
    ({"data": "nowhere.txt"}, "no such file"),
    ({"steps": 0}, "steps 0: not a whole number above 0"),
    ({"parameters": "nrms"}, "did you mean 'norms'"),
    ({"loss": "kld"}, "did you mean 'kd'"),
    ({"batch": 500}, "a step takes 500"),
    ({"sequence_length": 5000}, "the model has 512 positions"),
    ({"sequence_length": 512, "data": "short.txt"}, "less than one window"),
    ({"rank": 8}, "rank or alpha with parameters all"),
    ({"mix": 1.5}, "not between 0 and 1"),
    ({"loss": "ce", "dense": "llama"}, "which does not use it"),
    ({"dense": "other"}, "a vocabulary of 96, the pruned model's has 2,048"),
    ({"dense": "longer"}, "in the pruned model"),
    ({"dense": "reordered"}, "its tokenizer differs"),
    ({"folder": "llama"}, "holds no llmprune.json"),
    ({"folder": "nowhere"}, "no such folder"),
    ({"arguments": {"max_step": 3}}, "did you mean 'max_steps'"),
    ({"arguments": {"max_steps": 3}}, "is set by the option steps"),
    ({"arguments": {"load_best_model_at_end": True}}, "cannot be chosen"),
    ({"arguments": {"per_device_train_batch_size": 3}}, "does not divide the batch of 4"),
    ({"data": "chat.jsonl"}, "the tokenizer has no chat template"),
    ({"output": "2of4"}, "is the source model"),
    ({"output": "unstructured"}, "exists already"),
]


@pytest.mark.parametrize(("ask", "says"), REFUSED, ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_refused(ask: dict[str, Any], says: str, pruned: Path, tmp_path: Path) -> None:
    """In one line, with nothing written."""
    others(pruned)
    there = sorted(path.name for path in pruned.iterdir())
    given = QUICK | {"folder": "2of4", "data": "data.txt", "output": "out"} | ask
    with pytest.raises(RequestError) as refused:
        llmprune.recover(**given)
    assert says in f"{refused.value.message} {refused.value.hint}"
    assert "\n" not in refused.value.message
    assert sorted(path.name for path in pruned.iterdir()) == there


def others(place: Path) -> None:
    """Dense models that are not the one, and texts that are none."""
    if (place / "short.txt").exists():
        return
    (place / "chat.jsonl").write_text(json.dumps({"messages": DIALOGUE}))
    save_tiny("llama", place / "other", torch.float32)
    for name in ("longer", "reordered"):
        shutil.copytree(BUNDLED / "llama", place / name)
    for file in (BUNDLED / "llama").glob("tokenizer*"):
        shutil.copy(file, place / "other")
    words = json.loads((place / "reordered" / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    a, b = (next(word for word, number in vocabulary.items() if number == n) for n in (300, 301))
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (place / "reordered" / "tokenizer.json").write_text(json.dumps(words))
    model = AutoModelForCausalLM.from_pretrained(BUNDLED / "llama", num_hidden_layers=7)
    model.save_pretrained(place / "longer")
    (place / "short.txt").write_text("A few words.")


def test_a_machine_that_it_cannot_use_is_refused() -> None:
    check_machine(torch.device("cuda:0"), 1)
    check_machine(torch.device("cpu"), 1)
    with pytest.raises(RequestError, match="runs on the first GPU"):
        check_machine(torch.device("cuda:1"), 1)
    with pytest.raises(RequestError, match="recover in 2 processes"):
        check_machine(torch.device("cpu"), 2)


def test_masks_that_do_not_fit_are_refused(pruned: Path, tmp_path: Path) -> None:
    """A record of more zeros than the weights have; the folder says no more than its record."""
    shutil.copytree(pruned / "2of4", tmp_path / "result")
    stored = json.loads((tmp_path / "result" / "llmprune.json").read_text())
    stored["blocks"][0]["rows"][0]["zeros"] += 5
    (tmp_path / "result" / "llmprune.json").write_text(json.dumps(stored))
    with pytest.raises(RequestError, match="are not the weights that"):
        llmprune.recover(tmp_path / "result", str(pruned / "data.txt"), output=str(tmp_path / "out"), **QUICK)
    assert not (tmp_path / "out.partial").exists()


def test_a_quantised_model_is_refused(pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned / "2of4", tmp_path / "result")
    config = json.loads((tmp_path / "result" / "config.json").read_text())
    (tmp_path / "result" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(RequestError, match="already quantised"):
        llmprune.recover(tmp_path / "result", str(pruned / "data.txt"), output=str(tmp_path / "out"), **QUICK)


def test_without_the_dense_model_it_says_so(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not found, or no room for it: the next token is learned; a loss that needs it is refused."""
    monkeypatch.setattr("llmprune.run.recovery.find_dense", lambda report, folder: None)
    ask = Request(str(pruned / "2of4"), str(pruned / "data.txt"), output=str(tmp_path / "out"), **QUICK)
    job = prepare_recovery(ask)
    assert job.loss == "ce"
    assert "the dense model llama is not at hand: trained towards the next token" in str(job)
    with pytest.raises(RequestError, match="is not at hand"):
        prepare_recovery(Request(str(pruned / "2of4"), str(pruned / "data.txt"), output=str(tmp_path / "out"), loss="kd", **QUICK))
    monkeypatch.undo()
    own = 24 * 1_837_184 + 4 * 64 * 2048 * 24
    monkeypatch.setattr("llmprune.run.recovery.memory_of", lambda device: own + 1000)
    assert prepare_recovery(ask).loss == "ce"
    monkeypatch.setattr("llmprune.run.recovery.memory_of", lambda device: 1000)
    with pytest.raises(RequestError, match="training takes about"):
        prepare_recovery(ask)


@pytest.mark.parametrize("where", ["here", "beside", "cache"])
def test_the_dense_model_is_found_again_by_its_hashes(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the current folder, beside the result, or in the Hub's cache; another model of its name is not taken for it."""
    commit = "0" * 40
    cache = tmp_path / "cache" / "models--me--tiny" / "snapshots" / commit
    place = {"here": tmp_path / "cwd" / "tiny", "beside": tmp_path / "results" / "tiny", "cache": cache}[where]
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    save_tiny("llama", place, torch.float32)
    result = tmp_path / "results" / "pruned"
    llmprune.prune(place, 0.5, method="wanda", calibration=tiny_windows(4), output=str(result), device="cpu")
    report = read_run(result)
    if where == "cache":
        origin = replace(report.source, name="me/tiny", revision=commit)
        report = replace(report, source=origin, recipe=report.recipe | {"model": "me/tiny"})
    found = find_dense(report, result)
    assert found is not None
    assert found.hashes == report.source.files
    weights = place / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert find_dense(report, result) is None
    shutil.rmtree(place)
    assert find_dense(report, result) is None


def test_users_arguments_and_callbacks_reach_the_trainer(pruned: Path, tmp_path: Path) -> None:
    seen: list[TrainingArguments] = []

    class Look(TrainerCallback):
        def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
            seen.append(args)

    arguments = {"optim": "adafactor", "lr_scheduler_type": "linear", "per_device_train_batch_size": 2, "weight_decay": 0.1, "bf16": True}
    ask = QUICK | {"arguments": arguments, "callbacks": [Look()], "learning_rate": 1e-3}
    report = llmprune.recover(pruned / "2of4", str(pruned / "data.txt"), output=str(tmp_path / "out"), **ask)
    assert report.recovered[0].best > 0
    assert (seen[0].optim, seen[0].lr_scheduler_type, seen[0].gradient_accumulation_steps) == ("adafactor", "linear", 2)
    assert report.recovered[0].request["arguments"] == {name: str(value) for name, value in arguments.items()}
    before, after = zeros(pruned / "2of4"), zeros(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
