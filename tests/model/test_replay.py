"""Before any work, one window through the model's own forward and through its blocks: what predicts differently is refused, not measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import BASE, FAMILIES, VOCABULARY, save_tiny, tiny_model, tiny_windows
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llmprune
from llmprune.checkpoint.source import open_folder
from llmprune.errors import RequestError
from llmprune.evaluation.replay import check_replay, difference
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.live import LiveStream

IDS_1L = tiny_windows(1)
ASK: dict[str, Any] = {"sparsity": 0.5, "method": "magnitude", "calibration": tiny_windows(), "accept_damage": True}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_predicts_alike(family: str, tmp_path: Path) -> None:
    """From the checkpoint, with one block in memory at a time; what is checked is transformers' own forward."""
    model = tiny_model(family)
    save_tiny(family, tmp_path / "model", torch.float32)
    stream = CheckpointStream(open_folder(tmp_path / "model", "model"), torch.float32, torch.device("cpu"))
    seen = []
    real = type(stream.walk).forward

    def forward(*args: Any) -> torch.Tensor:
        seen.append((args[1], real(*args)))
        return seen[-1][1]

    stream.walk.forward = forward.__get__(stream.walk)  # type: ignore[method-assign]
    apart = check_replay(stream, IDS_1L)
    assert apart is not None
    assert apart < 1e-5
    ((ids_1L, own_1LV),) = seen
    with torch.no_grad():
        assert difference(model(ids_1L, use_cache=False).logits, own_1LV) < 1e-5
    assert not torch.equal(ids_1L, IDS_1L)
    assert torch.equal(ids_1L[:, :-1], IDS_1L[:, :-1])


def inkling(folder: Path | None = None) -> Any:
    """Its blocks get the hidden states of all blocks before them, beside those of the last one."""
    if "inkling2_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such architecture")
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING["inkling2_text"](**BASE | {"num_hidden_layers": 4, "n_layers_per_attn_res_block": 2, "unpadded_vocab_size": VOCABULARY})
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    if folder:
        model.save_pretrained(folder)
    return model


def test_what_is_made_from_hidden_states_between_blocks_is_noticed(tmp_path: Path) -> None:
    model = inkling(tmp_path / "model")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for refused in (
        lambda: check_replay(LiveStream(model), IDS_1L),
        lambda: llmprune.prune(model, **ASK),
        lambda: llmprune.prune(tmp_path / "model", output=str(tmp_path / "out"), **ASK),
    ):
        with pytest.raises(RequestError, match="its logits differ from its own forward's by"):
            refused()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # what is refused leaves nothing


def test_a_model_that_sees_later_tokens_is_noticed() -> None:
    model = tiny_model("llama")

    class Backward(nn.Module):
        """Hidden states get a share of the next token's."""

        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, hidden_NLD: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            out_NLD: torch.Tensor = self.block(hidden_NLD, **kwargs)
            return out_NLD + 0.3 * out_NLD.roll(-1, 1)

    model.model.layers[1] = Backward(model.model.layers[1])
    with pytest.raises(RequestError, match="depend on tokens after them"):
        check_replay(LiveStream(model), IDS_1L)


def test_a_window_of_one_token_shows_nothing() -> None:
    assert check_replay(LiveStream(tiny_model("llama")), IDS_1L[:, :1]) is None


def test_a_resumed_run_has_checked_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "model", torch.float32)

    class Halt(BaseException):
        pass

    def halt(step: str, done: int, total: int) -> None:
        if step == "prune" and done == 1:
            raise Halt

    ask = ASK | {"output": str(tmp_path / "out"), "method": "wanda"}
    with pytest.raises(Halt):
        llmprune.prune(tmp_path / "model", on_progress=halt, **ask)
    monkeypatch.setattr("llmprune.run.job.check_replay", lambda *_: pytest.fail("checked again"))
    llmprune.prune(tmp_path / "model", **ask)
