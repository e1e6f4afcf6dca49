"""Masks that change during training: by a plain loop and by transformers' Trainer, against the same trainings with masks written out by hand."""

from __future__ import annotations

import math
import os
import shutil
import signal
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from families import save_tiny, tiny_model, tiny_windows
from often import often
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llmprune.checkpoint.resolve import BUNDLED
from llmprune.errors import PromiseError, RequestError
from llmprune.maths.soft_top_k import soft_top_k, through_soft_top_k
from llmprune.patterns.nm import NM
from llmprune.training.callback import SparsityCallback
from llmprune.training.masks import Masks
from llmprune.training.regularisation import RegularisationCallback
from llmprune.training.schedules import Schedule, cosine, cubic
from llmprune.training.sparsifier import Sparsifier

SOFT: dict[str, dict[str, Any]] = {
    "soft": {"method": "soft", "sparsity": 0.7, "start": 2, "end": 18},
    "soft 2:4": {"method": "soft", "pattern": "2:4", "end": 16},
}
IDS_NL = tiny_windows(16)
STEPS = 24
SCHEDULES: dict[str, dict[str, Any]] = {
    "gradual": {"method": "gradual", "sparsity": 0.7, "start": 2, "end": 17, "every": 4},
    "gradual 2:4": {"method": "gradual", "pattern": "2:4", "end": 12, "every": 3},
    "movement": {"method": "movement", "sparsity": 0.6, "start": 3, "end": 18, "every": 5},
    "rigl": {"method": "rigl", "sparsity": 0.8, "end": 20, "every": 4},
    "rigl 2:4": {"method": "rigl", "pattern": "2:4", "end": 20, "every": 4, "regrow": 0.5},
    "constant": {"method": "constant", "sparsity": 0.5},
}


# by hand


class ByHand:
    """The methods as their papers' equations read, with lists and loops; one matrix is one parameter (Llama)."""

    def __init__(self, model: Any, asked: dict[str, Any]) -> None:
        self.asked, self.t = asked, 0
        self.weights = {n: p for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n}
        self.masked: dict[str, list[bool]] = {n: [False] * p.numel() for n, p in self.weights.items()}
        self.scores = {n: torch.zeros_like(p) for n, p in self.weights.items()}
        self.seen: dict[str, Tensor] = {}
        if asked["method"] in ("rigl", "constant"):
            self.mask_more(1.0)
        self.zero()

    def due(self, t: int) -> bool:
        if self.asked["method"] == "constant":
            return False
        start, end = self.asked.get("start", 0), self.asked["end"]
        return t in [*range(start, end, self.asked["every"]), end]

    def progress(self) -> float:
        start, end = self.asked.get("start", 0), self.asked["end"]
        return (self.t - start) / (end - start)

    def kept(self, name: str) -> Tensor:
        return ~torch.tensor(self.masked[name]).view(self.weights[name].shape)

    def zero(self) -> None:
        for name, p in self.weights.items():
            p.data[~self.kept(name)] = 0

    def after_backward(self) -> None:
        for name, p in self.weights.items():
            keep = self.kept(name)
            earlier = self.seen.get(name, torch.zeros_like(p))
            self.seen[name] = torch.where(keep, p.grad, earlier + p.grad)  # dense, as far as rigl is concerned
            p.grad[~keep] = 0

    def before_step(self, optimizer: Any) -> None:
        for name, p in self.weights.items():
            self.scores[name] -= optimizer.param_groups[0]["lr"] * (p.data * p.grad)

    def after_step(self, optimizer: Any) -> None:
        self.t += 1
        for _ in range(2 if self.due(self.t) else 1):
            for name, p in self.weights.items():
                for value in (p.data, *optimizer.state[p].values()):
                    if value.shape == p.shape:
                        value[~self.kept(name)] = 0
            if self.due(self.t):
                self.exchange() if self.asked["method"] == "rigl" else self.mask_more(self.progress())
        for name, p in self.weights.items() if self.due(self.t) else ():
            for value in (p.data, *optimizer.state[p].values()):
                if value.shape == p.shape:
                    value[~self.kept(name)] = 0
        self.seen = {}

    def mask_more(self, progress: float) -> None:
        goal = 0.5 if self.asked.get("pattern") == "2:4" else self.asked["sparsity"]
        for name, p in self.weights.items():
            score = (self.scores[name] if self.asked["method"] == "movement" else p.data.abs()).flatten().tolist()
            masked = self.masked[name]
            order = sorted(range(len(score)), key=lambda i: (not masked[i], score[i], i))
            if self.asked.get("pattern") == "2:4":
                place = {i: at for at, i in enumerate(order)}
                free = {i for g in range(0, len(score), 4) for i in sorted(range(g, g + 4), key=place.__getitem__)[:2]}
                order = [i for i in order if i in free]
            count = round(round(goal * len(score)) * (1 - (1 - progress) ** 3))
            self.masked[name] = [False] * len(score)
            for i in order[:count]:
                self.masked[name][i] = True

    def exchange(self) -> None:
        share = self.asked.get("regrow", 0.3) / 2 * (1 + math.cos(math.pi * self.progress()))
        for name, p in self.weights.items():
            weight, gradient, masked = p.data.abs().flatten().tolist(), self.seen[name].abs().flatten().tolist(), self.masked[name]
            active = sorted((i for i in range(len(weight)) if not masked[i]), key=lambda i: (weight[i], i))
            dropped = active[: int(share * len(active))]
            stays = set(active) - set(dropped)
            grown = sorted((i for i in range(len(weight)) if i not in stays), key=lambda i: (-gradient[i], -i))
            if self.asked.get("pattern") == "2:4":
                for i in grown:
                    group = range(i - i % 4, i - i % 4 + 4)
                    if sum(j in stays for j in group) < 2:
                        stays.add(i)
            else:
                stays |= set(grown[: len(dropped)])
            self.masked[name] = [i not in stays for i in range(len(weight))]


def loss_of(model: Any, ids_NL: Tensor) -> Tensor:
    return model(input_ids=ids_NL, labels=ids_NL).loss


def adamw(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)


def same(ours: Any, theirs: Any) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", often(SCHEDULES, "gradual 2:4", "movement", "rigl"))
def test_a_plain_loop_is_the_loop_by_hand(name: str) -> None:
    """Bit for bit, with clipping and gradients of two micro-batches; and the zeros are exact after every step."""
    asked = SCHEDULES[name]
    ours, theirs = tiny_model("llama"), tiny_model("llama")
    optimizer, plain = adamw(ours), adamw(theirs)
    sparsify, by_hand = Sparsifier(ours, optimizer, **asked), ByHand(theirs, asked)
    changes = 0
    for step in range(STEPS):
        for micro in range(2):
            at = (2 * step + micro) % 16
            (loss_of(ours, IDS_NL[at : at + 1]) / 2).backward()
            (loss_of(theirs, IDS_NL[at : at + 1]) / 2).backward()
            by_hand.after_backward()
        for model in (ours, theirs):
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        before = sparsify.masks.keep
        by_hand.before_step(plain)
        optimizer.step()
        plain.step()
        sparsify.step()
        by_hand.after_step(plain)
        changes += any(not torch.equal(before[n], keep) for n, keep in sparsify.masks.keep.items())
        optimizer.zero_grad()
        plain.zero_grad()
        for n, keep in sparsify.masks.keep.items():
            assert torch.equal(keep, by_hand.kept(n)), (step, n)
        same(ours, theirs)
        sparsify.masks.check(ours)
    goal = 0.5 if "pattern" in asked else asked["sparsity"]
    for n, keep in sparsify.masks.keep.items():
        assert int((~keep).sum()) == round(goal * keep.numel()), n
    assert sparsify.masks.holds(ours, 2, 4) == ("pattern" in asked)
    assert changes == {"gradual": 4, "gradual 2:4": 4, "movement": 3, "rigl": 4, "rigl 2:4": 4, "constant": 0}[name]


# soft top-k


def soft_mask(value_W: list[float], kept: float, sharpness: float) -> list[float]:
    """sigmoid(beta v + mu) that sums to k, by bisection in float64."""
    low, high = -1e4, 1e4
    for _ in range(200):
        mu = (low + high) / 2
        mask = [1 / (1 + math.exp(min(700.0, -sharpness * v - mu))) for v in value_W]
        low, high = (mu, high) if sum(mask) < kept else (low, mu)
    return mask


@pytest.mark.parametrize("sharpness", [1.0, 20.0, 500.0])
@pytest.mark.parametrize("kept", [0.5, 2.0, 7.3, 11.0])
def test_soft_masks_are_those_of_a_bisection(kept: float, sharpness: float) -> None:
    value_GW = torch.rand(6, 12, generator=torch.Generator().manual_seed(2))
    value_GW[0] = 0.25  # all equal
    found = soft_top_k(value_GW, kept, sharpness)
    for row, mask in zip(value_GW.tolist(), found, strict=True):
        torch.testing.assert_close(mask, torch.tensor(soft_mask(row, kept, sharpness)), rtol=0, atol=5e-4 if sharpness > 100 else 1e-5)
    assert torch.equal(soft_top_k(value_GW, 12.0, sharpness), torch.ones(6, 12))


def test_very_sharp_soft_masks_are_hard() -> None:
    value_GW = torch.rand(1, 1000, generator=torch.Generator().manual_seed(3))
    mask_GW = soft_top_k(value_GW, 300, 1e6)
    assert set(mask_GW[0].topk(290).indices.tolist()) < set(value_GW[0].topk(300).indices.tolist())
    assert float(mask_GW[0].sort().values[:690].max()) < 1e-3


def test_the_gradient_of_a_soft_mask_is_that_of_differences() -> None:
    """Of sum a w m(|w|), in float64, weight by weight."""
    draw = torch.Generator().manual_seed(4)
    weight, a = torch.randn(10, generator=draw).tolist(), torch.randn(10, generator=draw).tolist()
    scale, sharpness, kept, step = 0.8, 3.0, 4.0, 1e-5

    def value(w: list[float]) -> float:
        mask = soft_mask([abs(x) / scale for x in w], kept, sharpness)
        return sum(p * x * m for p, x, m in zip(a, w, mask, strict=True))

    expected = []
    for i in range(10):
        up, down = ([x + (j == i) * sign * step for j, x in enumerate(weight)] for sign in (1, -1))
        expected.append((value(up) - value(down)) / (2 * step))
    weight_GW = torch.tensor([weight])
    mask_GW = soft_top_k(weight_GW.abs() / scale, kept, sharpness)
    found = through_soft_top_k(torch.tensor([a]), weight_GW, mask_GW, scale, sharpness)
    torch.testing.assert_close(found[0], torch.tensor(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", often(SOFT, "soft 2:4"))
def test_soft_training_is_that_of_dense_weights_behind_masks(name: str) -> None:
    """By autograd through a model whose matrices are functions of the dense ones: the mask's level is one Newton step from a bisection's, which has
    its exact derivative.
    """
    asked, model, theirs = SOFT[name], tiny_model("llama"), tiny_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsify = Sparsifier(model, optimizer, **asked)
    dense = {n: p.detach().clone().requires_grad_() for n, p in theirs.named_parameters()}
    plain = torch.optim.SGD(dense.values(), lr=0.05, momentum=0.9)
    start, end, pair = asked.get("start", 0), asked["end"], "pattern" in asked

    def shown(t: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        weights, hard = dict(dense), {}
        for n, w in dense.items():
            if w.dim() == 2 and "layers" in n and t >= start:
                progress = (t - start) / (end - start)
                drop = round(min(1.0, 4 * progress) * round((0.5 if pair else asked["sparsity"]) * w.numel()))
                beta = 1 + 19 * progress
                value = (w.abs() / w.detach().square().mean().sqrt()).view(-1, 4 if pair else w.numel())
                kept = (1 - drop / w.numel()) * value.shape[1]
                mask = torch.ones_like(value)
                if drop:
                    low, high = (torch.full((len(value), 1), 1e3 * sign) for sign in (-1, 1))
                    for _ in range(60):
                        mu = (low + high) / 2
                        less = torch.sigmoid(beta * value.detach() + mu).sum(1, keepdim=True) < kept
                        low, high = torch.where(less, mu, low), torch.where(less, high, mu)
                    at = torch.sigmoid(beta * value.detach() + mu)
                    mu = mu - (torch.sigmoid(beta * value + mu).sum(1, keepdim=True) - kept) / (at * (1 - at)).sum(1, keepdim=True)
                    mask = torch.sigmoid(beta * value + mu)
                free = value.detach().argsort(1).argsort(1) < 2 if pair else torch.ones_like(value, dtype=torch.bool)
                last = value.detach().masked_fill(~free, torch.inf).flatten().sort().values
                hard[n] = (value.detach() >= (last[drop] if drop < len(last) else torch.inf)) | ~free
                hard[n] = hard[n].view(w.shape)
                soft = w * mask.view(w.shape)
                weights[n] = soft + (soft * hard[n] - soft).detach()
        return weights, hard

    for step in range(end):
        weights, hard = shown(step)
        for n, keep in hard.items():
            assert torch.equal(keep, sparsify.masks.keep[n]), (step, n)
            torch.testing.assert_close(model.get_parameter(n).detach(), weights[n].detach(), rtol=1e-3, atol=1e-4, msg=f"{step} {n}")
        ids = IDS_NL[step % 16 : step % 16 + 1]
        torch.func.functional_call(theirs, weights, (), {"input_ids": ids, "labels": ids}).loss.backward()
        loss_of(model, ids).backward()
        for one in (optimizer, plain):
            one.step()
            one.zero_grad()
        sparsify.step()
        sparsify.masks.check(model)
    goal = 0.5 if pair else asked["sparsity"]
    assert all(int((~keep).sum()) == round(goal * keep.numel()) for keep in sparsify.masks.keep.values())
    assert sparsify.masks.holds(model, 2, 4) == pair
    before = sparsify.masks.keep
    for _ in range(3):  # from now on they stay
        loss_of(model, IDS_NL[:2]).backward()
        optimizer.step()
        sparsify.step()
        sparsify.masks.check(model)
    assert all(torch.equal(keep, sparsify.masks.keep[n]) for n, keep in before.items())


# transformers' Trainer


def arguments(folder: Path, **values: Any) -> TrainingArguments:
    chosen: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    chosen |= {"learning_rate": 3e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, "warmup_steps": 4, "report_to": [], "use_cpu": True}
    return TrainingArguments(output_dir=str(folder), disable_tqdm=True, logging_steps=4, seed=3, **(chosen | values))


DATA = [{"input_ids": ids, "labels": ids} for ids in IDS_NL]


class TrainerByHand(Trainer):
    """A training without the callback, whose masks are applied by hand."""

    by_hand: ByHand

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.by_hand.after_backward()
        return loss


class AroundSteps(TrainerCallback):
    def __init__(self, by_hand: ByHand) -> None:
        self.by_hand = by_hand

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        self.by_hand.before_step(optimizer)

    def on_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        self.by_hand.after_step(optimizer)


class Checked(TrainerCallback):
    """The zeros after every optimizer step, and at its end."""

    def __init__(self, ours: SparsityCallback) -> None:
        self.ours, self.steps, self.sparsities = ours, 0, []

    def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        assert self.ours.masks is not None
        self.ours.masks.check(model)
        self.steps += 1
        self.sparsities.append(self.ours.masks.sparsity)


@pytest.mark.parametrize("name", often(SCHEDULES, "gradual", "movement", "rigl 2:4"))
def test_the_callback_is_the_trainer_with_masks_by_hand(name: str, tmp_path: Path) -> None:
    """Bit for bit: accumulation, clipping, warm-up, decay."""
    asked = SCHEDULES[name]
    ours, theirs = tiny_model("llama"), tiny_model("llama")
    callback = SparsityCallback(**asked)
    checked = Checked(callback)
    trainer = Trainer(ours, arguments(tmp_path / "ours"), train_dataset=DATA, callbacks=[callback, checked])
    trainer.train()
    by_hand = ByHand(theirs, asked)
    reference = TrainerByHand(theirs, arguments(tmp_path / "theirs"), train_dataset=DATA, callbacks=[AroundSteps(by_hand)])
    reference.by_hand = by_hand
    reference.train()
    same(ours, theirs)
    assert checked.steps == STEPS
    assert callback.masks is not None
    assert all(torch.equal(keep, by_hand.kept(n)) for n, keep in callback.masks.keep.items())
    logged = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    assert logged == [] or logged[-1] == callback.masks.sparsity


@pytest.mark.parametrize("name", often(SCHEDULES | SOFT, "movement", "rigl"))
def test_a_resumed_training_keeps_schedule_and_masks(name: str, tmp_path: Path) -> None:
    """Stopped after 10 steps, in the middle of the schedule; the end is that of a training which was not stopped."""
    whole, callback = tiny_model("llama"), SparsityCallback(**(SCHEDULES | SOFT)[name])
    args = {"save_strategy": "steps", "save_steps": 10}
    Trainer(whole, arguments(tmp_path / "out", **args), train_dataset=DATA, callbacks=[callback]).train()
    for checkpoint in (tmp_path / "out").iterdir():
        if checkpoint.name != "checkpoint-10":
            shutil.rmtree(checkpoint)
    held = sorted(p.name for p in (tmp_path / "out" / "checkpoint-10").glob("*.safetensors"))
    assert held == ["masks.safetensors", "model.safetensors"] + ["scores.safetensors"] * (name in ("movement", "soft", "soft 2:4"))
    resumed, again = tiny_model("llama"), SparsityCallback(**(SCHEDULES | SOFT)[name])
    checked = Checked(again)
    trainer = Trainer(resumed, arguments(tmp_path / "out", **args), train_dataset=DATA, callbacks=[again, checked])
    trainer.train(resume_from_checkpoint=True)
    assert checked.steps == STEPS - 10
    same(whole, resumed)
    assert callback.masks is not None
    assert again.masks is not None
    assert all(torch.equal(keep, again.masks.keep[n]) for n, keep in callback.masks.keep.items())
    moved = tmp_path / "elsewhere"
    (tmp_path / "out" / "checkpoint-10").rename(moved)
    third = tiny_model("llama")
    elsewhere = arguments(tmp_path / "new", resume_from_checkpoint=str(moved))
    Trainer(third, elsewhere, train_dataset=DATA, callbacks=[SparsityCallback(**(SCHEDULES | SOFT)[name])]).train(resume_from_checkpoint=str(moved))
    same(whole, third)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    asked = SCHEDULES["gradual"]
    args = {"save_strategy": "steps", "save_steps": 10}
    Trainer(tiny_model("llama"), arguments(tmp_path, **args), train_dataset=DATA, callbacks=[SparsityCallback(**asked)]).train()

    def resumed(**values: Any) -> None:
        callback = SparsityCallback(**(asked | values))
        Trainer(tiny_model("llama"), arguments(tmp_path, **args), train_dataset=DATA, callbacks=[callback]).train(resume_from_checkpoint=True)

    with pytest.raises(RequestError, match=r"trained with sparsity 0\.7, not 0\.6"):
        resumed(sparsity=0.6)
    args["max_steps"] = 40  # half of which is another end
    with pytest.raises(RequestError, match="trained with end 17, not 20"):
        resumed(end=None)
    (tmp_path / "checkpoint-24" / "masks.safetensors").write_bytes(b"no masks")
    with pytest.raises(RequestError, match="cannot be read"):
        resumed()
    (tmp_path / "checkpoint-24" / "masks.safetensors").unlink()
    with pytest.raises(RequestError, match=r"holds no masks\.safetensors"):
        resumed()


def test_the_best_checkpoint_comes_with_its_masks(tmp_path: Path) -> None:
    """And not with those of the step at which the training stopped."""
    callback = SparsityCallback("gradual", 0.9, end=20, every=1)
    best = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    args = arguments(tmp_path, metric_for_best_model="eval_loss", greater_is_better=True, **best)
    model = tiny_model("llama")
    trainer = Trainer(model, args, train_dataset=DATA, eval_dataset=DATA, callbacks=[callback, EarlyStoppingCallback(1)])
    trainer.train()
    step = trainer.state.best_global_step
    assert step is not None
    assert step < trainer.state.global_step < 20
    assert callback.masks is not None
    for n, keep in callback.masks.keep.items():
        assert int((~keep).sum()) == round(round(0.9 * keep.numel()) * (1 - (1 - step / 20) ** 3)), n
    callback.masks.check(model)


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    often(
        product(["adamw_torch", "sgd", "adafactor"], ["float32", "autocast", "bfloat16"]),
        *(("adamw_torch", "autocast"), ("sgd", "bfloat16"), ("adafactor", "float32")),
    ),
)
def test_zeros_of_a_pruned_model_stay_in_a_training(optimizer: str, dtype: str, tmp_path: Path) -> None:
    """50 steps on the model's own zeros, 2:4 in every group after each."""
    model = tiny_model("llama", torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    for name in Masks.of_zeros(model).keep:
        weight = model.get_parameter(name).data
        weight[~NM(2, 4).project(weight.float().abs(), 0)] = 0
    callback = SparsityCallback("constant")
    checked = Checked(callback)
    more = {
        "optim": optimizer,
        "max_steps": 50,
        "gradient_accumulation_steps": 4,
        "bf16": dtype == "autocast",
        "learning_rate": 1.0 if optimizer == "sgd" else 3e-3,
    }
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = Trainer(model, arguments(tmp_path, **more), train_dataset=DATA, callbacks=[callback, checked])
    trainer.train()
    assert checked.steps == 50
    assert set(checked.sparsities) == {0.5}
    assert Masks.of_zeros(model).holds(model, 2, 4)
    assert callback.masks is not None
    assert all(not torch.equal(before[n], model.get_parameter(n)) for n in callback.masks.keep)
    model.get_parameter(next(iter(callback.masks.keep))).data += 1
    with pytest.raises(PromiseError, match="masked weights are not zero"):
        callback.masks.check(model)


@pytest.mark.parametrize("family", often(["gpt2", "mixtral", "gpt_oss", "dbrx", "phi3", "mamba"], "gpt2", "mixtral"))
def test_other_layouts(family: str) -> None:
    """Transposed, fused, experts in stacks: N:M along the inputs of each, exact counts."""
    for method in ("gradual", "rigl", "movement"):
        model = tiny_model(family)
        optimizer = adamw(model)
        sparsify = Sparsifier(model, optimizer, method, pattern="2:4", end=4, every=1)
        for step in range(5):
            loss_of(model, IDS_NL[step : step + 4]).backward()
            optimizer.step()
            sparsify.step()
            optimizer.zero_grad()
            sparsify.masks.check(model)
        assert sparsify.masks.holds(model, 2, 4)
        assert sparsify.masks.sparsity == 0.5


def test_what_is_chosen_is_masked_and_nothing_else() -> None:
    model = tiny_model("llama")
    sparsify = Sparsifier(model, adamw(model), "constant", sparsity=0.5, only=r"mlp|lm_head", skip=r"layers\.0")
    named = set(sparsify.masks.keep)
    assert named == {f"model.layers.{i}.mlp.{m}_proj.weight" for i in (1, 2) for m in ("gate", "up", "down")} | {"lm_head.weight"}
    assert {n for n, p in model.named_parameters() if bool((p == 0).any())} == named
    sparsify.remove()


def test_given_masks_are_where_a_training_starts() -> None:
    model = tiny_model("llama")
    first = Masks({n: torch.rand_like(model.get_parameter(n)) < 0.3 for n in Masks.of_zeros(model).keep})
    optimizer = adamw(model)
    sparsify = Sparsifier(model, optimizer, "gradual", sparsity=0.8, masks=first, end=5, every=1)
    sparsify.masks.check(model)
    assert sparsify.masks.masked == first.masked
    for _ in range(5):
        loss_of(model, IDS_NL[:2]).backward()
        optimizer.step()
        sparsify.step()
        optimizer.zero_grad()
    for n, keep in sparsify.masks.keep.items():
        assert int((~keep).sum()) == round(0.8 * keep.numel())
        assert not bool((keep & ~first.keep[n]).any()), "what was masked stays masked"


@pytest.mark.slow
def test_gradual_masks_beat_all_at_once(tmp_path: Path) -> None:
    """The bundled model, 85 % of its matrices, 150 steps on its calibration text; measured on its evaluation text."""
    llama, ends = next(path.parent for path in BUNDLED.rglob("config.json")), {}
    tokenizer = AutoTokenizer.from_pretrained(llama)
    train, held = (torch.tensor(tokenizer((BUNDLED / f"{name}.txt").read_text()).input_ids) for name in ("calibration", "evaluation"))
    data = [{"input_ids": ids, "labels": ids} for ids in train[: len(train) // 128 * 128].view(-1, 128)]
    windows = held[: len(held) // 128 * 128].view(-1, 128)
    for method in ("constant", "gradual"):
        model = AutoModelForCausalLM.from_pretrained(llama)
        callback = SparsityCallback(method, 0.85)
        args = arguments(tmp_path, max_steps=150, per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=1e-3, weight_decay=0.0)
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
        assert callback.masks is not None
        assert round(callback.masks.sparsity, 4) == 0.85
        with torch.no_grad():
            ends[method] = float(torch.stack([loss_of(model.eval(), batch) for batch in windows.split(18)]).mean())
    print(ends)
    assert ends["gradual"] < ends["constant"] - 0.03


# several processes, and one that is killed


def in_processes(rank: int, port: int, kind: str, folder: str) -> None:
    """One of two processes: it trains on windows of its own, and stores its masks and weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name in ("gradual 2:4", "movement", "rigl", *(("soft",) if kind == "ddp" else ())):
        model = tiny_model("llama")
        wrapped: Any = DistributedDataParallel(model) if kind == "ddp" else fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = adamw(model)
        sparsify = Sparsifier(model, optimizer, **(SCHEDULES | SOFT)[name])
        for step in range(STEPS):
            loss_of(wrapped, IDS_NL[(2 * step + rank) % 16 : (2 * step + rank) % 16 + 1]).backward()
            optimizer.step()
            sparsify.step()
            optimizer.zero_grad()
            sparsify.masks.check(model)
        assert any(isinstance(p, DTensor) for p in model.parameters()) == (kind == "fsdp")
        held = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.state_dict().items()}
        torch.save((sparsify.masks.keep, held, sparsify.state.scores), f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", often(["ddp", "fsdp"], "fsdp"))
def test_two_processes_agree_on_the_masks(kind: str, tmp_path: Path) -> None:
    """Bit for bit with each other; as one process with both windows in a batch but for rounding, so in all but a few places."""
    port = 20000 + os.getpid() % 20000 + (kind == "ddp")
    mp.start_processes(in_processes, (port, kind, str(tmp_path)), nprocs=2, start_method="fork")
    for name in ("gradual 2:4", "movement", "rigl", *(("soft",) if kind == "ddp" else ())):
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        for mine, other in zip(first, second, strict=True):
            assert all(torch.equal(mine[n], other[n]) for n in mine)
        keep, _, scores = first
        assert bool(scores) == (name == "movement")
        model = tiny_model("llama")
        optimizer = adamw(model)
        sparsify = Sparsifier(model, optimizer, **(SCHEDULES | SOFT)[name])
        for step in range(STEPS):
            loss_of(model, IDS_NL[2 * step % 16 : 2 * step % 16 + 2]).backward()
            optimizer.step()
            sparsify.step()
            optimizer.zero_grad()
        differ = sum(int((keep[n] != mask).sum()) for n, mask in sparsify.masks.keep.items())
        assert differ < 0.002 * sparsify.masks.weights, name


def trainer_in_processes(rank: int, port: int, folder: str) -> None:
    """One of two processes of a Trainer: whole, and then stopped after ten steps and resumed."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name in ("gradual 2:4", "movement", "rigl"):
        ends = []
        for resume in (None, f"{folder}/{name}/checkpoint-10"):
            model, callback = tiny_model("llama"), SparsityCallback(**SCHEDULES[name])
            checked = Checked(callback)
            args = arguments(Path(folder) / name, save_strategy="steps", save_steps=10, ddp_backend="gloo", per_device_train_batch_size=1)
            trainer = Trainer(model, args, train_dataset=DATA, callbacks=[callback, checked])
            trainer.train(resume_from_checkpoint=resume)
            assert trainer.args.world_size == 2
            assert checked.steps == (14 if resume else STEPS)
            assert callback.masks is not None
            ends.append((callback.masks.keep, model.state_dict()))
        for mine, other in zip(*ends, strict=True):
            assert all(torch.equal(mine[n], other[n]) for n in mine)
        torch.save(ends[0], f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_trainer_in_two_processes(tmp_path: Path) -> None:
    """The same masks and weights in both, and resumed from a checkpoint that one of them wrote."""
    mp.spawn(trainer_in_processes, (20000 + os.getpid() % 20000 + 2, str(tmp_path)), nprocs=2)
    for name in ("gradual 2:4", "movement", "rigl"):
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        for mine, other in zip(first, second, strict=True):
            assert all(torch.equal(mine[n], other[n]) for n in mine)


class Killed(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 13:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(folder: Path, asked: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    args = arguments(folder, save_strategy="steps", save_steps=5)
    Trainer(tiny_model("llama"), args, train_dataset=DATA, callbacks=[SparsityCallback(**asked), Killed()]).train()


@pytest.mark.parametrize("name", often(SCHEDULES | SOFT, "rigl 2:4"))
def test_a_killed_training_goes_on_and_ends_as_one_that_was_not(name: str, tmp_path: Path) -> None:
    process = mp.get_context("fork").Process(target=train_until_killed, args=(tmp_path / "out", (SCHEDULES | SOFT)[name]))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    ends = []
    for folder, resume in ((tmp_path / "out", True), (tmp_path / "whole", False)):
        model = tiny_model("llama")
        args = arguments(folder, save_strategy="steps", save_steps=5)
        Trainer(model, args, train_dataset=DATA, callbacks=[SparsityCallback(**(SCHEDULES | SOFT)[name])]).train(resume_from_checkpoint=resume)
        ends.append(model)
    same(*ends)


# penalties


class PenaltyByHand(TrainerCallback):
    """Subgradients of l1 |w| and of s |scale|, where Gemma's scale is 1 + weight."""

    def __init__(self, l1: float, scale: float, offset: float) -> None:
        self.l1, self.scale, self.offset = l1, scale, offset

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        for name, p in model.named_parameters():
            if "layers" in name and p.dim() == 2:
                p.grad += self.l1 * torch.sign(p.data)
            elif "layers" in name and "norm" in name:
                p.grad += self.scale * torch.sign(p.data + self.offset)


@pytest.mark.parametrize(("family", "offset"), often([("llama", 0.0), ("gemma2", 1.0), ("qwen3", 0.0)], ("gemma2", 1.0)))
def test_penalties_are_those_written_by_hand(family: str, offset: float, tmp_path: Path) -> None:
    ours, theirs = tiny_model(family), tiny_model(family)
    for model, callback in ((ours, RegularisationCallback(l1=0.01, norm_scale=0.1)), (theirs, PenaltyByHand(0.01, 0.1, offset))):
        Trainer(model, arguments(tmp_path, weight_decay=0.0, optim="sgd"), train_dataset=DATA, callbacks=[callback]).train()
    same(ours, theirs)
    free = tiny_model(family)
    Trainer(free, arguments(tmp_path, weight_decay=0.0, optim="sgd"), train_dataset=DATA).train()

    def held(model: Any, dim: int) -> float:
        return sum(float((p.detach() + offset * (dim == 1)).abs().sum()) for n, p in model.named_parameters() if "layers" in n and p.dim() == dim)

    assert held(ours, 1) < held(free, 1)
    assert held(ours, 2) < held(free, 2)


def test_a_penalty_leaves_masked_weights_alone(tmp_path: Path) -> None:
    model, callback = tiny_model("llama"), SparsityCallback("constant", pattern="2:4")
    checked = Checked(callback)
    callbacks = [callback, RegularisationCallback(l1=0.1), checked]
    Trainer(model, arguments(tmp_path), train_dataset=DATA, callbacks=callbacks).train()
    assert checked.steps == STEPS
    for values in ({}, {"l1": -1.0}, {"norm_scale": float("nan")}):
        with pytest.raises(RequestError, match=r"l1 .*, norm_scale"):
            RegularisationCallback(**values)


# requests that are refused

REFUSED = {
    "is unknown": {"method": "gradul", "sparsity": 0.5},
    "pattern '3:2' would keep": {"pattern": "3:2"},
    r"sparsity 1\.5": {"sparsity": 1.5},
    r"pattern 2:4 at sparsity 0\.6": {"sparsity": 0.6, "pattern": "2:4"},
    "gradual without a sparsity": {"method": "gradual"},
    "method constant, whose masks do not change": {"method": "constant", "end": 4},
    "rigl with pattern row": {"method": "rigl", "sparsity": 0.5, "pattern": "row"},
    "every with method soft": {"method": "soft", "sparsity": 0.5, "every": 2},
    "soft with pattern row": {"method": "soft", "sparsity": 0.5, "pattern": "row"},
    r"regrow 0\.5 with method gradual": {"sparsity": 0.5, "regrow": 0.5},
    r"regrow 1\.5 with method rigl": {"method": "rigl", "sparsity": 0.5, "regrow": 1.5},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_contradicts_itself_is_refused(said: str) -> None:
    with pytest.raises(RequestError, match=said):
        SparsityCallback(**REFUSED[said])


UNFIT = {
    "masks change until step 100": {"sparsity": 0.5, "end": 100},
    "masks with method soft": {"method": "soft", "sparsity": 0.5, "masks": Masks({})},
    "start 9, end 9": {"sparsity": 0.5, "start": 9, "end": 9},
    "start -1": {"sparsity": 0.5, "start": -1},
    "every 0": {"sparsity": 0.5, "every": 0},
    "no weight of the model is zero": {"method": "constant"},
    r"only 'nothing'.*no matrix is left": {"sparsity": 0.5, "only": "nothing"},
    "skip 'nothing': matches no matrix": {"sparsity": 0.5, "skip": "nothing"},
    "which pattern 2:5 does not divide": {"pattern": "2:5"},
    "is not among the matrices that are chosen": {"sparsity": 0.5, "masks": Masks({"lm_head.weight": torch.ones(96, 32, dtype=torch.bool)})},
}


@pytest.mark.parametrize("said", UNFIT)
def test_what_does_not_fit_the_training_is_refused_before_it_begins(said: str, tmp_path: Path) -> None:
    model, callback = tiny_model("llama"), SparsityCallback(**UNFIT[said])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RequestError, match=said):
        Trainer(model, arguments(tmp_path), train_dataset=DATA, callbacks=[callback]).train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_search_for_hyperparameters_is_refused(tmp_path: Path) -> None:
    args, state = arguments(tmp_path), TrainerState(is_hyper_param_search=True, max_steps=STEPS)
    with pytest.raises(RequestError, match="a search for hyperparameters"):
        SparsityCallback("gradual", 0.5).on_train_begin(args, state, TrainerControl(), model=tiny_model("llama"))


def test_a_plain_loop_needs_an_end_and_a_model_of_transformers() -> None:
    model = tiny_model("llama")
    with pytest.raises(RequestError, match="gradual without an end"):
        Sparsifier(model, adamw(model), sparsity=0.5)
    with pytest.raises(RequestError, match="no model of transformers"):
        Sparsifier(nn.Sequential(model), adamw(model), sparsity=0.5, end=3)  # type: ignore[arg-type]


def test_schedules() -> None:
    """The papers' formulas at points where their values are known."""
    assert [t for t in range(12) if Schedule(2, 9, 3).due(t)] == [2, 5, 8, 9]
    assert [Schedule(2, 10, 3).progress(t) for t in (0, 2, 6, 10, 12)] == [0, 0, 0.5, 1, 1]
    assert [cubic(0, 800, p) for p in (0, 0.5, 1)] == [0, 700, 800]
    assert cubic(100, 900, 0.5) == 800
    assert cubic(100, 50, 0.5) == 100  # never fewer
    assert [round(cosine(0.3, p), 12) for p in (0, 0.5, 1)] == [0.3, 0.15, 0]


def test_a_model_is_saved_and_loaded_with_its_zeros(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "dense", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    callback = SparsityCallback("gradual", pattern="2:4")
    trainer = Trainer(model, arguments(tmp_path / "run"), train_dataset=DATA, callbacks=[callback])
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert callback.masks is not None
    callback.masks.check(again)
    assert Masks.of_zeros(again).sparsity == 0.5
