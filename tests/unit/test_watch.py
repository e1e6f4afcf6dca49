"""What enters each matrix, against hooks and plain products.

Shapes: N = windows, L = tokens of a window, D = hidden width, T = tokens, C = input columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from llmprune.errors import StoppedError
from llmprune.model.matrices import block_matrices
from llmprune.statistics.sums import PANEL, Watch
from llmprune.types import Stat

BOTH: frozenset[Stat] = frozenset({"gram", "input_sq"})
ALL: frozenset[Stat] = BOTH | {"input_sum"}


def llama(intermediate: int = 48) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=intermediate, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    return model, model.model.layers[0]


def gpt2() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64)).eval()
    return model, model.transformer.h[0]


def batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(64, (n, 20), generator=g) for n in (3, 3, 1)]


@torch.no_grad()
def watched(model: nn.Module, block: nn.Module, inputs: Iterable[Tensor], needs: frozenset[Stat] = BOTH) -> tuple[Watch, list[Tensor]]:
    watch = Watch(block, block_matrices(block), needs)
    outputs = []
    for value in inputs:
        with watch:
            out = model(value)
        outputs.append(getattr(out, "logits", out))
        watch.next_batch()
    watch.close()
    return watch, outputs


@torch.no_grad()
def hooked(model: nn.Module, block: nn.Module, inputs: Iterable[Tensor]) -> dict[str, Tensor]:
    """[T, C] in float64: all that entered each Linear or Conv1D, by the name of its weight."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: seen[f"{name}.weight"].append(args[0].flatten(0, -2).double()))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    for value in inputs:
        model(value)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values) for name, values in seen.items()}


MODELS = {"llama": llama, "gpt2": gpt2, "llama-wide": lambda: llama(2 * PANEL + 20)}


@pytest.mark.parametrize("which", MODELS)
def test_sums_are_those_of_the_inputs(which: str) -> None:
    model, block = MODELS[which]()
    watch, _ = watched(model, block, batches(), ALL)
    inputs = hooked(model, block, batches())
    assert watch.stats.keys() == inputs.keys()
    for name, value_TC in inputs.items():
        stats, wanted_CC = watch.stats[name], value_TC.T @ value_TC
        assert stats.tokens == 7 * 20 == len(value_TC)
        torch.testing.assert_close(stats.gram_CC.double(), wanted_CC, rtol=1e-5, atol=1e-6 * float(wanted_CC.diagonal().max()))
        torch.testing.assert_close(stats.input_sq_C.double(), value_TC.square().sum(0), rtol=1e-5, atol=0)
        torch.testing.assert_close(stats.input_sum_C.double(), value_TC.sum(0), rtol=1e-5, atol=1e-5 * float(value_TC.abs().sum(0).max()))
        assert stats.gram_CC.equal(stats.gram_CC.T)
        assert stats.gram_CC.dtype == stats.input_sq_C.dtype == torch.float32


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("needs", [frozenset(), frozenset({"gram"}), frozenset({"input_sq"}), BOTH], ids=lambda n: "+".join(sorted(n)) or "none")
def test_a_watched_forward_is_the_unwatched_one_to_the_bit(which: str, needs: frozenset[Stat]) -> None:
    model, block = MODELS[which]()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        wanted = [model(ids).logits for ids in batches()]
    watch, outputs = watched(model, block, batches(), needs)
    assert all(out.equal(want) for out, want in zip(outputs, wanted, strict=True))
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    for stats in watch.stats.values():
        assert (stats.gram_CC is not None, stats.input_sq_C is not None) == ("gram" in needs, "input_sq" in needs)


def test_matrices_with_one_input_share_one_sum() -> None:
    watch, _ = watched(*llama(), batches())
    groups: dict[int, set[str]] = defaultdict(set)
    for name, stats in watch.stats.items():
        groups[id(stats)].add(name.removesuffix("_proj.weight"))
    assert sorted(map(sorted, groups.values())) == [
        ["mlp.down"],
        ["mlp.gate", "mlp.up"],
        ["self_attn.k", "self_attn.q", "self_attn.v"],
        ["self_attn.o"],
    ]


class Experts(nn.Module):
    """Two stacks used slice by slice, as mixture-of-experts blocks do; the last expert is never chosen, ``idle`` never called."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 10, 6, generator=g))
        self.down = nn.Parameter(torch.randn(3, 6, 10, generator=g))
        self.idle = nn.Linear(6, 6)

    def forward(self, value_TD: Tensor) -> Tensor:
        out_TD = value_TD.clone()
        for e in range(2):
            rows = torch.arange(e, len(value_TD), 3)
            out_TD[rows] += F.linear(F.linear(value_TD[rows], self.up[e]).relu(), self.down[e])
        return out_TD


def test_experts_see_their_own_tokens_and_who_is_not_used_sees_none() -> None:
    block = Experts()
    inputs = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (10, 11)]
    watch, _ = watched(block, block, inputs)
    assert {name: stats.tokens for name, stats in watch.stats.items()} == {
        "up[0]": 4 + 4,
        "up[1]": 3 + 4,
        "up[2]": 0,
        "down[0]": 4 + 4,
        "down[1]": 3 + 4,
        "down[2]": 0,
        "idle.weight": 0,
    }
    for e in range(2):
        own_TC = torch.cat([value[e::3] for value in inputs])
        torch.testing.assert_close(watch.stats[f"up[{e}]"].gram_CC, own_TC.T @ own_TC)
        hidden_TC = F.linear(own_TC, block.up[e]).relu().detach()
        torch.testing.assert_close(watch.stats[f"down[{e}]"].gram_CC, hidden_TC.T @ hidden_TC)
    for unseen in ("up[2]", "down[2]", "idle.weight"):
        assert watch.stats[unseen].gram_CC is watch.stats[unseen].input_sq_C is None
    assert len({id(s) for s in watch.stats.values()}) == len(watch.stats)


class Spelled(nn.Module):
    """One product, spelled in the ways that architectures spell it."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 4, bias=False)
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        w = self.lin.weight
        return {
            "linear": lambda: F.linear(x, w),
            "linear-keywords": lambda: F.linear(input=x, weight=w),
            "linear-weight-keyword": lambda: F.linear(x, weight=w),
            "operator": lambda: x @ w.T,
            "matmul": lambda: torch.matmul(x, w.t()),
            "method": lambda: x.matmul(w.T),
            "mm": lambda: torch.mm(x, w.T),
            "mm-keywords": lambda: torch.mm(input=x, mat2=w.T),
            "addmm": lambda: torch.addmm(torch.zeros(4), x, w.T),
            "addmm-keywords": lambda: torch.addmm(input=torch.zeros(4), mat1=x, mat2=w.T),
        }[self.spelling]()


SPELLINGS = [
    "linear",
    "linear-keywords",
    "linear-weight-keyword",
    "operator",
    "matmul",
    "method",
    "mm",
    "mm-keywords",
    "addmm",
    pytest.param("addmm-keywords"),
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_product_is_seen(spelling: str) -> None:
    value_TC = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    block = Spelled(spelling)
    watch, (out,) = watched(block, block, [value_TC])
    assert out.shape == (9, 4)
    assert watch.stats["lin.weight"].tokens == 9
    torch.testing.assert_close(watch.stats["lin.weight"].gram_CC, value_TC.T @ value_TC)


@pytest.mark.parametrize("bias", [torch.ones(9, 4), torch.ones(4)], ids=["2-D", "1-D"])
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("input", "mat1", "mat2"), id="all-by-name"),
        pytest.param((None, "mat1", "mat2"), id="two-by-name"),
        pytest.param((None, None, "mat2"), id="one-by-name"),
    ],
)
def test_addmm_sums_the_product_not_what_is_added(bias: Tensor, names: tuple[str | None, ...]) -> None:
    block = nn.ModuleDict({"a": nn.Linear(6, 4)})
    value_TC = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    watch = Watch(block, block_matrices(block), BOTH)
    arguments = list(zip(names, (bias, value_TC, block["a"].weight.detach().T), strict=True))
    with watch:
        torch.addmm(*(v for n, v in arguments if n is None), **{n: v for n, v in arguments if n})
    watch.close()
    torch.testing.assert_close(watch.stats["a.weight"].gram_CC, value_TC.T @ value_TC)


class ChangedInPlace(nn.Module):
    """The same memory enters two matrices with different contents."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.clone()
        out = self.a(h)
        return out + self.b(h.relu_())


def test_an_input_changed_in_place_is_another_input() -> None:
    block, value_TC = ChangedInPlace(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    watch, _ = watched(block, block, [value_TC])
    torch.testing.assert_close(watch.stats["a.weight"].gram_CC, value_TC.T @ value_TC)
    torch.testing.assert_close(watch.stats["b.weight"].gram_CC, value_TC.relu().T @ value_TC.relu())


class Sometimes(nn.Module):
    """Two matrices that share their input on the first call only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.a(x) + self.b(x if self.calls == 1 else x[:2]).sum(0)


def test_a_share_that_ends_is_refused() -> None:
    block = Sometimes()
    with pytest.raises(StoppedError, match=r"saw \d+ tokens, its shared input"):
        watched(block, block, [torch.randn(5, 4), torch.randn(5, 4)])


class Twice(nn.Module):
    """One matrix, used twice in a forward on different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.a(x))


def test_a_matrix_used_twice_sums_both_inputs() -> None:
    block, value_TC = Twice(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    watch, _ = watched(block, block, [value_TC])
    both_TC = torch.cat([value_TC, block.a(value_TC).detach()])
    assert watch.stats["a.weight"].tokens == 10
    torch.testing.assert_close(watch.stats["a.weight"].gram_CC, both_TC.T @ both_TC)


class Gates(nn.Module):
    """The blocks of a block-diagonal matrix, as RecurrentGemma has them: stored [E, C, R], beside the bias [E, R] of their products."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_weight, self.gate_bias = nn.Parameter(torch.randn(2, 3, 5)), nn.Parameter(torch.zeros(2, 5))

    def forward(self, x_TEC: Tensor) -> Tensor:
        return torch.baddbmm(self.gate_bias[:, None], x_TEC.transpose(0, 1), self.gate_weight)


def test_the_columns_of_blocks_on_a_diagonal_face_their_inputs() -> None:
    block, value_TEC = Gates(), torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0))
    watch, _ = watched(block, block, [value_TEC])
    for expert, matrix in enumerate(block_matrices(block)):
        assert (matrix.rows, matrix.columns) == (5, 3)
        own_TC = value_TEC[:, expert]
        torch.testing.assert_close(watch.stats[matrix.name].gram_CC, own_TC.T @ own_TC)


class Parting(nn.Module):
    """Two matrices that share an input, one of which has another one too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.b(x[:1] + 1)


def test_a_shared_input_and_another_one_are_summed_apart() -> None:
    block, values = Parting(), [torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    watch, _ = watched(block, block, values)
    shared_TC = torch.cat(values)
    own_TC = torch.cat([shared_TC, *(value_TC[:1] + 1 for value_TC in values)])
    for name, wanted_TC in (("a.weight", shared_TC), ("b.weight", own_TC)):
        assert watch.stats[name].tokens == len(wanted_TC)
        torch.testing.assert_close(watch.stats[name].gram_CC, wanted_TC.T @ wanted_TC)
    assert watch.several == {"b.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    """300^2 overflows in float16, and a sum of a thousand such squares has no bits left for one more in bfloat16."""
    block = nn.ModuleDict({"a": nn.Linear(4, 4).to(dtype)})
    value_TC = torch.full((1000, 4), 300.0, dtype=dtype)
    watch, _ = watched(block["a"], block, [value_TC])
    assert watch.stats["a.weight"].gram_CC.dtype == torch.float32
    wanted = 1000 * float(value_TC[0, 0]) ** 2
    assert watch.stats["a.weight"].input_sq_C.tolist() == pytest.approx([wanted] * 4)
    assert watch.stats["a.weight"].gram_CC[0].tolist() == pytest.approx([wanted] * 4)


def test_a_sum_that_is_not_finite_stops_the_run() -> None:
    block = nn.ModuleDict({"a": nn.Linear(4, 4)})
    with pytest.raises(StoppedError, match="not finite"):
        watched(block["a"], block, [torch.full((3, 4), float("inf"))], frozenset({"input_sum"}))


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "not finite"), (float("inf"), "not finite"), (1e30, "not finite"), (0.0, "zero")])
@pytest.mark.parametrize("needs", [frozenset({"gram"}), frozenset({"input_sq"})], ids=["gram", "input_sq"])
def test_sums_that_say_nothing_stop_the_run(value: float, message: str, needs: frozenset[Stat]) -> None:
    block = nn.ModuleDict({"a": nn.Linear(4, 4)})
    with pytest.raises(StoppedError, match=message) as caught:
        watched(block["a"], block, [torch.full((3, 4), value)], needs)
    assert caught.value.message.startswith("a.weight: ")
    assert "\n" not in caught.value.message


def test_outside_the_watch_nothing_is_summed() -> None:
    block = nn.ModuleDict({"a": nn.Linear(4, 4)})
    watch, _ = watched(block["a"], block, [torch.ones(3, 4)])
    block["a"](torch.ones(3, 4))
    assert watch.stats["a.weight"].tokens == 3
