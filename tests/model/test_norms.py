"""Which norm feeds a matrix, and by what it multiplies, against what transformers' own norms compute."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model, tiny_windows
from torch import nn

import llmprune
from llmprune.model.matrices import block_matrices
from llmprune.statistics.norms import effective_scale, norm_scales
from llmprune.stream.flow import Flow
from llmprune.stream.live import LiveStream

IDS_NL = tiny_windows()
FED = {
    "llama": {"input_layernorm": ["q_proj", "k_proj", "v_proj"], "post_attention_layernorm": ["gate_proj", "up_proj"]},
    "gemma2": {"input_layernorm": ["q_proj", "k_proj", "v_proj"], "pre_feedforward_layernorm": ["gate_proj", "up_proj"]},
    "gpt2": {"ln_1": ["c_attn"], "ln_2": ["c_fc"]},
    "gpt_neox": {"input_layernorm": ["query_key_value"], "post_attention_layernorm": ["dense_h_to_4h"]},
    "mixtral": {"input_layernorm": ["q_proj", "k_proj", "v_proj"], "post_attention_layernorm": ["gate_up_proj"]},
    "olmo2": {},  # its norms come behind the matrices
    "phi": {"input_layernorm": ["q_proj", "k_proj", "v_proj", "fc1"]},
}


@pytest.mark.parametrize("family", FED)
@torch.no_grad()
def test_norms_and_scales_are_found(family: str) -> None:
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    stream = LiveStream(model)
    flow = Flow(stream, IDS_NL)
    with stream.block(0) as block:
        found = norm_scales(
            block, [m for m in block_matrices(block) if "router" not in m.name and ".gate." not in m.name], lambda: flow.run(0, block, 0)
        )
        expected = {}
        for norm, ends in FED[family].items():
            weight = block.get_submodule(norm).weight
            scale_C = 1 + weight if family == "gemma2" else weight
            expected |= {m.name: scale_C for m in block_matrices(block) if m.parameter.removesuffix(".weight").rpartition(".")[2] in ends}
    assert found.keys() == expected.keys()
    for name, scale_C in expected.items():
        torch.testing.assert_close(found[name], scale_C, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [nn.LayerNorm(33), nn.RMSNorm(33), nn.LayerNorm(32), nn.RMSNorm(32)], ids=str)
def test_scales_are_the_weights_of_plain_norms(norm: nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in norm.parameters():
        parameter.data.normal_()
    torch.testing.assert_close(effective_scale(norm), norm.weight.detach(), rtol=1e-4, atol=1e-4)


def test_a_matrix_without_a_norm_is_ranked_by_magnitude_and_says_so() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    report = llmprune.prune(model, 0.5, calibration=IDS_NL, criterion="norm_scale")
    llmprune.prune(plain, 0.5, calibration=IDS_NL, criterion="magnitude", group="row")
    for row in report.rows:
        alone = row.matrix.endswith(("o_proj.weight", "down_proj.weight"))
        assert row.notes == (("no norm of its block feeds it: ranked by magnitude",) if alone else ())
        same = torch.equal(model.get_parameter(row.matrix), plain.get_parameter(row.matrix))
        assert same == alone, row.matrix
