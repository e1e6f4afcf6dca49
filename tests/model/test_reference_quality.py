"""Perplexities of the papers' methods against figures computed by the authors' own algorithm code (uniform, block-sequential, float32)."""

from __future__ import annotations

import pytest
from often import often

import llmprune
from llmprune.checkpoint.resolve import BUNDLED

# (method, pattern): perplexity on stories260K: 128 x 256 calibration tokens, the first 200 windows of 256 of the evaluation text
STORIES = {
    ("magnitude", "unstructured"): 52.21,
    ("wanda", "unstructured"): 22.98,
    ("sparsegpt", "unstructured"): 21.09,
    ("magnitude", "2:4"): 134.76,
    ("wanda", "2:4"): 70.03,
    ("sparsegpt", "2:4"): 37.02,
}
# the same on the bundled model: 128 x 256 calibration tokens, all 63 windows of the evaluation text
BUNDLED_LLAMA = {
    ("magnitude", "unstructured"): 56.31,
    ("wanda", "unstructured"): 52.87,
    ("sparsegpt", "unstructured"): 50.63,
    ("wanda", "2:4"): 68.37,
}
WITHIN = 1.02


def perplexity(model, data, samples=None) -> float:
    return llmprune.evaluate(model, str(data), window=256, samples=samples)[0].value


def test_dense_stories(assets):
    assert perplexity(assets / "stories260K", assets / "text" / "tinystories_ascii_eval.txt", 200) == pytest.approx(5.478, rel=1e-3)


@pytest.mark.parametrize(("method", "pattern"), often(STORIES, ("sparsegpt", "2:4")))
def test_stories(assets, tmp_path, method, pattern):
    texts = assets / "text"
    output = tmp_path / "out"
    ask = {"samples": 128, "sequence_length": 256, "calibration": str(texts / "tinystories_ascii_calib.txt"), "output": str(output)}
    llmprune.prune(assets / "stories260K", 0.5, pattern, method=method, **ask)
    assert perplexity(output, texts / "tinystories_ascii_eval.txt", 200) <= STORIES[method, pattern] * WITHIN


@pytest.mark.parametrize(("method", "pattern"), often(BUNDLED_LLAMA, ("wanda", "unstructured")))
def test_bundled(tmp_path, method, pattern):
    report = llmprune.prune("llama", 0.5, pattern, method=method, output=str(tmp_path / "out"))
    (measured,) = report.perplexity
    assert measured.dense.value == pytest.approx(44.06, rel=1e-3)
    assert measured.pruned.value <= BUNDLED_LLAMA[method, pattern] * WITHIN
    assert measured.pruned.value == pytest.approx(perplexity(tmp_path / "out", BUNDLED / "evaluation.txt"), rel=1e-6)
