"""A model that was pruned while it was trained, saved as a result: it is one for every command."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from families import tiny_model, tiny_windows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import llmprune
from llmprune import SparsityCallback
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.errors import PromiseError, RequestError
from llmprune.training.masks import Masks, read_masks
from llmprune.training.sparsifier import Sparsifier

IDS_NL = tiny_windows(8)
LLAMA = next(path.parent for path in BUNDLED.rglob("config.json"))


def windows(tokenizer: Any) -> list[dict[str, Tensor]]:
    ids = torch.tensor(tokenizer((BUNDLED / "calibration.txt").read_text()[:8000]).input_ids)
    return [{"input_ids": row, "labels": row} for row in ids[: len(ids) // 32 * 32].view(-1, 32)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[SparsityCallback, Any, Path]:
    """The bundled model after ten steps of gradual 2:4, and where it was saved."""
    folder = tmp_path_factory.mktemp("trained")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(LLAMA), AutoTokenizer.from_pretrained(LLAMA)
    callback = SparsityCallback("gradual", pattern="2:4", every=2)
    args = TrainingArguments(output_dir=str(folder / "run"), max_steps=10, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
    Trainer(model, args, train_dataset=windows(tokenizer), callbacks=[callback]).train()
    llmprune.save_trained(callback, model, folder / "out", tokenizer)
    return callback, model, folder / "out"


def test_it_is_whole(run: tuple[SparsityCallback, Any, Path]) -> None:
    callback, model, out = run
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "llmprune.json", "README.md", "report.html", "model.safetensors", "tokenizer.json"} <= names
    assert not out.with_name("out.partial").exists()
    again, tokenizer = llmprune.load(out)
    assert tokenizer("Once upon a time").input_ids
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    masks = read_masks(out, again)
    assert callback.masks is not None
    assert masks.unrecorded == ()
    assert masks.keep.keys() == callback.masks.keep.keys()
    assert all(torch.equal(keep, callback.masks.keep[n]) for n, keep in masks.keep.items())
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_it_says_what_was_done(run: tuple[SparsityCallback, Any, Path]) -> None:
    stored = json.loads((run[2] / "llmprune.json").read_text())
    recipe = stored["recipe"]
    assert (recipe["method"], recipe["pattern"], recipe["every"], recipe["steps"]) == ("gradual", "2:4", 2, 10)
    assert stored["sparsity"]["pruned_matrices"] == stored["sparsity"]["asked"] == 0.5
    assert stored["calibration"] is None
    assert {block["output_error"] for block in stored["blocks"]} == {None}
    card = (run[2] / "README.md").read_text()
    assert "Trained from" in card
    assert "no quality was measured here" in card
    for path in run[2].iterdir():
        assert str(LLAMA).encode() not in path.read_bytes(), path.name
        assert str(run[2].parent).encode() not in path.read_bytes(), path.name


def test_every_command_takes_it(cli: Any, run: tuple[SparsityCallback, Any, Path], tmp_path: Path) -> None:
    out = run[2]
    assert cli("inspect", out, "--verify", "2:4").code == 0
    assert cli("inspect", out, "--manifest").code == 0
    assert cli("report", out).code == 0
    assert "none: masked in training" in (out / "report.html").read_text()
    text = tmp_path / "text.txt"
    text.write_text((BUNDLED / "evaluation.txt").read_text()[:2000])
    ran = cli("eval", out, "--data", text, "--window", 64)
    assert (ran.code, "perplexity" in ran.out) == (0, True)
    words = ("--method", "magnitude", "--samples", 4, "--sequence-length", 32, "--calibration", text)
    assert cli("prune", "--model", out, "--sparsity", 0.6, *words, "--output", tmp_path / "more").code == 0
    compared = cli("compare", out, tmp_path / "more", "--json")
    assert (compared.code, '"gradual"' in compared.out) == (0, True)
    assert cli("compare", out, tmp_path / "more", "--html", tmp_path / "both.html").code == 0


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3_moe", "llama_tied"])
def test_matrices_are_named_as_checkpoints_name_them(family: str, tmp_path: Path) -> None:
    """Experts one by one, transposed matrices, tied embeddings; a plain loop, exchanged weights that are still zero."""
    model = tiny_model(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsify = Sparsifier(model, optimizer, "rigl", pattern="2:4", end=3, every=1, regrow=1.0)
    for _ in range(2):
        model(input_ids=IDS_NL, labels=IDS_NL).loss.backward()
        optimizer.step()
        sparsify.step()
        optimizer.zero_grad()
    report = llmprune.save_trained(sparsify, model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    masks = read_masks(tmp_path / "out", again)
    zeros = Masks.of_zeros(again, masks.keep)
    assert masks.keep.keys() == sparsify.masks.keep.keys()
    assert any(not torch.equal(zeros.keep[n], keep) for n, keep in sparsify.masks.keep.items())  # grown ones have the value zero
    for n, keep in masks.keep.items():
        if n not in masks.unrecorded:
            assert torch.equal(keep, sparsify.masks.keep[n]), n
    assert sum(row.size for row in report.rows) == sparsify.masks.weights


def test_a_model_that_is_not_the_masks_is_not_saved(run: tuple[SparsityCallback, Any, Path], tmp_path: Path) -> None:
    callback, _, _ = run
    dense = AutoModelForCausalLM.from_pretrained(LLAMA)
    with pytest.raises(PromiseError, match="masked weights are not zero"):
        llmprune.save_trained(callback, dense, tmp_path / "out")
    with pytest.raises(RequestError, match="has not trained"):
        llmprune.save_trained(SparsityCallback("gradual", 0.5), dense, tmp_path / "out")
    with pytest.raises(RequestError, match="is the source model"):
        llmprune.save_trained(callback, run[1], LLAMA, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_an_output_is_replaced_only_if_asked(run: tuple[SparsityCallback, Any, Path], tmp_path: Path) -> None:
    callback, model, _ = run
    llmprune.save_trained(callback, model, tmp_path / "out")
    before = (tmp_path / "out" / "llmprune.json").read_bytes()
    with pytest.raises(RequestError, match="exists already"):
        llmprune.save_trained(callback, model, tmp_path / "out")
    llmprune.save_trained(callback, model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "llmprune.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def save_until_killed(trained: Any, model: Any, out: Path) -> None:
    model.save_pretrained = lambda folder: (type(model).save_pretrained(model, folder), os.kill(os.getpid(), signal.SIGKILL))
    llmprune.save_trained(trained, model, out)


def test_a_killed_save_leaves_no_output_and_can_be_repeated(run: tuple[SparsityCallback, Any, Path], tmp_path: Path) -> None:
    callback, model, first = run
    process = mp.get_context("fork").Process(target=save_until_killed, args=(callback, model, tmp_path / "out"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    llmprune.save_trained(callback, model, tmp_path / "out", AutoTokenizer.from_pretrained(LLAMA))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    ours, theirs = (json.loads((folder / "llmprune.json").read_text()) for folder in (tmp_path / "out", first))
    assert ours["tensors"] == theirs["tensors"]
