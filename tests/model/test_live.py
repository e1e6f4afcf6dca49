"""Models in memory: what they cannot obey is refused before anything has changed, and what they can is obeyed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny, tiny_model, tiny_windows

import llmprune
from llmprune.checkpoint.resolve import BUNDLED


def refused(says: str, **options: Any) -> None:
    model = tiny_model("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(llmprune.LlmpruneError, match=says):
        llmprune.prune(model, 0.5, **{"calibration": tiny_windows(), **options})
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


def test_options_of_a_checkpoint_are_refused() -> None:
    options = {"device": "cpu", "dtype": "float32", "revision": "main", "push": "me/name"}
    for name, value in options.items():
        refused(f"{name} with a model in memory", **{name: value})
    for name in ("restart", "public", "existing"):
        refused("with a model in memory", **{name: True})
    refused("overwrite without output", overwrite=True)
    refused("rotate with a model in memory", pattern="hidden", rotate=True)


def test_token_ids_that_are_none_are_refused() -> None:
    refused("float32 of shape", calibration=tiny_windows().float())
    refused(r"int64 of shape \[96\]", calibration=tiny_windows().flatten())
    refused("calibration: list", calibration=[[1, 2]])
    refused("sequence_length 8 with token ids in windows of 16", sequence_length=8)
    refused("6 windows to calibrate on, 7 asked for", samples=7)
    refused("a tokenizer with token ids", tokenizer=object())


@pytest.mark.parametrize("live", [True, False], ids=["live", "checkpoint"])
def test_samples_and_shuffle_choose_among_token_ids(live: bool, tmp_path: Path) -> None:
    ids_NL = tiny_windows()
    order = torch.randperm(len(ids_NL), generator=torch.Generator().manual_seed(3))

    def digest(given_NL: torch.Tensor, **options: Any) -> str:
        model = tiny_model("llama") if live else save_tiny("llama", tmp_path / "model")
        where = {} if live else {"output": str(tmp_path / "out"), "overwrite": True}
        return llmprune.prune(model, 0.5, method="wanda", calibration=given_NL, **where, **options).calibration.sha256

    assert digest(ids_NL, samples=2) == digest(ids_NL[:2]) != digest(ids_NL)
    assert digest(ids_NL, shuffle=True, seed=3) == digest(ids_NL[order]) != digest(ids_NL)


def test_paths_are_taken_wherever_names_are(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((BUNDLED / "evaluation.txt").read_text()[:4000])
    ask = {"pattern": "2:4", "method": "wanda", "samples": 4, "sequence_length": 64}
    report = llmprune.prune("llama", calibration=text, eval=[text], output=tmp_path / "out", **ask)
    assert report.output == tmp_path / "out"
    assert report.calibration.dataset == "text.txt"
    (found,) = llmprune.evaluate(tmp_path / "out", text, window=64, samples=4)
    assert found.value == pytest.approx(report.perplexity[0].pruned.value)
    assert llmprune.evaluate(tmp_path / "out", [text, str(text)], window=64, samples=4) == [found, found]
