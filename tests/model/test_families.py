"""Every family through the block stream, held against plain transformers: same activations, same statistics, loadable results, exact zeros."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, HEADS, REFUSED, TOKENS, TYPICAL, VOCABULARY, save_tiny, tiny_model, tiny_windows
from often import often
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from llmprune.allocation.uniform import Uniform
from llmprune.checkpoint.sink import Sink
from llmprune.checkpoint.source import open_folder
from llmprune.criteria.magnitude import Magnitude
from llmprune.criteria.wanda import Wanda
from llmprune.engine import prune
from llmprune.errors import RequestError, StoppedError
from llmprune.model.blocks import Walk
from llmprune.model.matrices import Selection, block_matrices
from llmprune.model.skeleton import build_skeleton
from llmprune.patterns.nm import NM
from llmprune.patterns.unstructured import Unstructured
from llmprune.pruners.block_pruner import BlockPruner
from llmprune.pruners.choice import fine_pruner
from llmprune.pruners.plan import Plan, Work
from llmprune.results import BlockReport
from llmprune.solvers.mask_only import MaskOnly
from llmprune.solvers.sparsegpt import SparseGPT
from llmprune.statistics.stages import at_once
from llmprune.statistics.sums import Watch
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.clock import Clock
from llmprune.stream.flow import Flow
from llmprune.stream.hidden_states import FileHidden, MemoryHidden
from llmprune.stream.live import LiveStream
from llmprune.stream.selected import selected, stored_matrices
from llmprune.types import SILENT, Stat

CPU = torch.device("cpu")
CANNOT_WALK = r"hidden states change between the blocks|hand on more than hidden states|more or fewer hidden states|shared with"
PLANS = {
    "wanda": Plan(Wanda(), Unstructured("row"), MaskOnly(), Uniform(), 0.5, accept_damage=True),
    "sparsegpt": Plan(None, NM(2, 4), SparseGPT(), Uniform(), 0.5, accept_damage=True),
    "magnitude": Plan(Magnitude(), Unstructured("matrix"), MaskOnly(), Uniform(), 0.5, accept_damage=True),
}
ALL_STATISTICS: frozenset[Stat] = frozenset({"gram", "input_sq"})
WINDOWS_NL = tiny_windows(6, 16)

every_family = pytest.mark.parametrize("family", FAMILIES)
typical_families = pytest.mark.parametrize("family", often(FAMILIES, *TYPICAL))


def in_full_for_typical(cases: Iterable[Any], least: Any) -> list[Any]:
    """(family, case): every family with one case, typical families with all, every time."""
    cases = list(cases)
    every = [(family, case) for family in FAMILIES for case in cases]
    return often(every, *((family, case) for family, case in every if family in TYPICAL or case is least))


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and micro-batches of 4 and 2 windows."""
    monkeypatch.setitem(sys.modules["llmprune.stream.flow"].TOKENS_PER_BATCH, "cpu", 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a family's tiny checkpoint, of several small shards; made once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = save_tiny(family, tmp_path_factory.mktemp(family), dtype, max_shard_size="20KB")
        return made[family, dtype]

    return get


def plain(folder: Path, **options: Any) -> Any:
    """What any user of transformers gets. torch takes another matrix kernel for weights that require gradients, even when none are computed,
    and on some processors it rounds otherwise: so they do not.
    """
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval().requires_grad_(False)


def open_stream(folder: Path, dtype: torch.dtype = torch.float32) -> CheckpointStream:
    return CheckpointStream(open_folder(folder, folder.name), dtype, CPU)


def by(plan: Plan, stream: Any) -> BlockPruner:
    """The plan's pruner of all matrices, each at the plan's sparsity."""
    work = Work(stream, WINDOWS_NL, plan, selected(stream, Selection()))
    return fine_pruner(work, dict.fromkeys(work.sizes, plan.sparsity))


def prune_to(folder: Path, output: Path, plan: Plan) -> tuple[CheckpointStream, Sink, list[BlockReport]]:
    stream = open_stream(folder)
    sink = Sink(output, stream.source)
    sink.lay_out()
    stream.write_to(sink)
    reports = prune(stream, WINDOWS_NL, by(plan, stream), {}, SILENT)
    sink.finish()
    return stream, sink, reports


def raw_tensors(folder: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(header of each weight file, bytes of each tensor), read without any of our code."""
    headers, tensors = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + struct.unpack("<Q", data[:8])[0]
        headers[path.name] = data[:start]
        for key, entry in json.loads(data[8:start]).items():
            if key != "__metadata__":
                a, b = entry["data_offsets"]
                tensors[key] = data[start + a : start + b]
    return headers, tensors


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def first_of(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple | list) else value


# --- the same activations ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "dtype"), in_full_for_typical([torch.float32, torch.bfloat16], torch.float32))
@torch.no_grad()
def test_replay_equals_forward(saved: Callable[..., Path], family: str, dtype: torch.dtype) -> None:
    model = plain(saved(family), dtype=dtype, experts_implementation="eager")
    stream = open_stream(saved(family), dtype)
    left: dict[str, list[Tensor]] = {name: [] for name in stream.names}
    for name in stream.names:
        model.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: left[name].append(side_by_side(first_of(out))))
    flow = Flow(stream, WINDOWS_NL)
    logits = [model(ids_NL, use_cache=False).logits for ids_NL in flow.ids]

    assert [len(ids_NL) for ids_NL in flow.ids] == [4, 2]
    for index, name in enumerate(stream.names):
        with stream.block(index) as block:
            flow.through(index, block)
        for batch in range(len(flow)):
            assert torch.equal(flow.hidden[batch], left[name][batch]), name
    with stream.outer():
        for batch, ids_NL in enumerate(flow.ids):
            assert torch.equal(stream.walk.logits(ids_NL, flow.hidden[batch]), logits[batch])


def side_by_side(hidden: Tensor) -> Tensor:
    """[N, L, D]: of several residual streams [S, N, L, D / S] too."""
    return hidden.permute(1, 2, 0, 3).flatten(2) if hidden.dim() == 4 else hidden


@typical_families
@torch.no_grad()
def test_the_head_one_window_at_a_time(saved: Callable[..., Path], family: str) -> None:
    """Matrix products of other shapes round differently: float32 noise, no more."""
    model = plain(saved(family), dtype=torch.float32, experts_implementation="eager")
    flow = Flow(open_stream(saved(family)), WINDOWS_NL)
    for index in range(len(flow.stream.names)):
        with flow.stream.block(index) as block:
            flow.through(index, block)
    pairs = list(flow.logits())
    assert torch.equal(torch.cat([ids for ids, _ in pairs]), WINDOWS_NL)
    expected = torch.cat([model(ids_NL, use_cache=False).logits for ids_NL in flow.ids])
    torch.testing.assert_close(torch.cat([logits for _, logits in pairs]), expected)


@every_family
def test_no_weight_stays_in_memory(saved: Callable[..., Path], family: str) -> None:
    stream = open_stream(saved(family))
    Flow(stream, WINDOWS_NL)
    for index in range(len(stream.names)):
        with stream.block(index) as block:
            assert not any(p.is_meta for p in block.parameters())
            others = [p for i, b in enumerate(stream.walk.blocks) if i != index for p in b.parameters()]
            assert all(p.is_meta for p in others)
    assert all(p.is_meta for p in stream.skeleton.parameters())


# --- the same statistics ----------------------------------------------------------------------------------------------------------------------


class Reference:
    """Inputs of every matrix of one block, by ordinary hooks on plain modules: [T, C] each."""

    def __init__(self, block: nn.Module) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.tokens: dict[str, int] = {}
        self.routed: dict[str, int] = {}  # tokens x experts per token, by experts module
        for path, module in block.named_modules():
            bare = [n for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and not isinstance(module, nn.Conv1d)]
            if bare:
                module.register_forward_pre_hook(
                    lambda m, args, kwargs, path=path, bare=bare: self.experts(path, bare, m.num_experts, args, kwargs), with_kwargs=True
                )
            elif hasattr(module, "v1"):  # DBRX, once for each expert
                module.register_forward_pre_hook(lambda m, args, path=path: self.one_expert(path, m, *args))
            elif path.endswith("x_proj"):  # Mamba's dt_proj multiplies the first part of what x_proj gives, without its module being called
                rank = block.get_submodule(path.replace("x_proj", "dt_proj")).weight.shape[1]
                module.register_forward_pre_hook(lambda m, args, path=path: self.add(f"{path}.weight", args[0]))
                module.register_forward_hook(
                    lambda m, args, out, path=path, rank=rank: self.add(f"{path.replace('x_proj', 'dt_proj')}.weight", out[..., :rank])
                )
            elif isinstance(module, nn.Linear | Conv1D) or _is_router(module):
                module.register_forward_pre_hook(lambda m, args, path=path: self.add(f"{path}.weight", args[0]))

    def add(self, name: str, value: Tensor) -> None:
        value_TC = value.reshape(-1, value.shape[-1])
        self.inputs.setdefault(name, []).append(value_TC)
        self.tokens[name] = self.tokens.get(name, 0) + len(value_TC)

    def one_expert(self, path: str, module: Any, hidden_TC: Tensor, w1: Tensor, v1: Tensor, w2: Tensor) -> None:
        number = w1.storage_offset() // w1.numel()
        self.add(f"{path}.w1[{number}]", hidden_TC)
        self.add(f"{path}.v1[{number}]", hidden_TC)
        self.add(f"{path}.w2[{number}]", module.activation_fn(hidden_TC @ w1.T) * (hidden_TC @ v1.T))

    def experts(self, path: str, parameters: list[str], experts: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (up,) = [p for p in parameters if "up" in p]
        (down,) = [p for p in parameters if "down" in p]
        if not kwargs and len(args) == 1:  # Llama 4: every token through every expert, scaled by its score
            for e, mine_TC in enumerate(args[0].view(experts, -1, args[0].shape[-1])):
                self.add(f"{path}.{up}[{e}]", mine_TC)
                self.tokens[f"{path}.{down}[{e}]"] = self.tokens[f"{path}.{up}[{e}]"]
            return
        hidden_TC, chosen_TK = (*args, *kwargs.values())[:2]
        hidden_TC = hidden_TC.reshape(-1, hidden_TC.shape[-1])
        assert chosen_TK.dtype == torch.long
        assert len(chosen_TK) == len(hidden_TC)
        self.routed[path] = self.routed.get(path, 0) + chosen_TK.numel()
        for e in range(experts):
            mine_TC = hidden_TC[(chosen_TK == e).any(-1)]
            self.add(f"{path}.{up}[{e}]", mine_TC)
            self.tokens[f"{path}.{down}[{e}]"] = self.tokens.get(f"{path}.{down}[{e}]", 0) + len(mine_TC)


def _is_router(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and own["weight"].dim() == 2 and not isinstance(module, nn.Embedding)


@every_family
@torch.no_grad()
def test_statistics_equal_those_of_hooks(saved: Callable[..., Path], family: str) -> None:
    model = plain(saved(family), dtype=torch.float32, experts_implementation="eager")
    stream = open_stream(saved(family))
    references = [Reference(model.get_submodule(name)) for name in stream.names]
    flow = Flow(stream, WINDOWS_NL)
    for ids_NL in flow.ids:
        model(ids_NL, use_cache=False)

    for index, reference in enumerate(references):
        with stream.block(index) as block:
            matrices = block_matrices(block)
            stats = at_once(flow, index, block, matrices, ALL_STATISTICS, Clock())
            flow.advance()
        assert {m.name for m in matrices} >= reference.inputs.keys()
        for matrix in matrices:
            assert stats[matrix.name].tokens == reference.tokens.get(matrix.name, 0), matrix.name
            if matrix.name in reference.inputs and stats[matrix.name].tokens:
                input_TC = torch.cat(reference.inputs[matrix.name])
                gram_CC = input_TC.T.double() @ input_TC.double()
                scale_C = gram_CC.diagonal().sqrt()  # entries are sums that may cancel: what rounding leaves goes with the norms
                assert bool(((stats[matrix.name].gram_CC - gram_CC).abs() <= 1e-6 * scale_C * scale_C[:, None]).all()), matrix.name
                torch.testing.assert_close(stats[matrix.name].input_sq_C, input_TC.square().sum(0), rtol=1e-5, atol=1e-5)
        for path, routed in reference.routed.items():
            ups = [m.name for m in matrices if m.name.startswith(f"{path}.") and "up" in m.parameter]
            assert sum(stats[name].tokens for name in ups) == routed > 0


# --- pruned checkpoints -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "method"), in_full_for_typical(PLANS, "wanda"))
def test_pruned_checkpoint(saved: Callable[..., Path], tmp_path: Path, family: str, method: str) -> None:
    source, output, plan = saved(family), tmp_path / "out", PLANS[method]
    before = digests(source)
    stream, sink, reports = prune_to(source, output, plan)
    assert digests(source) == before

    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    dense = dict(plain(source).named_parameters())
    pruned = set()
    rows = {row.matrix: row for report in reports for row in report.rows}
    for index, name in enumerate(stream.names):
        block = model.get_submodule(name)
        for matrix in stored_matrices(stream, index, block):
            full = f"{name}.{matrix.name}"
            if not Selection().takes(full):
                assert full not in rows
                continue
            zero_RC = matrix.view(block) == 0
            row = rows.pop(full)
            pruned.add(f"{name}.{matrix.parameter}")
            assert zero_RC.shape == (row.rows, row.columns)
            assert int(zero_RC.sum()) == row.zeros == matrix.rows * matrix.columns // 2, full
            if method == "wanda":
                assert bool((zero_RC.sum(1) == matrix.columns // 2).all()), full
            if method == "sparsegpt":
                assert bool((zero_RC.view(matrix.rows, -1, 4).sum(-1) == 2).all()), full
    assert not rows
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dense[name]) == (name not in pruned), name

    headers, tensors = raw_tensors(output)
    headers_before, tensors_before = raw_tensors(source)
    assert headers == headers_before
    assert {key for key in tensors if tensors[key] != tensors_before[key]} == set(sink.written)
    assert (output / "config.json").read_bytes() == (source / "config.json").read_bytes()


@every_family
def test_sparsity_zero_is_a_copy(saved: Callable[..., Path], tmp_path: Path, family: str) -> None:
    plan = Plan(Wanda(), Unstructured("row"), MaskOnly(), Uniform(), 0.0)
    _, sink, reports = prune_to(saved(family), tmp_path / "out", plan)
    assert sink.written
    assert all(report.output_error == 0 for report in reports)
    files = {name: d for name, d in digests(saved(family)).items() if name.endswith((".safetensors", ".json"))}
    assert digests(tmp_path / "out") == files


@typical_families
def test_live_model_equals_checkpoint(saved: Callable[..., Path], tmp_path: Path, family: str) -> None:
    folder = saved(family, torch.float32)
    _, _, reports = prune_to(folder, tmp_path / "out", PLANS["sparsegpt"])
    model = plain(folder)
    model.set_experts_implementation("eager")
    stream = LiveStream(model)
    assert prune(stream, WINDOWS_NL, by(PLANS["sparsegpt"], stream), {}, SILENT) == reports
    for (name, live), stored in zip(model.named_parameters(), plain(tmp_path / "out").parameters(), strict=True):
        assert torch.equal(live, stored), name


@pytest.mark.parametrize("family", often(FAMILIES, "llama", "gemma4_text", "mamba", "qwen3_moe"))
def test_hidden_states_in_a_file(saved: Callable[..., Path], tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open_stream(saved(family))
    assert isinstance(Flow(stream, WINDOWS_NL).hidden, MemoryHidden)
    _, in_memory, reports = prune_to(saved(family), tmp_path / "memory", PLANS["wanda"])
    monkeypatch.setattr("llmprune.stream.hidden_states.memory_limit", lambda: 0)
    assert isinstance(Flow(stream, WINDOWS_NL).hidden, FileHidden)
    _, in_file, same = prune_to(saved(family), tmp_path / "file", PLANS["wanda"])
    assert same == reports
    assert in_file.written == in_memory.written
    assert digests(tmp_path / "file") == digests(tmp_path / "memory")


# --- what is refused --------------------------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """The smallest model that can be walked; ``between`` is what it does with what a block returns, ``rounds`` how often it runs them all."""

    def __init__(self, between: Callable[[Any], Tensor], rounds: int = 1) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="toy", num_hidden_layers=3, get_text_config=lambda decoder: self.config)
        self.all_tied_weights_keys: dict[str, str] = {}
        self.between, self.rounds = between, rounds
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, VOCABULARY)

    def get_decoder(self) -> nn.Module:
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden_NLD = self.embed(input_ids)
        for _ in range(self.rounds):
            for layer in self.layers:
                hidden_NLD = self.between(layer(hidden_NLD))
        return SimpleNamespace(logits=self.head(hidden_NLD))


def unpack_two(out: Any) -> Tensor:
    hidden_NLD, _ = out
    return hidden_NLD


@torch.no_grad()
@pytest.mark.parametrize(
    "between", [lambda h: h, lambda h: h[:, slice(0, None)], lambda h: h[0], unpack_two], ids=["as it is", "view of all", "tuple", "two values"]
)
def test_a_straight_walk_is_recorded(between: Callable[[Any], Tensor]) -> None:
    walk = Walk(Toy(between))
    hidden_NLD, calls = walk.record(WINDOWS_NL)
    assert torch.equal(hidden_NLD, walk.model.embed(WINDOWS_NL))
    assert len(calls) == 3
    assert torch.equal(walk.logits(WINDOWS_NL, 2 * hidden_NLD), walk.model.head(2 * hidden_NLD))


@torch.no_grad()
@pytest.mark.parametrize(
    "between",
    [lambda h: h * 0.5, lambda h: h.mul_(0.5), lambda h: h.clone(), lambda h: h.mT, lambda h: h[:, :4], lambda h: h[1], lambda h: h + h],
    ids=["scaled", "in place", "copy", "transposed", "cut", "second value", "added"],
)
def test_changes_between_blocks_are_refused(between: Callable[[Any], Tensor]) -> None:
    for ids_NL in (WINDOWS_NL, WINDOWS_NL[:1], WINDOWS_NL[:2]):
        with pytest.raises(RequestError, match="hidden states change between the blocks"):
            Walk(Toy(between)).record(ids_NL)


@torch.no_grad()
def test_looped_blocks_are_refused() -> None:
    with pytest.raises(RequestError, match="6 runs of its 3 blocks"):
        Walk(Toy(lambda h: h, rounds=2)).record(WINDOWS_NL)


@torch.no_grad()
def test_the_reason_why_a_walk_fails_is_given() -> None:
    with pytest.raises(RequestError, match=r"no single list of decoder blocks; module lists: transformer\.attentions"):
        Walk(AutoModelForCausalLM.from_config(CONFIG_MAPPING["xlm"](emb_dim=32, n_heads=4, n_layers=2, vocab_size=VOCABULARY)))


@torch.no_grad()
def test_blocks_are_counted_where_the_config_counts_others() -> None:
    """BART's num_hidden_layers is that of the encoder, which a causal LM does not have."""
    values = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["bart"](vocab_size=VOCABULARY, **values)).eval()
    walk = Walk(model)
    assert (walk.path, len(walk.blocks)) == ("model.decoder.layers", 3)
    hidden_NLD, calls = walk.record(WINDOWS_NL)
    for block, call in zip(walk.blocks, calls, strict=True):
        hidden_NLD = walk.replay(block, hidden_NLD, call)
    assert torch.equal(walk.logits(WINDOWS_NL, hidden_NLD), model(WINDOWS_NL, use_cache=False).logits)


def test_a_config_that_counts_attentions_holds_half_as_many_blocks() -> None:
    values = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "n_routed_experts": 4, "zero_expert_num": 1}
    config = CONFIG_MAPPING["longcat_flash"](**values).to_dict() | {"num_hidden_layers": 4}
    assert len(Walk(build_skeleton(config, torch.float32, stored=2)).blocks) == 2
    with pytest.raises(RequestError, match="num_hidden_layers is 2, the weights hold 1 blocks"):
        build_skeleton(config, torch.float32, stored=1)


@pytest.mark.parametrize("method", PLANS)
def test_a_linear_without_tokens_is_pruned_by_magnitude(tmp_path: Path, method: str) -> None:
    """X-MOD multiplies no tokens by the adapters of other languages, but multiplies."""
    values = TOKENS | HEADS | {"hidden_size": 32, "intermediate_size": 48, "languages": ["en_XX", "de_DE"], "default_language": "en_XX"}
    config = CONFIG_MAPPING["xmod"](is_decoder=True, max_position_embeddings=64, **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    _, _, reports = prune_to(tmp_path / "source", tmp_path / "out", replace(PLANS[method], asymmetric=method == "sparsegpt"))
    rows = {row.matrix: row for report in reports for row in report.rows}
    assert [row.tokens for name, row in rows.items() if "de_DE" in name] == [0] * 4
    assert all(row.zeros * 2 == row.size for row in rows.values())


@torch.no_grad()
def test_recording_leaves_no_trace_in_a_model() -> None:
    """BigBird turns to full attention for good when it sees a window that is too short for blocks."""
    values = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "block_size": 4, "num_random_blocks": 1}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["big_bird"](vocab_size=VOCABULARY, is_decoder=True, **values)).eval()
    Walk(model).record(tiny_windows(2, 64))
    assert model.bert.attention_type == "block_sparse"


@pytest.mark.parametrize("family", REFUSED)
@torch.no_grad()
def test_architectures_that_carry_state_are_refused(tmp_path: Path, family: str) -> None:
    folder = save_tiny(family, tmp_path / "source")
    with pytest.raises(RequestError, match=CANNOT_WALK):
        Flow(open_stream(folder), WINDOWS_NL)
    with pytest.raises(RequestError, match=CANNOT_WALK):
        Flow(LiveStream(tiny_model(family)), WINDOWS_NL)


def test_blocks_with_a_shared_weight_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(RequestError, match=r"model.layers.2.mlp.gate_proj.weight: shared with block 0"):
        LiveStream(model)


def test_a_matrix_used_the_other_way_round_is_refused() -> None:
    """A square stack of experts taken for [R, C] but multiplied as [C, R] has the right shape and the wrong columns."""
    block = nn.Module()
    block.stack = nn.Parameter(torch.randn(2, 8, 8), requires_grad=False)
    matrices = block_matrices(block)
    value = torch.randn(2, 5, 8)
    for use in (lambda: torch.bmm(value, block.stack), lambda: value[1] @ block.stack[1]):
        with pytest.raises(StoppedError, match=r"stack.*transposed"), Watch(block, matrices, frozenset({"gram"})):
            use()
    watching = Watch(block, matrices, frozenset({"gram"}))
    with watching:
        torch.bmm(value, block.stack.mT)
    watching.close()
    assert torch.allclose(watching.stats["stack[1]"].gram_CC, value[1].T @ value[1])


def test_experts_without_tokens_share_nothing() -> None:
    """Empty tensors have one address: two experts without tokens in the first batch get inputs of their own in the second."""
    block = nn.Module()
    block.stack = nn.Parameter(torch.randn(2, 4, 8), requires_grad=False)
    watching = Watch(block, block_matrices(block), frozenset({"input_sq"}))
    inputs = torch.randn(2, 5, 8)
    for count in (0, 5):
        with watching:
            for e in range(2):
                nn.functional.linear(inputs[e, :count], block.stack[e])
        watching.next_batch()
    watching.close()
    for e in range(2):
        assert torch.allclose(watching.stats[f"stack[{e}]"].input_sq_C, inputs[e].square().sum(0))
