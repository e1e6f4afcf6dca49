"""Blocks that hand on more than hidden states: the next block gets what the one before it has returned, in every pass, and gradients flow back.

GLM-5 (glm_moe_dsa) and HY-V4 hand on which tokens the indexer of a block has chosen; a block of theirs may have no indexer of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import TOKENS, uneven
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llmprune
from llmprune.checkpoint.source import open_folder
from llmprune.errors import RequestError
from llmprune.model.carried import Handed
from llmprune.model.matrices import block_matrices
from llmprune.run.prepare import open_stream
from llmprune.statistics.gradients import SEED, loss_gradients
from llmprune.stream.flow import Flow
from llmprune.stream.stream import Stream
from llmprune.types import SILENT, Stats

SIZES = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "head_dim": 8}
INDEXED = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 2, "indexer_types": ["full", "shared", "full", "shared"]}
KINDS = ("glm_moe_dsa", "hy_v4")
IDS = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")
ACROSS: list[tuple[dict[str, Any], str]] = [
    ({"pattern": "layers", "sparsity": 0.5}, "pattern layers"),
    ({"pattern": "2:4", "polish": "kd"}, "polish"),
]


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    more = {"hc_mult": 2} if kind == "hy_v4" else {}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**TOKENS | SIZES | LATENT | EXPERTS | INDEXED | more))
    uneven(model)
    return model.eval()


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    made = model_of(request.param)
    made.save_pretrained(tmp_path / "model")
    made.set_experts_implementation("eager")
    return made


@torch.no_grad()
def test_the_blocks_walked_one_by_one_are_the_model(model: Any, tmp_path: Path) -> None:
    stream = open_stream(open_folder(tmp_path / "model", "model"), torch.float32, CPU)
    flow = Flow(stream, IDS, 2)
    other = flow.twin()
    for index in range(4):
        with stream.block(index) as block:
            flow.through(index, block)
            flow.hidden, flow.outputs = flow.outputs, flow.hidden  # once more: a block may run as often as its pruning needs
            flow.through(index, block)
            if index == 1:  # reads what block 0 has left; a twin has values of its own, and none was made
                with pytest.raises(KeyError):
                    other.run(index, block, 0)
    wanted = torch.cat([model(input_ids=ids_1L, use_cache=False).logits for ids_1L in IDS.split(1)])
    torch.testing.assert_close(torch.cat([logits for _, logits in flow.logits()]), wanted, rtol=1e-5, atol=1e-5)


def test_only_the_last_two_blocks_values_are_kept() -> None:
    handed = Handed()
    for block in range(4):
        handed.put(block, ("a", "b"))
    assert set(handed) == {(2, 1), (2, 2), (3, 1), (3, 2)}
    handed.put(3, ("c",))
    assert dict(handed) == {(2, 1): "a", (2, 2): "b", (3, 1): "c"}


def test_gradients_flow_back_through_what_is_handed_on(model: Any, tmp_path: Path) -> None:
    check_gradients(open_stream(open_folder(tmp_path / "model", "model"), torch.float32, CPU), model)


def check_gradients(stream: Stream, model: Any) -> None:
    """Squared output gradients of every Linear, found block by block, are those of the model."""
    matrices = {i: block_matrices(block) for i, block in enumerate(stream.walk.blocks)}
    found = loss_gradients(stream, IDS, matrices, frozenset({"grad_out_sq"}), SILENT)
    wanted = gradients_by_hooks(model, stream.walk.path)
    for i, ms in matrices.items():
        stats = {m.name: Stats() for m in ms}
        found.add_to(i, stats)
        for m in ms:
            if (i, m.name) in wanted:
                ours_R, theirs_R = stats[m.name].grad_out_sq_R, wanted[i, m.name]
                assert float((ours_R - theirs_R).abs().max() / theirs_R.abs().max().clamp_min(1e-30)) < 1e-5, (i, m.name)


def gradients_by_hooks(model: Any, path: str) -> dict[tuple[int, str], Tensor]:
    """Sums of squared output gradients of every Linear, by the model's own forward and backward."""
    sums: dict[tuple[int, str], Tensor] = {}

    def watch(place: tuple[int, str], module: torch.nn.Module) -> None:
        def add(module: Any, into: Any, out: Any) -> None:
            sums[place] = sums.get(place, 0) + out[0].double().square().flatten(0, -2).sum(0)

        module.register_full_backward_hook(add)

    for i, block in enumerate(model.get_submodule(path)):
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                watch((i, f"{name}.weight"), module)
    draw = torch.Generator().manual_seed(SEED)  # of targets from the predictions
    for ids_1L in IDS.split(1):
        logits_LV = model(input_ids=ids_1L, use_cache=False).logits[0, :-1].float()
        at_L1 = torch.rand(len(logits_LV), 1, generator=draw)
        targets_L = (logits_LV.detach().double().softmax(-1).cumsum(-1) < at_L1).sum(-1)
        F.cross_entropy(logits_LV, targets_L, reduction="sum").backward()
    return sums


@pytest.mark.parametrize("live", [False, True], ids=["folder", "live"])
def test_such_a_model_is_pruned_by_the_default_quality_and_loads(model: Any, tmp_path: Path, live: bool) -> None:
    where = {} if live else {"output": str(tmp_path / "out")}
    report = llmprune.prune(model if live else tmp_path / "model", pattern="2:4", calibration=IDS, accept_damage=True, **where)
    assert all(row.zeros * 2 == row.rows * row.columns for row in report.rows)
    if not live:
        assert report.reloaded.difference == 0


@pytest.mark.parametrize(
    ("options", "said"), [({"pattern": "layers", "sparsity": 0.5}, "pattern layers"), ({"pattern": "2:4", "polish": "kd"}, "polish")]
)
def test_what_would_drop_or_train_across_blocks_is_refused(model: Any, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=f"^{said} with .*, whose blocks hand on more than hidden states"):
        llmprune.prune(tmp_path / "model", calibration=IDS, output=str(tmp_path / "out"), accept_damage=True, **options)
