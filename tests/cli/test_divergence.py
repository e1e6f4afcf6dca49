"""The divergence that a run reports is that of two models by plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli.runner import Cli
from families import save_tiny, tiny_windows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune.checkpoint.resolve import BUNDLED


def plain(dense: Path, pruned: Path, ids_NL: Tensor) -> tuple[float, float]:
    """(mean KL, share of equal likeliest tokens) over the predictions that have a target."""
    logits = []
    for folder in (dense, pruned):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(ids_NL, use_cache=False).logits[:, :-1].double())
    theirs, ours = (x.log_softmax(-1) for x in logits)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean()), float((theirs.argmax(-1) == ours.argmax(-1)).double().mean())


def test_kl_and_agreement_are_those_of_plain_transformers(cli: Cli, small: tuple[object, ...]) -> None:
    ran = cli("--model", "llama", "--sparsity", 0.5, "--method", "wanda", "--output", "out", "--eval-samples", "all", *small)
    assert ran.code == 0, ran.err
    (found,) = json.loads(Path("out/llmprune.json").read_text())["perplexity"]
    ids = torch.tensor(AutoTokenizer.from_pretrained(BUNDLED / "llama")(Path(str(small[-1])).read_text())["input_ids"])
    ids_NL = ids[: len(ids) // 64 * 64].view(-1, 64)
    kl, top1 = plain(BUNDLED / "llama", Path("out"), ids_NL)
    assert found["divergence"]["kl"] == pytest.approx(kl, rel=1e-4)
    assert found["divergence"]["top1"] == pytest.approx(top1, abs=1e-3)
    assert found["divergence"]["tokens"] == found["pruned"]["tokens"] == ids_NL.shape[0] * 63
    assert f"mean KL(dense || pruned) {kl:.3g}"[:-1] in ran.out


def test_nothing_pruned_is_no_divergence(cli: Cli, small: tuple[object, ...]) -> None:
    assert cli("--model", "llama", "--sparsity", 0, "--method", "wanda", "--output", "out", *small).code == 0
    (found,) = json.loads(Path("out/llmprune.json").read_text())["perplexity"]
    assert (found["divergence"]["kl"], found["divergence"]["top1"]) == (0.0, 1.0)


def test_a_pruned_head_is_compared_with_the_dense_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By evaluation windows of given token ids: the model has no tokenizer."""
    from dataclasses import replace

    from llmprune.data.windows import Windows
    from llmprune.recipe.reading import read_recipe
    from llmprune.run.job import run
    from llmprune.run.prepare import prepare

    source, ids_NL = save_tiny("llama", tmp_path / "source", torch.float32), tiny_windows()
    ask = {"model": str(source), "sparsity": 0.5, "method": "wanda", "only": "^lm_head|mlp", "output": str(tmp_path / "out"), "device": "cpu"}
    job = prepare(read_recipe(None, ask), ids_NL)
    job.data = replace(job.data, evaluation=(Windows(ids_NL.clone(), "given", "all"),))
    (found,) = run(job).perplexity
    kl, top1 = plain(source, tmp_path / "out", ids_NL)
    assert found.divergence.kl == pytest.approx(kl, rel=1e-4)
    assert found.divergence.top1 == pytest.approx(top1)
