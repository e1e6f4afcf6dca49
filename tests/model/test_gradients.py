"""Gradients had block by block, against plain autograd on the whole model.

Shapes: N = windows, L = tokens of a window, T = tokens, R = output rows, C = input columns, V = vocabulary.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, TYPICAL, save_tiny, tiny_model, tiny_windows
from often import often
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmprune.checkpoint.source import open_folder
from llmprune.errors import StoppedError
from llmprune.maths import coupled_rows
from llmprune.maths.coupled_rows import felt, rows_together
from llmprune.model.matrices import Matrix, Selection
from llmprune.model.pictures import IGNORED
from llmprune.statistics.gradient_taps import Taps
from llmprune.statistics.gradients import GRADIENTS, SEED, LossGradients, loss_gradients
from llmprune.statistics.gradients import drawn as drawn_targets
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.flow import Flow
from llmprune.stream.hidden_states import FileHidden
from llmprune.stream.live import LiveStream
from llmprune.stream.selected import selected
from llmprune.stream.stream import Stream
from llmprune.types import Listener, Stat, Stats

CPU = torch.device("cpu")
WINDOWS_NL = tiny_windows(5, 16)
EVERYTHING = Selection(only=".")  # routers and untied heads too

typical_families = pytest.mark.parametrize("family", often(FAMILIES, *TYPICAL))


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and micro-batches of 3 and 2 windows."""
    monkeypatch.setitem(sys.modules["llmprune.stream.flow"].TOKENS_PER_BATCH, "cpu", 48)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def live(family: str, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(family, dtype)
    model.set_experts_implementation("eager")
    return model


def gradients(stream: Stream, *needs: Stat, selection: Selection = EVERYTHING) -> LossGradients:
    return loss_gradients(stream, WINDOWS_NL, selected(stream, selection), frozenset(needs))


def window_loss(model: nn.Module, ids_L: Tensor, draw: torch.Generator | None = None) -> Tensor:
    """draw: of targets from the predictions; else they are the next tokens."""
    logits_LV = model(input_ids=ids_L[None], use_cache=False).logits[0, :-1]
    targets_L = ids_L[1:] if draw is None else drawn(logits_LV.detach(), draw)
    return F.cross_entropy(logits_LV, targets_L, reduction="sum")


def drawn(logits_LV: Tensor, draw: torch.Generator) -> Tensor:
    """Targets by the inverse of the distribution function."""
    at_L1 = torch.rand(len(logits_LV), 1, generator=draw)
    return (logits_LV.double().softmax(-1).cumsum(-1) < at_L1).sum(-1)


def test_targets_are_drawn_as_predicted() -> None:
    """The share of each token is its probability, and what is ignored stays so."""
    logits_V = torch.tensor([2.0, -1.0, 0.5, -30.0, 1.0])
    targets_L = torch.zeros(40_000, dtype=torch.long)
    targets_L[::4] = IGNORED
    found_L = drawn_targets(logits_V.expand(40_000, 5), targets_L, drawing())
    assert bool((found_L[::4] == IGNORED).all())
    shares_V = torch.bincount(found_L[found_L != IGNORED], minlength=5) / 30_000
    torch.testing.assert_close(shares_V, logits_V.softmax(-1), rtol=0, atol=0.01)


def drawing() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def of(matrix: Matrix, gradient: Tensor | None) -> Tensor:
    """[R, C]: a matrix's part of a parameter's gradient."""
    if gradient is None:
        return torch.zeros(matrix.rows, matrix.columns)
    if matrix.expert is not None and gradient.dim() == 2:  # experts that lie one after the other
        gradient = gradient.unflatten(0, (-1, matrix.columns if matrix.transposed else matrix.rows))
    part = gradient if matrix.expert is None else gradient[matrix.expert]
    return matrix.part_of(part.T if matrix.transposed else part)


def by_autograd(model: nn.Module, stream: Stream, matrices: dict[int, list[Matrix]]) -> dict[str, list[Tensor]]:
    """dL_n/dW of every window n, by full name."""
    model.requires_grad_(True)
    found: dict[str, list[Tensor]] = {f"{stream.path_of(i)}.{m.name}": [] for i, ms in matrices.items() for m in ms}
    for ids_L in WINDOWS_NL:
        model.zero_grad()
        window_loss(model, ids_L).backward()
        for index, ms in matrices.items():
            name = stream.path_of(index)
            block = model.get_submodule(name)
            for m in ms:
                found[f"{name}.{m.name}"].append(of(m, block.get_parameter(m.parameter).grad).clone())
    return found


def check_close(got: Tensor, expected: Tensor, name: str, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape, name
    assert got.dtype == torch.float32, name
    apart = float((got.double() - expected.double()).norm())
    assert apart <= tolerance * float(expected.double().norm()), f"{name}: {apart:.2e} of {float(expected.norm()):.2e}"


@typical_families
def test_gradients_are_those_of_plain_autograd(family: str) -> None:
    model = live(family)
    stream = LiveStream(model)
    matrices = selected(stream, EVERYTHING)
    expected = by_autograd(deepcopy(model), stream, matrices)
    got = gradients(stream, "grad", "grad_sq", "first_grad")
    in_batches = gradients(stream, "grad")
    for index, ms in matrices.items():
        for m in ms:
            name, fields = f"{stream.path_of(index)}.{m.name}", got.fields(index, m.name)
            windows = torch.stack(expected[name])
            check_close(fields["grad_RC"], windows.sum(0), name)
            check_close(in_batches.fields(index, m.name)["grad_RC"], windows.sum(0), name)
            check_close(fields["grad_sq_RC"], windows.square().sum(0), name)
            check_close(fields["first_grad_RC"], windows[0], name)
            assert fields["grad_windows"] == len(WINDOWS_NL)
            assert (fields["grad_tokens"] > 0) == bool(windows.any()), name
    assert any(float(g.norm()) > 0 for gs in expected.values() for g in gs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gpt_neox", "gemma2", "phi3", "bloom"])
def test_output_gradients_are_those_of_hooks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = live(family)
    stream = LiveStream(model)
    sums: Counter[str] = Counter()
    grams: Counter[str] = Counter()
    twin = deepcopy(model)
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear | Conv1D):

            def watch(module: nn.Module, args: Any, out: Tensor, name: str = f"{name}.weight") -> None:
                out.register_hook(lambda g, name=name: sums.update({name: g.double().square().flatten(0, -2).sum(0)}))
                out.register_hook(lambda g, name=name: grams.update({name: g.double().flatten(0, -2).T @ g.double().flatten(0, -2)}))

            module.register_forward_hook(watch)
    draw = drawing()
    for ids_L in WINDOWS_NL:
        window_loss(twin, ids_L, draw).backward()
    monkeypatch.setattr(coupled_rows, "MOST_ROWS", 48)  # some matrices have several blocks of rows
    got = gradients(stream, "grad_out_sq", "grad_out_gram")
    for index, ms in selected(stream, EVERYTHING).items():
        for m in ms:
            fields = got.fields(index, m.name)
            size = rows_together(m.rows)
            gram_RR = grams[f"{stream.path_of(index)}.{m.name}"]
            blocks_BQQ = torch.stack([gram_RR[a : a + size, a : a + size] for a in range(0, m.rows, size)])
            check_close(fields["grad_out_gram_BQQ"], blocks_BQQ, m.name)
            check_close(fields["grad_out_sq_R"], sums[f"{stream.path_of(index)}.{m.name}"], m.name)
            assert fields["grad_tokens"] == WINDOWS_NL.numel()


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gpt_neox", "gemma2", "phi3", "bloom"])
def test_sums_of_inputs_of_the_same_forward_are_those_of_hooks(family: str) -> None:
    model = live(family)
    stream = LiveStream(model)
    matrices = selected(stream, EVERYTHING)
    sums: Counter[str] = Counter()
    twin = deepcopy(model)
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear | Conv1D):

            def watch(module: nn.Module, args: Any, name: str = f"{name}.weight") -> None:
                sums.update({name: args[0].detach().double().square().flatten(0, -2).sum(0)})

            module.register_forward_pre_hook(watch)
    for ids_L in WINDOWS_NL:
        window_loss(twin, ids_L)
    alone = gradients(stream, "grad_out_sq")
    got = loss_gradients(stream, WINDOWS_NL, matrices, frozenset({"grad_out_sq"}), inputs=frozenset({"input_sq"}))
    assert alone.inputs == {}
    check_same(stream, alone, got)
    for index, ms in matrices.items():
        for m in ms:
            stats = got.inputs[index][m.name]
            assert stats.input_sq_C is not None
            check_close(stats.input_sq_C, sums[f"{stream.path_of(index)}.{m.name}"], m.name)
            assert stats.tokens == WINDOWS_NL.numel()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_sums_of_inputs_of_experts_are_of_the_tokens_that_reached_them(family: str) -> None:
    """Every token goes from the router to as many experts as the model's configuration says."""
    stream = LiveStream(live(family))
    matrices = selected(stream, EVERYTHING)
    got = loss_gradients(stream, WINDOWS_NL, matrices, frozenset({"grad_out_sq"}), inputs=frozenset({"input_sq"}))
    chosen = stream.model.config.num_experts_per_tok
    for index, ms in matrices.items():
        first = [m for m in ms if m.expert is not None and m.columns == stream.model.config.hidden_size and m.whole.endswith("gate_up_proj")]
        routers = [m for m in ms if m.rows == len({m.expert for m in first})]
        if not first:
            continue
        (router,) = routers
        stats = {m.expert: got.inputs[index][m.name] for m in first}
        total_C = torch.stack([s.input_sq_C for s in stats.values() if s.input_sq_C is not None]).sum(0)
        entered_C = got.inputs[index][router.name].input_sq_C
        assert entered_C is not None
        check_close(total_C, chosen * entered_C, router.name)
        assert sum(s.tokens for s in stats.values()) == chosen * WINDOWS_NL.numel()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_tokens_are_those_that_reached_an_expert(family: str) -> None:
    stream = LiveStream(live(family))
    got = gradients(stream, "grad_out_sq")
    for index, ms in selected(stream, EVERYTHING).items():
        tokens: Counter[str] = Counter()
        for m in {m.whole: m for m in ms}.values():
            tokens[m.parameter] += got.fields(index, m.name)["grad_tokens"]
        experts = {m.parameter for m in ms if m.expert is not None}
        chosen = stream.model.config.num_experts_per_tok
        count = stream.model.config.num_local_experts if family == "llama4_text" else chosen  # which multiplies all tokens by all experts
        assert all(tokens[p] == count * WINDOWS_NL.numel() for p in experts)


@pytest.mark.parametrize("family", ["llama", "mixtral", "mamba", "gemma4_text"])
def test_kept_in_a_file_is_the_same_to_the_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = LiveStream(live(family))
    in_memory = gradients(stream, *GRADIENTS)
    monkeypatch.setattr("llmprune.stream.hidden_states.memory_limit", lambda: 0)
    assert isinstance(Flow(stream, WINDOWS_NL).hidden, FileHidden)
    in_file = gradients(stream, *GRADIENTS)
    check_same(stream, in_memory, in_file)


@pytest.mark.parametrize("family", ["llama_tied", "mixtral", "gpt2", "qwen3_next", "nemotron_h"])
def test_a_checkpoint_gives_what_its_live_model_gives(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "m", torch.float32)
    stored = CheckpointStream(open_folder(tmp_path / "m", "m"), torch.float32, CPU)
    check_same(stored, gradients(LiveStream(live(family)), *GRADIENTS), gradients(stored, *GRADIENTS))
    assert all(p.is_meta for p in stored.skeleton.parameters())


def check_same(stream: Stream, left: LossGradients, right: LossGradients) -> None:
    for index, ms in selected(stream, EVERYTHING).items():
        for m in ms:
            fields, others = left.fields(index, m.name), right.fields(index, m.name)
            assert fields.keys() == others.keys()
            for key, value in fields.items():
                assert torch.equal(value, others[key]) if isinstance(value, Tensor) else value == others[key], (m.name, key)


def test_bfloat16_gives_nearly_the_same() -> None:
    model = live("llama", torch.bfloat16)
    coarse, fine = LiveStream(model), LiveStream(deepcopy(model).float())
    got, expected = gradients(coarse, "grad"), gradients(fine, "grad")
    for index, ms in selected(coarse, EVERYTHING).items():
        for m in ms:
            check_close(got.fields(index, m.name)["grad_RC"], expected.fields(index, m.name)["grad_RC"], m.name, 0.1)


def test_float32_residuals_of_a_half_precision_model_wait_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba's blocks take bfloat16 embeddings and go on in float32."""
    stream = LiveStream(live("mamba", torch.bfloat16))
    in_memory = gradients(stream, "grad")
    monkeypatch.setattr("llmprune.stream.hidden_states.memory_limit", lambda: 0)
    check_same(stream, in_memory, gradients(stream, "grad"))


def test_a_live_model_is_left_as_it_was() -> None:
    model = live("qwen3_moe")
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.get_input_embeddings().requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    gradients(LiveStream(model), "grad")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_matrices_that_share_an_input_get_gradients_of_their_own() -> None:
    stream = LiveStream(live("llama"))
    got = gradients(stream, "grad", "grad_out_sq")
    shared = Stats(tokens=3, input_sq_C=torch.ones(32))
    statistics = {"self_attn.q_proj.weight": shared, "self_attn.k_proj.weight": shared}
    got.add_to(1, statistics)
    q, k = statistics.values()
    assert q.grad_RC is not None
    assert k.grad_RC is not None
    assert q.grad_RC.shape != k.grad_RC.shape
    assert shared.grad_RC is None
    for stats in (q, k):
        assert stats.input_sq_C is shared.input_sq_C
        assert stats.factors is shared.factors
        assert stats.tokens == 3
        assert stats.grad_sq_RC is None


def test_only_what_is_asked_is_summed() -> None:
    stream = LiveStream(live("llama"))
    got = loss_gradients(stream, WINDOWS_NL, selected(stream, Selection(only="o_proj")), frozenset({"grad_out_sq", "input_sq"}))
    fields = got.fields(0, "self_attn.o_proj.weight")
    assert fields.keys() == {"grad_out_sq_R", "grad_tokens", "grad_windows"}
    with pytest.raises(KeyError):
        got.fields(0, "self_attn.q_proj.weight")


def test_one_window_is_enough_for_the_first() -> None:
    stream = LiveStream(live("llama"))
    name = "mlp.down_proj.weight"
    alone, among = gradients(stream, "first_grad").fields(1, name), gradients(stream, "first_grad", "grad").fields(1, name)
    assert torch.equal(alone["first_grad_RC"], among["first_grad_RC"])
    assert (alone["grad_windows"], among["grad_windows"]) == (1, len(WINDOWS_NL))


def test_progress_counts_both_ways() -> None:
    stream = LiveStream(live("llama"))
    seen: list[tuple[int, int]] = []
    loss_gradients(
        stream, WINDOWS_NL, selected(stream, EVERYTHING), frozenset({"grad"}), Listener(progress=lambda step, done, total: seen.append((done, total)))
    )
    assert seen == [(i + 1, 6) for i in range(6)]


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    model = live("llama")
    model.get_output_embeddings().weight.data[5] = torch.inf
    with pytest.raises(StoppedError, match=r"gradient of the loss is not finite"):
        gradients(LiveStream(model), "grad")


def linear_block(weight_RC: Tensor) -> tuple[nn.Module, list[Matrix]]:
    block = nn.Sequential(nn.Linear(weight_RC.shape[1], weight_RC.shape[0], bias=False)).requires_grad_(False)
    block[0].weight.data.copy_(weight_RC)
    return block, [Matrix("0.weight", "0.weight", None, False, *weight_RC.shape)]


def test_a_matrix_used_twice_has_one_gradient_a_window() -> None:
    """(g1 + g2) ** 2, not g1 ** 2 + g2 ** 2."""
    block, matrices = linear_block(torch.randn(4, 4))
    taps = Taps(block, matrices, frozenset({"grad", "grad_sq"}))
    weight_RC = block[0].weight.detach().clone().requires_grad_()
    total_RC, squares_RC = torch.zeros(4, 4), torch.zeros(4, 4)
    for value_TC in torch.randn(3, 5, 4):
        with taps:
            out = block(block(value_TC.clone().requires_grad_()))
        out.square().sum().backward()
        taps.next_batch()
        (gradient_RC,) = torch.autograd.grad(F.linear(F.linear(value_TC, weight_RC), weight_RC).square().sum(), weight_RC)
        total_RC += gradient_RC
        squares_RC += gradient_RC.square()
    check_close(taps.sums["grad", "0.weight"], total_RC, "grad")
    check_close(taps.sums["grad_sq", "0.weight"], squares_RC, "grad_sq")
    assert taps.tokens["0.weight"] == 30


def test_an_input_that_does_not_come_from_the_block_counts_too_and_a_dead_product_does_not_hurt() -> None:
    block, matrices = linear_block(torch.randn(4, 4))
    taps = Taps(block, matrices, frozenset({"grad", "grad_sq"}))
    value_TC = torch.randn(5, 4)
    with taps:
        out = block(value_TC)
        block(value_TC)
    out.sum().backward()
    taps.next_batch()
    check_close(taps.sums["grad", "0.weight"], torch.ones(5, 4).T @ value_TC, "grad")


def test_an_input_changed_in_place_is_refused() -> None:
    block, matrices = linear_block(torch.randn(4, 4))
    taps = Taps(block, matrices, frozenset({"grad"}))
    value_TC = torch.randn(5, 4, requires_grad=True) * 1
    with taps:
        out = block(value_TC)
    value_TC.add_(1)
    with pytest.raises(StoppedError, match="in place"):
        out.sum().backward()


@typical_families
def test_the_metric_of_a_block_is_that_of_the_gradients_at_its_outputs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor L of G_d: an error e counts as e G_d e^T, in blocks of rows too."""
    monkeypatch.setattr(coupled_rows, "MOST_ROWS", 8)
    model = live(family)
    stream = LiveStream(model)
    found = loss_gradients(stream, WINDOWS_NL, selected(stream, EVERYTHING), frozenset({"grad_out_sq"}), outputs=True)
    seen: dict[str, Tensor] = {}

    def kept(name: str, out: Any) -> None:
        seen[name] = out[0] if isinstance(out, tuple) else out
        seen[name].retain_grad()

    plain = deepcopy(model).requires_grad_(True)
    names = [stream.path_of(index) for index in range(len(stream.names))]
    for name in names:
        plain.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: kept(name, out))
    grams: dict[str, Tensor] = {}
    draw = drawing()
    for ids_L in WINDOWS_NL:
        window_loss(plain, ids_L, draw).backward()
        for name in names:
            gradient_TD = seen[name].grad.flatten(0, -2).double()
            grams[name] = grams.get(name, 0) + gradient_TD.T @ gradient_TD
    for index, name in enumerate(names):
        root_BQQ, size = found.metric(index), rows_together(len(grams[name]))
        assert root_BQQ is not None
        tokens = seen[name].numel() // len(grams[name]) * len(WINDOWS_NL)
        error_TD = torch.randn(7, len(grams[name]))
        share = max(0.1, 1 / (1 + 0.1 * tokens / size))
        weighed = (1 - share) * grams[name] / grams[name].diagonal().mean() + share * torch.eye(len(grams[name]))
        expected = sum(
            torch.einsum("tq,qk,tk->t", part := error_TD[:, at : at + size].double(), weighed[at : at + size, at : at + size], part)
            for at in range(0, len(weighed), size)
        )
        check_close(felt(error_TD, root_BQQ).square().sum(-1), expected, name, 1e-4)
