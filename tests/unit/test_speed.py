"""What a lap does and counts: the order of turns, the cache's bytes, decoding against a forward without cache, memory marks, 2:4 matrices."""

from __future__ import annotations

import mmap

import pytest
import torch
from families import FAMILIES, tiny_model
from rich.console import Console
from torch import nn
from transformers import DynamicCache

from llmprune.benchmark.kernels import Kernel, convert, keeps_2of4, two_of_four, why_not
from llmprune.benchmark.laps import Lap, Runner, Spread, Workload, cache_bytes, in_turns
from llmprune.benchmark.memory import forget_peak, peak_resident, resident
from llmprune.benchmark.result import Bench, Figures, Setting, compared
from llmprune.report.tables import print_bench

CACHED = sorted(FAMILIES.keys() - {"openai_gpt"})


def test_rounds_take_turns_and_the_first_is_dropped():
    ran: list[str] = []

    def runner(name: str):
        return lambda: ran.append(name) or f"{name}{len(ran)}"

    seen: list[tuple[int, int]] = []
    results = in_turns([runner("a"), runner("b")], 3, warm_up=1, done=lambda done, total: seen.append((done, total)))
    assert "".join(ran) == "abababab"
    assert results == [["a3", "a5", "a7"], ["b4", "b6", "b8"]]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_spread():
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "bloom", "mamba", "qwen3_next", "deepseek_v3", "lfm2"])
def test_a_lap_is_the_greedy_continuation(family, monkeypatch):
    """The tokens that a lap feeds back are those that forwards without a cache choose."""
    model = tiny_model(family)
    fed: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True)
    lap = Runner(model, Workload(10, 4, 2)).lap()
    assert lap.prefill > 0
    assert lap.first_token >= lap.prefill
    assert lap.decode > 0
    assert lap.kv_cache_bytes > 0
    ids = torch.cat(fed, 1)
    assert [f.shape[1] for f in fed] == [10, 1, 1, 1, 1]
    with torch.no_grad():
        chosen = model(input_ids=ids, use_cache=False).logits[:, 9:-1].argmax(-1)
    assert torch.equal(ids[:, 10:], chosen)


@pytest.mark.parametrize("family", CACHED)
def test_every_family_runs_a_lap(family):
    assert Runner(tiny_model(family), Workload(6, 2)).lap().kv_cache_bytes > 0


def test_laps_begin_with_an_empty_cache():
    runner = Runner(tiny_model("llama"), Workload(6, 3))
    assert runner.lap().kv_cache_bytes == runner.lap().kv_cache_bytes


def test_ids_hang_on_the_seed_alone():
    seen = [Runner(tiny_model("llama"), Workload(6, 3), seed=seed)._ids_NL for seed in (0, 0, 1)]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_cache_bytes_counts_what_two_layers_hold():
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(3, 2, 5, 8), torch.zeros(3, 2, 5, 4), layer)
    assert cache_bytes(cache) == 2 * 4 * (3 * 2 * 5 * 8 + 3 * 2 * 5 * 4)


def test_peak_memory_is_forgotten_and_found():
    if not forget_peak():
        pytest.skip("this system keeps its high-water mark")
    before = resident()
    with mmap.mmap(-1, 64 << 20) as held:  # pages of its own: a tensor could lie in what the heap has left over
        held.write(b"1" * (64 << 20))
    assert peak_resident() >= before + (60 << 20)
    forget_peak()
    assert peak_resident() < before + (60 << 20)


def halved(linear: nn.Linear) -> None:
    linear.weight.data.unflatten(1, (-1, 4))[..., :2] = 0


def test_2of4_matrices_are_found_and_measured():
    model = tiny_model("llama").requires_grad_(False)
    assert two_of_four(model) == {}
    mlp = model.model.layers[0].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        halved(linear)
    assert list(two_of_four(model)) == [(48, 32)]
    expected = model(input_ids=torch.arange(6)[None]).logits
    kernels = convert(model, (1, 7), 3, compress=torch.clone)
    assert [(k.rows, k.columns, k.matrices, k.tokens) for k in kernels] == [(48, 32, 2, 1), (48, 32, 2, 7)]
    for kernel in kernels:
        assert kernel.refused is None
        assert kernel.speed_up == kernel.dense.median / kernel.sparse.median
    assert torch.equal(model(input_ids=torch.arange(6)[None]).logits, expected)


def test_what_torch_refuses_stays_dense_and_says_why():
    model = tiny_model("llama")
    linear = model.model.layers[1].mlp.down_proj
    halved(linear)
    before = linear.weight
    (kernel,) = convert(model, (2,), 2)  # no CUDA tensor: torch itself refuses
    assert kernel.sparse is None
    assert kernel.speed_up is None
    assert kernel.refused
    assert linear.weight is before


def test_groups_of_four():
    assert keeps_2of4(torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3]]))
    assert not keeps_2of4(torch.tensor([[1.0, 0, 2, 3, 0, 0, 0, 3]]))
    assert not keeps_2of4(torch.zeros(2, 6))
    assert why_not(torch.device("cpu")) == "2:4 kernels need CUDA (Ampere or newer)"


@pytest.mark.parametrize("shorter", [1.0, 2.0])
def test_ratios_are_taken_round_by_round(shorter):
    dense = [Lap(1.0, 1.1, 4.0, 100), Lap(3.0, 3.3, 8.0, 100)]  # the load trebled in the second round
    pruned = [Lap(lap.prefill / shorter, lap.first_token / shorter, lap.decode / shorter, 50) for lap in dense]
    flat = Spread.of([1.0])
    a = Figures("a", "dense", "float32", flat, flat, flat, 200, 100, 10, 40)
    b = Figures("b", "pruned", "float32", flat, flat, flat, None, 50, 5, 10)
    found = compared(b, pruned, a, dense)
    assert found.prefill == found.decode == Spread(shorter, shorter, shorter)
    assert found.first_token.median == pytest.approx(1 / shorter)
    assert (found.peak_memory, found.kv_cache, found.parameters, found.disk) == (None, 0.5, 0.5, 0.25)


def test_kernels_are_told_faster_slower_and_refused(capsys):
    flat = Spread.of([2e-6])
    kernels = (
        Kernel(64, 32, 3, 512, Spread.of([3e-6]), flat),
        Kernel(64, 32, 3, 1, Spread.of([1e-6]), flat),
        Kernel(6, 8, 1, 1, flat, None, "shape [6, 8] is not supported"),
    )
    setting = Setting(512, 4, 1, 2, "cuda", "a card", 1, torch="2", transformers="5")
    model = Figures("m", "model", "bfloat16", flat, flat, flat, None, 1, 1, 1)
    found = Bench(setting, (model,), (), kernels, ())
    print_bench(found, Console(width=200))
    table = capsys.readouterr().out
    for words in ("1.50 x, faster", "0.50 x, slower", "stays dense: shape [6, 8] is not supported", "64 x 32", "not measured"):
        assert words in table
    assert [k["speed_up"] for k in found.to_json()["kernels"]] == [1.5, 0.5, None]


@pytest.mark.slow
def test_compiled_laps_use_a_cache_of_fixed_size():
    runner = Runner(tiny_model("llama"), Workload(6, 3), compiled=True)
    plain = Runner(tiny_model("llama"), Workload(6, 3)).lap().kv_cache_bytes
    assert [runner.lap().kv_cache_bytes for _ in range(2)] == [plain // 6 * 9] * 2
