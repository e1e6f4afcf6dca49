"""Masks as a value: read from results and from zeros, and held through training, against loops written out by hand."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from families import save_tiny, tiny_model, tiny_windows
from often import often
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import Adafactor, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llmprune
from llmprune.errors import PromiseError, RequestError
from llmprune.maths.runs import MOST, places_of, runs_of
from llmprune.training.holding import PIECE, erase
from llmprune.training.masks import Masks, read_masks

IDS_NL = tiny_windows(8)
STEPS = 50
OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
    "adamw_amsgrad": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, amsgrad=True, foreach=True),
    "sgd_momentum": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda ps: Adafactor(ps, lr=1e-2, relative_step=False, scale_parameter=False, weight_decay=0.1),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3, momentum=0.9, weight_decay=0.1),
}


class Restless(Optimizer):
    """Moves every weight, with or without a gradient, as those that make updates orthogonal do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("codes", torch.full(p.shape, 7, dtype=torch.uint8))
                p.add_(1e-3)


def loss_of(model: Any, ids_NL: Tensor) -> Tensor:
    return model(input_ids=ids_NL, labels=ids_NL).loss


def checkerboard(model: Any, n: int = 2, m: int = 4) -> Masks:
    """N:M masks of all matrices by the largest magnitudes, made by a loop of its own."""
    keep = {}
    for name in Masks.of_zeros(model).keep:
        weights = model.get_parameter(name).detach().float()
        groups = weights.abs().reshape(-1, m)
        keep[name] = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(n, 1).indices, True).view(weights.shape)
    return Masks(keep)


# what a result says of its zeros


def two_of_four(weight_RC: Tensor) -> Tensor:
    """Of every four in a row the two smallest magnitudes are dropped, of equal ones the earlier."""
    keep_RC = torch.ones_like(weight_RC, dtype=torch.bool)
    for r, row in enumerate(weight_RC.abs().tolist()):
        for c in range(0, len(row), 4):
            for place in sorted(range(c, c + 4), key=lambda i: (row[i], i))[:2]:
                keep_RC[r, place] = False
    return keep_RC


@pytest.mark.parametrize("family", often(["llama", "gpt2", "phi3", "mixtral", "gpt_oss", "dbrx", "qwen3_moe"], "llama", "gpt2", "mixtral"))
def test_the_record_tells_kept_zeros_from_dropped_ones(family: str, tmp_path: Path) -> None:
    """Planted zeros: whole groups of four, of which 2:4 keeps two."""
    model = tiny_model(family)
    planted = [name for name in Masks.of_zeros(model).keep if model.get_parameter(name).dim() == 2][:2] or list(Masks.of_zeros(model).keep)[:1]
    for name in planted:
        model.get_parameter(name).data[..., :8, :8] = 0  # along either dimension
    model.save_pretrained(tmp_path / "dense")
    report = llmprune.prune(tmp_path / "dense", pattern="2:4", method="magnitude", calibration=IDS_NL, output=str(tmp_path / "out"))
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    masks = read_masks(tmp_path / "out", pruned)
    assert masks.unrecorded == ()
    assert masks.holds(pruned, 2, 4)
    assert masks.keep.keys() == Masks.of_zeros(pruned).keep.keys()
    for name in masks.keep:
        weight, keep = model.get_parameter(name).detach(), masks.keep[name]
        if family == "gpt2" or (family, "experts" in name) == ("gpt_oss", True) or (family, "w2" in name) == ("dbrx", True):  # [C, R]
            weight, keep = (weight.unflatten(0, (4, -1)), keep.unflatten(0, (4, -1))) if family == "dbrx" else (weight, keep)
            weight, keep = weight.transpose(-2, -1), keep.transpose(-2, -1)
        assert torch.equal(keep, two_of_four(weight.reshape(-1, weight.shape[-1])).view(weight.shape)), name
    zeros = Masks.of_zeros(pruned)
    kept = {name: int((masks.keep[name] & ~zeros.keep[name]).sum()) for name in masks.keep}
    assert all(kept[name] for name in planted)
    assert report.own_zeros == sum(kept.values())
    assert masks.sparsity == 0.5 < zeros.sparsity
    masks.check(pruned)


def test_zeros_of_older_results_are_all_masks(tmp_path: Path) -> None:
    model = tiny_model("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    model.get_parameter(name).data[0, :4] = 0
    model.save_pretrained(tmp_path / "dense")
    llmprune.prune(tmp_path / "dense", pattern="2:4", method="magnitude", calibration=IDS_NL, output=str(tmp_path / "out"))
    stored = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    rows = [row for block in stored["blocks"] for row in block["rows"]]
    assert [row["kept_zeros"] for row in rows if row["matrix"] == name] == [[2, 2]]
    assert {tuple(row["kept_zeros"]) for row in rows if row["matrix"] != name} == {()}
    for row in rows:
        del row["kept_zeros"]
    (tmp_path / "out" / "llmprune.json").write_text(json.dumps(stored))
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    masks = read_masks(tmp_path / "out", pruned)
    assert set(masks.unrecorded) == set(masks.keep) == {row["matrix"] for row in rows}
    assert not masks.keep[name][0, :4].any()


def test_more_runs_than_are_worth_writing_are_not_recorded() -> None:
    flags = torch.zeros(3, 4 * MOST, dtype=torch.bool)
    flags[1, : 2 * MOST : 2] = True
    runs = runs_of(flags)
    assert runs is not None
    assert len(runs) == 2 * MOST
    assert torch.equal(places_of(runs, flags.numel()).view(flags.shape), flags)
    flags[2, 0] = True
    assert runs_of(flags) is None
    assert runs_of(torch.ones(2, 2, dtype=torch.bool)) == (0, 4)
    assert runs_of(torch.zeros(2, 2, dtype=torch.bool)) == ()
    for wrong in ((0,), (3, 2), (-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="runs"):
            places_of(wrong, 4)


def test_rows_that_move_after_their_record_are_not_recorded(tmp_path: Path) -> None:
    """Reordered channels move the rows of the matrices that write them."""
    model = tiny_model("llama")
    up = "model.layers.0.mlp.up_proj.weight"
    model.get_parameter(up).data[:5, :4] = 0
    model.save_pretrained(tmp_path / "dense")
    report = llmprune.prune(
        tmp_path / "dense", pattern="2:4", criterion="wanda", solver="mask_only", permute=True, calibration=IDS_NL, output=str(tmp_path / "out")
    )
    masks = read_masks(tmp_path / "out", AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    row = next(row for row in report.rows if row.matrix == up)
    down = next(row for row in report.rows if row.matrix == "model.layers.0.mlp.down_proj.weight")
    assert down.saliency is not None
    assert down.saliency[1] > down.saliency[0]  # they did move
    assert row.kept_zeros is None
    assert up in masks.unrecorded


def test_a_structured_result_has_no_masks(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "dense")
    llmprune.prune(tmp_path / "dense", 0.25, "channels", calibration=IDS_NL, output=str(tmp_path / "out"))
    assert read_masks(tmp_path / "out", AutoModelForCausalLM.from_pretrained(tmp_path / "out")).keep == {}


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "dense")
    llmprune.prune(tmp_path / "dense", 0.5, method="magnitude", calibration=IDS_NL, output=str(tmp_path / "out"))
    dense, pruned = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "out"))
    shorter = AutoModelForCausalLM.from_pretrained(tmp_path / "out", num_hidden_layers=2)
    with pytest.raises(RequestError, match=r"not the weights that llmprune\.json is about"):
        read_masks(tmp_path / "out", dense)
    with pytest.raises(RequestError, match="the model has 2 blocks"):
        read_masks(tmp_path / "out", shorter)
    with pytest.raises(RequestError, match=r"no such file"):
        read_masks(tmp_path / "dense", dense)
    masks = read_masks(tmp_path / "out", pruned)
    with pytest.raises(RequestError, match=r"layers\.2\.\S+: the model has no parameter"):
        masks.apply(shorter)
    name = next(iter(masks.keep))
    with pytest.raises(RequestError, match="the mask is"):
        Masks({name: masks.keep[name][:4]}).check(pruned)
    with pytest.raises(RequestError, match="the mask is"):
        Masks({name: masks.keep[name].float()}).apply(pruned)
    with pytest.raises(PromiseError, match=f"{name}: .* masked weights are not zero"):
        masks.check(dense)
    masks.apply(dense)
    masks.check(dense)
    with pytest.raises(RequestError, match="keeps weights of its own"):
        masks.hold(pruned, nn.Module())  # type: ignore[arg-type]


def test_masks_are_stored_and_read_again(tmp_path: Path) -> None:
    masks = checkerboard(tiny_model("llama"))
    masks = Masks(masks.keep, tuple(masks.keep)[:3])
    (tmp_path / "masks.safetensors").write_bytes(masks.to_bytes())
    again = Masks.read(tmp_path / "masks.safetensors")
    assert again.unrecorded == masks.unrecorded
    assert again.keep.keys() == masks.keep.keys()
    assert all(torch.equal(again.keep[name], mask) for name, mask in masks.keep.items())
    with pytest.raises(RequestError, match="cannot be read"):
        Masks.read(tmp_path / "none.safetensors")
    save_tiny("llama", tmp_path / "dense")
    with pytest.raises(RequestError, match="holds no masks"):
        Masks.read(tmp_path / "dense" / "model.safetensors")


# training


def trained(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def masked_values(model: Any, masks: Masks, optimizer: Optimizer) -> set[float]:
    """Every value at a masked place: of weights, gradients and moments."""
    found: set[float] = set()
    for name, keep in masks.keep.items():
        p = model.get_parameter(name)
        held = [p, p.grad, *optimizer.state[p].values()]
        found |= {float(v) for t in held if isinstance(t, Tensor) and t.shape == p.shape for v in t.detach()[~keep].float().unique()}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(7, 5), (PIECE // 512 + 3, 1000)])
def test_masked_values_are_plus_zero_whatever_they_were(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    values = torch.randn(shape).to(dtype)
    values[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    keep = torch.rand(shape) < 0.5
    keep[0, :4] = False
    expected = torch.where(keep, values, torch.zeros((), dtype=dtype))
    for way in (values, values.T.contiguous().T):  # as it lies, and transposed
        found = way.clone()
        erase(found, -keep.to(torch.int8))
        assert torch.equal(found, expected)
        assert not bool(torch.signbit(found[~keep]).any())


@pytest.mark.parametrize(
    ("name", "dtype"),
    often(
        product(OPTIMIZERS, ["float32", "autocast", "bfloat16"]),
        *(("adamw", "float32"), ("sgd_momentum", "bfloat16"), ("adafactor", "autocast"), ("adafactor", "float32"), ("adamw", "bfloat16")),
    ),
)
def test_zeros_stay_at_every_step(name: str, dtype: str) -> None:
    """Gradients of four micro-batches add up, and are clipped."""
    model = tiny_model("llama", torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    masks = checkerboard(model)
    masks.apply(model)
    before = {n: model.get_parameter(n).detach().clone() for n in masks.keep}
    optimizer = OPTIMIZERS[name](trained(model))
    masks.hold(model, optimizer)
    for step in range(STEPS):
        for micro in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
                loss = loss_of(model, IDS_NL[(step + micro) % 8 : (step + micro) % 8 + 1]) / 4
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert masked_values(model, masks, optimizer) == {0.0}
        optimizer.zero_grad()
    masks.check(model)
    zeros = Masks.of_zeros(model)
    assert zeros.holds(model, 2, 4)
    for n, keep in masks.keep.items():
        assert bool((model.get_parameter(n)[keep] != before[n][keep]).any()), "what is kept is trained"


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_zeros_stay_under_eight_bit_optimizers(package: str) -> None:
    """Whose moments are codes, and their own affair: the weights are exact all the same."""
    optim = pytest.importorskip(f"{package}.optim", reason=f"{package} is not installed")
    size = {"min_8bit_size": 16} if package == "bitsandbytes" else {}
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 96}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**wide))  # torchao leaves tensors of fewer than 4,096 values as they are
    masks = checkerboard(model)
    optimizer = optim.AdamW8bit(trained(model), lr=1e-3, weight_decay=0.1, **size)
    masks.hold(model, optimizer)
    before = {n: model.get_parameter(n).detach().clone() for n in masks.keep}
    for step in range(STEPS):
        loss_of(model, IDS_NL[step % 8 : step % 8 + 1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.check(model)
    states = [value for n in masks.keep for value in optimizer.state[model.get_parameter(n)].values()]
    assert any(type(value) is not Tensor or value.dtype == torch.uint8 for value in states if isinstance(value, Tensor))  # it is 8-bit
    for n, keep in masks.keep.items():
        assert bool((model.get_parameter(n)[keep] != before[n][keep]).any())


def test_zeros_stay_where_an_optimizer_moves_weights_without_gradients() -> None:
    model = tiny_model("gpt2")
    masks = checkerboard(model)
    optimizer = Restless(trained(model))
    held = masks.hold(model, optimizer)
    masks.check(model)  # holding applies them
    for _ in range(3):
        loss_of(model, IDS_NL).backward()
        optimizer.step()
        masks.check(model)
    assert all(bool((optimizer.state[model.get_parameter(n)]["codes"] == 7).all()) for n in masks.keep)  # no moment: as the optimizer left it
    held.remove()
    optimizer.step()
    with pytest.raises(PromiseError, match="masked weights are not zero"):
        masks.check(model)


@pytest.mark.parametrize("name", ["adamw", "sgd_momentum", "adafactor"])
def test_held_steps_are_those_of_a_loop_with_masks_by_hand(name: str) -> None:
    """Bit for bit, clipping included; one run by accelerate's wrapped optimizer, which skips steps while gradients add up."""
    ours, theirs = tiny_model("llama"), tiny_model("llama")
    masks = checkerboard(ours)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    wrapped, optimizer = accelerator.prepare(ours, OPTIMIZERS[name](trained(ours)))
    masks.hold(wrapped, optimizer)
    plain = OPTIMIZERS[name](trained(theirs))
    with torch.no_grad():
        for n, keep in masks.keep.items():
            theirs.get_parameter(n)[~keep] = 0
    for step in range(6):
        for micro in range(2):
            with accelerator.accumulate(wrapped):
                accelerator.backward(loss_of(wrapped, IDS_NL[step + micro : step + micro + 1]))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            (loss_of(theirs, IDS_NL[step + micro : step + micro + 1]) / 2).backward()
            for n, keep in masks.keep.items():
                theirs.get_parameter(n).grad[~keep] = 0
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        plain.step()
        plain.zero_grad()
        for n, keep in masks.keep.items():
            p = theirs.get_parameter(n)
            for value in (p.data, *plain.state[p].values()):
                if isinstance(value, Tensor) and value.shape == p.shape:
                    value[~keep] = 0
    for (n, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), n


def test_moments_of_dense_training_do_not_drag() -> None:
    """An optimizer that has trained the dense model: its moments are masked when the masks are first held."""
    model = tiny_model("llama")
    optimizer = OPTIMIZERS["adamw"](trained(model))
    loss_of(model, IDS_NL).backward()
    optimizer.step()
    masks = checkerboard(model)
    held = masks.hold(model, optimizer)
    assert masked_values(model, masks, optimizer) == {0.0}  # the gradient that is still there, too
    optimizer.step()
    assert masked_values(model, masks, optimizer) == {0.0}
    held.change({name: torch.ones_like(keep) for name, keep in masks.keep.items()})
    optimizer.zero_grad()
    loss_of(model, IDS_NL).backward()
    optimizer.step()
    assert any(bool((model.get_parameter(n)[~keep] != 0).any()) for n, keep in masks.keep.items())  # free again


def test_resumed_in_the_middle_ends_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def steps(model: Any, optimizer: Optimizer, numbers: range) -> None:
        for step in numbers:
            loss_of(model, IDS_NL[step % 8 : step % 8 + 1]).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = tiny_model("llama")
    masks = checkerboard(whole)
    optimizer = OPTIMIZERS["adamw"](trained(whole))
    masks.hold(whole, optimizer)
    steps(whole, optimizer, range(STEPS // 2))
    whole.save_pretrained(tmp_path / "half")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "masks.safetensors").write_bytes(masks.to_bytes())
    steps(whole, optimizer, range(STEPS // 2, STEPS))

    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "half").eval()
    again = OPTIMIZERS["adamw"](trained(resumed))
    Masks.read(tmp_path / "masks.safetensors").hold(resumed, again)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    steps(resumed, again, range(STEPS // 2, STEPS))
    for (n, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), n
    masks.check(resumed)


# several processes


def in_processes(rank: int, port: int, kind: str, folder: str) -> None:
    """One of two processes: it trains on its own windows; the second one stores what it has."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = tiny_model("llama")
    masks = checkerboard(model)
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped: Any = model
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = OPTIMIZERS["adamw"](trained(model))
    masks.hold(wrapped, optimizer)
    for step in range(STEPS if kind == "ddp" else 10):
        loss_of(wrapped, IDS_NL[(2 * step + rank) % 8 : (2 * step + rank) % 8 + 1]).backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        masks.check(wrapped)
    now = {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}
    assert any(isinstance(p, DTensor) for p in model.parameters()) == (kind == "fsdp")
    assert any(not torch.equal(now[n], whole[n] * masks.keep[n]) for n in masks.keep)
    torch.save({n: t.clone() for n, t in now.items()}, f"{folder}/{kind}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_keep_the_same_zeros(kind: str, tmp_path: Path) -> None:
    """And, for data-parallel training, the weights that one process finds with both windows in a batch."""
    port = 20000 + hash(str(tmp_path)) % 20000
    mp.start_processes(in_processes, (port, kind, str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{kind}-{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    model = tiny_model("llama")
    masks = checkerboard(model)
    masks.apply(model)
    optimizer = OPTIMIZERS["adamw"](trained(model))
    held = {n: p for n, p in model.named_parameters() if n in masks.keep}
    for step in range(STEPS if kind == "ddp" else 10):
        at = 2 * step % 8
        loss_of(model, IDS_NL[at : at + 2]).backward()
        for n, p in held.items():
            p.grad[~masks.keep[n]] = 0
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for n, p in model.named_parameters():
        torch.testing.assert_close(first[n], p.detach(), rtol=1e-3, atol=1e-4, msg=n)
