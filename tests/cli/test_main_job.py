"""The main job on the bundled model: what it prints, what it writes, and whether plain transformers agrees."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cli.runner import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune.checkpoint.resolve import BUNDLED
from llmprune.recipe.recipe import Recipe


def plain_perplexity(folder: Path, text: Path, window: int) -> float:
    """By plain transformers: one tokenisation, non-overlapping windows, mean over the targets of each."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"))["input_ids"]
    losses = []
    for start in range(0, len(ids) - window + 1, window):
        piece = torch.tensor(ids[start : start + window])[None]
        with torch.no_grad():
            logits = model(piece).logits[0, :-1]
        losses.append(F.cross_entropy(logits, piece[0, 1:]).item())
    return math.exp(sum(losses) / len(losses))


def test_the_main_job(cli):
    ran = cli("--model", "llama", "--sparsity", 0.5, "--pattern", "2:4")
    assert ran.code == 0
    assert ran.out.splitlines()[0].startswith("llama: the small bundled Llama")
    assert "--model" in ran.out.splitlines()[0]
    output = Path("llama-2of4-0.5")
    assert {p.name for p in Path().iterdir()} == {output.name}

    report = json.loads((output / "llmprune.json").read_text())
    (measured,) = report["perplexity"]
    text = BUNDLED / "evaluation.txt"
    assert measured["dense"]["value"] == pytest.approx(plain_perplexity(BUNDLED / "llama", text, 256), rel=1e-3)
    assert measured["pruned"]["value"] == pytest.approx(plain_perplexity(output, text, 256), rel=1e-3)
    # the papers' own code on this model and text: dense 44.06, SparseGPT 60.34
    assert measured["dense"]["value"] == pytest.approx(44.06, rel=1e-3)
    assert measured["pruned"]["value"] <= 60.34 * 1.02

    dense, pruned = load_file(BUNDLED / "llama" / "model.safetensors"), load_file(output / "model.safetensors")
    matrices = {row["matrix"] for block in report["blocks"] for row in block["rows"]}
    assert len(matrices) == 56
    for name, weight in pruned.items():
        assert weight.dtype == dense[name].dtype
        if name in matrices:
            assert ((weight != 0).view(weight.shape[0], -1, 4).sum(-1) == 2).all()
        else:
            assert torch.equal(weight, dense[name])

    loaded, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.dtype == torch.bfloat16
    assert cli("inspect", output, "--verify", "2:4").code == 0
    assert cli("inspect", output, "--verify", "1:4").code == 1


def test_sparsity_0_copies_bit_for_bit(cli, small):
    assert cli("prune", "--model", "llama", "--sparsity", 0, "--output", "same", *small).code == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (Path("same") / name).read_bytes() == (BUNDLED / "llama" / name).read_bytes()


def test_skip_and_only(cli, small):
    words = ("--model", "llama", "--sparsity", "50%", "--method", "wanda", *small)
    assert cli(*words, "--output", "a", "--skip", r"layers\.0\.|o_proj").code == 0
    assert cli(*words, "--output", "b", "--only", r"layers\.[37]\.mlp").code == 0
    dense = load_file(BUNDLED / "llama" / "model.safetensors")
    for folder, touched in (("a", lambda n: ".0." not in n and "o_proj" not in n), ("b", lambda n: ("s.3." in n or "s.7." in n) and "mlp" in n)):
        for name, weight in load_file(Path(folder) / "model.safetensors").items():
            if "layers" in name and weight.dim() == 2 and touched(name):
                assert int((weight == 0).sum()) == weight.numel() // 2
            else:
                assert torch.equal(weight, dense[name])


def test_dry_run_writes_nothing(cli):
    ran = cli("--model", "llama", "--sparsity", 0.5, "--dry-run")
    assert ran.code == 0
    assert "56 matrices in 8 blocks" in ran.out
    assert not list(Path().iterdir())


def test_the_plan_says_what_can_be_known_before(cli, small):
    words = ("--model", "llama", *small, "--dry-run")
    plan = cli(*words, "--pattern", "2:4").out
    assert "few tokens: 512 for 56 of 56 matrices, of up to 384 inputs, whose statistics are trusted less; enough: --samples 384\n" in plan
    assert "; not counted: Python and its libraries (" in plan
    assert "(3,682,304 bytes)" in plan
    assert "few tokens" not in cli(*words, "--pattern", "2:4", "--samples", 100, "--method", "wanda").out
    assert "few tokens" not in cli(*words, "--pattern", "2:4", "--method", "magnitude").out
    smaller = cli(*words, "--pattern", "channels", "--sparsity", 0.25, "--uniform").out
    assert "(about 3,092,480 bytes of the source's 3,682,304)" in smaller


def test_json_is_one_document(cli, small):
    ran = cli("--model", "llama", "--sparsity", 0.5, "--method", "magnitude", "--json", *small)
    assert ran.code == 0
    assert json.loads(ran.out)["sparsity"]["pruned_matrices"] == 0.5


def test_overwrite_replaces_at_the_end(cli, small):
    words = ("--model", "llama", "--method", "magnitude", "--output", "out", *small)
    assert cli(*words, "--sparsity", 0.3).code == 0
    assert cli(*words, "--sparsity", 0.6, "--overwrite").code == 0
    assert json.loads(Path("out/llmprune.json").read_text())["sparsity"]["asked"] == 0.6
    assert {p.name for p in Path().iterdir()} == {"out"}


def test_no_local_path_in_the_output(cli, tmp_path):
    text = tmp_path / "secret-folder" / "mine.txt"
    text.parent.mkdir()
    text.write_text((BUNDLED / "calibration.txt").read_text()[:8000])
    words = (
        "--model",
        BUNDLED / "llama",
        "--sparsity",
        0.5,
        "--method",
        "wanda",
        "--calibration",
        text,
        "--eval",
        text,
        "--samples",
        8,
        "--sequence-length",
        64,
    )
    assert cli(*words, "--output", tmp_path / "secret-folder" / "out").code == 0
    written = (tmp_path / "secret-folder" / "out" / "llmprune.json").read_text()
    assert "secret-folder" not in written
    assert str(BUNDLED.parent) not in written
    assert "mine.txt" in written


def test_held_back_windows_are_evaluated_by_default(cli, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text((BUNDLED / "calibration.txt").read_text())
    ran = cli(
        "--model",
        BUNDLED / "llama",
        "--sparsity",
        0.5,
        "--method",
        "wanda",
        "--calibration",
        text,
        "--output",
        "out",
        "--samples",
        8,
        "--sequence-length",
        64,
    )
    assert ran.code == 0
    (measured,) = json.loads(Path("out/llmprune.json").read_text())["perplexity"]
    assert measured["dense"]["split"] == "all, held back"
    assert measured["dense"]["windows"] == 8  # no more than the calibration has


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_row_sources(cli, tmp_path, suffix):
    from datasets import Dataset

    rows = Dataset.from_dict(
        {
            "text": (BUNDLED / "evaluation.txt").read_text().split("\n\n"),
            "id": list(range(len((BUNDLED / "evaluation.txt").read_text().split("\n\n")))),
        }
    )
    file = tmp_path / f"data.{suffix}"
    rows.to_json(file) if suffix == "jsonl" else rows.to_parquet(file)
    from_rows = cli("eval", "llama", "--data", file, "--json")
    whole = cli("eval", "llama", "--json")
    assert json.loads(from_rows.out)[0]["value"] == json.loads(whole.out)[0]["value"]


def test_methods_lists_and_explains(cli):
    everything = cli("methods").out
    for name in ("wanda", "magnitude", "sparsegpt", "mask_only", "unstructured", "nm", "uniform"):
        assert name in everything
    assert "arxiv.org/abs/2306.11695" in cli("methods", "wanda").out


def test_flags_go_on_top_of_the_recipe(cli, small):
    ran = cli("--recipe", ROOT / "recipes" / "fast-wanda-50.toml", "--method", "magnitude", "--sparsity", 0.2, "--output", "out", *small)
    assert ran.code == 0
    saved = json.loads(Path("out/llmprune.json").read_text())["recipe"]
    assert (saved["method"], saved["sparsity"], saved["samples"]) == ("magnitude", 0.2, 8)
    assert set(saved) == set(Recipe.model_fields) - {"output", "push"} | {"packages"}
