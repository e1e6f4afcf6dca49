"""Calibration on pictures and text. The reference is transformers' own forward on what the model's own processor makes of the rows."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cli.runner import Cli
from often import often
from safetensors.torch import load_file
from seeing import KINDS, picture, save_rows, save_seeing
from torch import nn
from transformers import AutoModelForImageTextToText

import llmprune
from llmprune.checkpoint.source import open_folder
from llmprune.data.pictures import load_processor, picture_windows
from llmprune.data.sources import find_source
from llmprune.data.windows import RunData, Windows
from llmprune.errors import RequestError
from llmprune.model.matrices import block_matrices
from llmprune.model.wrappers import towers
from llmprune.run import job
from llmprune.run.prepare import describe, open_stream
from llmprune.statistics.gradients import loss_gradients

LENGTH, SAMPLES = 96, 4
ASK: dict[str, Any] = {"pattern": "2:4", "method": "wanda", "samples": SAMPLES, "sequence_length": LENGTH}


@pytest.fixture
def saved(request, tmp_path, monkeypatch) -> tuple[Path, Path, Any]:
    """(model, rows, processor)"""
    kind = getattr(request, "param", "llava")
    processor = save_seeing(kind, tmp_path / "model")
    if kind == "qwen2_vl":
        monkeypatch.setattr("llmprune.run.windows.load_processor", lambda _: processor)
    return tmp_path / "model", save_rows(tmp_path / "data"), processor


def load(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder).eval().requires_grad_(False)


def forwards(model: Any, windows: Windows) -> list[torch.Tensor]:
    """Logits of every window with its pictures, by the model's own forward."""
    return [model(input_ids=ids_L[None], **seen.inputs, use_cache=False).logits[0] for ids_L, seen in zip(windows.ids_NL, windows.seen, strict=True)]


def windows_of(saved: tuple[Path, Path, Any], wanted: int = SAMPLES) -> Windows:
    return picture_windows(find_source(str(saved[1]), "calibration"), saved[2], LENGTH, wanted)


def norms_by_hooks(model: Any, windows: Windows) -> dict[str, torch.Tensor]:
    """Squared norms of what enters every Linear of the decoder."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def take(_: Any, inputs: Any) -> None:
            found[name] = found.get(name, 0) + inputs[0].flatten(0, -2).double().square().sum(0)

        return take

    path = "model.language_model" if hasattr(model.model, "language_model") else "model.text_model"
    linears = [(f"{path}.{name}", m) for name, m in model.get_submodule(path).named_modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_pre_hook(hook(name)) for name, m in linears]
    forwards(model, windows)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("saved", often(KINDS, "llava", "qwen2_vl", "gemma3"), indirect=True)
def test_the_first_block_is_pruned_by_what_enters_it_with_the_pictures(saved, tmp_path):
    folder, rows, _ = saved
    report = llmprune.prune(folder, calibration=str(rows), output=str(tmp_path / "out"), **ASK)
    dense, pruned, windows = load(folder), load(tmp_path / "out"), windows_of(saved)
    assert report.calibration.pictures == windows.pictures > SAMPLES
    assert report.calibration.sha256 == windows.sha256
    found = norms_by_hooks(dense, windows)
    first = [name for name in found if ".layers.0." in name and name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")]
    assert len(first) == 3
    text_alone = norms_by_hooks(dense, Windows(windows.ids_NL, "", "", seen=tuple(type(s)({}, s.stands_in_L, 0) for s in windows.seen)))
    differ = 0
    for name in first:
        weight = dense.get_parameter(f"{name}.weight")
        for norms, same in ((found, True), (text_alone, None)):
            groups = (weight.abs().double() * norms[name].sqrt()).reshape(len(weight), -1, 4)
            keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(2, -1).indices, True).reshape(weight.shape)
            if same:
                assert torch.equal(pruned.get_parameter(f"{name}.weight"), weight * keep), name
            else:
                differ += int((pruned.get_parameter(f"{name}.weight") != weight * keep).sum())
    assert differ  # the pictures matter
    parts = tuple(towers(dense))
    assert all(torch.equal(p, pruned.get_parameter(name)) for name, p in dense.named_parameters() if name.startswith(parts))


@pytest.mark.parametrize("saved", often(KINDS, "qwen2_vl", "gemma3"), indirect=True)
def test_perplexity_is_of_the_words_that_follow_pictures(saved, tmp_path):
    folder, rows, _ = saved
    report = llmprune.prune(folder, calibration=str(rows), output=str(tmp_path / "out"), **ASK)
    (found,) = report.perplexity
    held = windows_of(saved, 100).after(SAMPLES).first(SAMPLES)
    assert found.dense.windows == len(held.ids_NL)
    for value, model in ((found.dense, load(folder)), (found.pruned, load(tmp_path / "out"))):
        losses = []
        for logits_LV, ids_L, seen in zip(forwards(model, held), held.ids_NL, held.seen, strict=True):
            words_L = ~seen.stands_in_L[1:]
            losses += F.cross_entropy(logits_LV[:-1].double(), ids_L[1:], reduction="none")[words_L].tolist()
        assert value.tokens == len(losses) < len(held.ids_NL) * (LENGTH - 1)
        assert value.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


@pytest.mark.parametrize("saved", often(KINDS, "llava"), indirect=True)
@pytest.mark.parametrize(
    "more",
    often(({"quality": "balanced"}, {"quality": "max"}, {"criterion": "gblm"}, {"pattern": "channels", "sparsity": 0.25}), {"quality": "balanced"}),
    ids=str,
)
def test_every_way_of_pruning_sees_the_pictures(saved, tmp_path, more):
    folder, rows, _ = saved
    ask = ASK | {"method": None} | more
    report = llmprune.prune(folder, calibration=str(rows), output=str(tmp_path / "out"), accept_damage=True, **{k: v for k, v in ask.items() if v})
    held, model = windows_of(saved, 100).after(SAMPLES).first(SAMPLES), load(tmp_path / "out")
    losses = []
    for logits_LV, ids_L, seen in zip(forwards(model, held), held.ids_NL, held.seen, strict=True):
        losses += F.cross_entropy(logits_LV[:-1].double(), ids_L[1:], reduction="none")[~seen.stands_in_L[1:]].tolist()
    assert report.perplexity[0].pruned.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_windows_are_whole_rows_with_all_their_pictures(saved):
    _, rows, processor = saved
    windows = windows_of(saved, 100)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    place = processor.image_token_id
    for ids_L, seen in zip(windows.ids_NL, windows.seen, strict=True):
        assert len(ids_L) == LENGTH
        assert torch.equal(seen.stands_in_L, ids_L == place)
        assert int((ids_L == place).sum()) == 16 * seen.count == 16 * len(seen.inputs["pixel_values"])
        assert not seen.stands_in_L[-1]
    assert windows.pictures >= 0.8 * sum(len(line["images"]) for line in lines)
    first = processor.image_processor(picture(0), return_tensors="pt")["pixel_values"]
    assert torch.equal(windows.seen[0].inputs["pixel_values"][:1], first)


def test_text_without_a_template_has_its_pictures_where_it_says(tmp_path):
    processor = save_seeing("llava", tmp_path / "model", template=False)
    picture(1).save(tmp_path / "one.png")
    said = ["before <image> after", "no place"]
    rows = [{"image": "one.png", "text": text * 1 + " word" * 60} for text in said]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    windows = picture_windows(find_source(str(tmp_path / "rows.jsonl"), "calibration"), processor, 64, 10)
    shown = processor.tokenizer.decode(windows.ids_NL[0])
    assert shown.lstrip("<s>").startswith("before " + "<image>" * 16 + " after")


def test_a_killed_run_goes_on_with_the_same_pictures(saved, tmp_path, monkeypatch):
    folder, rows, _ = saved
    llmprune.prune(folder, calibration=str(rows), output=str(tmp_path / "whole"), **ASK)
    record, done = job.record_block, []

    def once(*args: Any) -> None:
        record(*args)
        done.append(args)
        if len(done) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(job, "record_block", once)
    with pytest.raises(KeyboardInterrupt):
        llmprune.prune(folder, calibration=str(rows), output=str(tmp_path / "out"), **ASK)
    read = []
    monkeypatch.setattr("llmprune.run.windows.picture_windows", lambda *a: read.append(a))
    again = llmprune.prune(folder, calibration=str(rows), output=str(tmp_path / "out"), **ASK)
    assert not read
    assert again.timings.resumed_blocks == 1
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_other_pictures_with_the_same_words_are_another_run(saved, tmp_path):
    windows = windows_of(saved)
    picture(99).save(saved[1].parent / "0-0.png")
    assert windows_of(saved).sha256 != windows.sha256
    assert torch.equal(windows_of(saved).ids_NL, windows.ids_NL)


def test_the_command_line_says_how_many_pictures(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ("--calibration", saved[1], "--samples", SAMPLES, "--sequence-length", LENGTH, "--output", "out")
    ran = Cli(capsys)("prune", "--model", saved[0], "--pattern", "2:4", "--method", "wanda", *words)
    assert ran.code == 0, ran.err
    said = f"calibration: {SAMPLES} windows of {LENGTH} with {windows_of(saved).pictures} pictures from rows.jsonl"
    assert said in ran.out
    assert f"{windows_of(saved).pictures} pictures" in Path("out/README.md").read_text()
    assert json.loads(Path("out/llmprune.json").read_text())["calibration"]["pictures"] == windows_of(saved).pictures


def test_a_live_model_sees_them_through_its_processor(saved, tmp_path):
    folder, rows, processor = saved
    live = load(folder)
    with pytest.raises(RequestError, match=r"rows\.jsonl: has pictures, and tokenizer is a TokenizersBackend"):
        llmprune.prune(live, calibration=str(rows), tokenizer=processor.tokenizer, **ASK)
    report = llmprune.prune(live, calibration=str(rows), tokenizer=processor, **ASK)
    llmprune.prune(folder, calibration=str(rows), output=str(tmp_path / "out"), **ASK)
    assert report.calibration.pictures == windows_of(saved).pictures
    for (name, ours), theirs in zip(live.named_parameters(), load(tmp_path / "out").parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("saved", often(KINDS, "gemma3"), indirect=True)
def test_gradients_are_those_of_the_loss_of_the_words(saved):
    folder, _, _ = saved
    model, windows = load(folder), windows_of(saved, 3)
    stream = open_stream(open_folder(folder, "model"), torch.float32, torch.device("cpu"))
    stream.walk.pictures = RunData(windows).pictures
    matrices = {i: [m for m in block_matrices(block) if m.name.endswith("v_proj.weight")] for i, block in enumerate(stream.walk.blocks)}
    found = loss_gradients(stream, windows.ids_NL, matrices, frozenset({"grad"}))
    names = {i: f"{stream.names[i]}.{ms[0].name}" for i, ms in matrices.items()}
    weights = [model.get_parameter(name).requires_grad_() for name in names.values()]
    total: Any = 0
    for logits_LV, ids_L, seen in zip(forwards(model, windows), windows.ids_NL, windows.seen, strict=True):
        total = total + F.cross_entropy(logits_LV[:-1], ids_L[1:].masked_fill(seen.stands_in_L[1:], -100), reduction="sum")
    for i, gradient in enumerate(torch.autograd.grad(total, weights)):
        ours = found.fields(i, matrices[i][0].name)["grad_RC"]
        assert (ours - gradient).abs().max() <= 1e-4 * gradient.abs().max()


def rewritten(rows: Path, change: Any) -> None:
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    change(lines)
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))


FAULTS: dict[str, tuple[Any, str]] = {
    "no such picture": (lambda rows: rows[1].update(images=["none.png"]), r"rows\.jsonl, row 2: .*none\.png"),
    "an address": (lambda rows: rows[0].update(images=["https://example.org/a.png"]), r"row 1: picture 'https://example\.org/a\.png' is not a local"),
    "too many pictures": (lambda rows: rows[2]["images"].append("0-0.png"), r"row 3: 1 places for 2 pictures"),
    "no text": (lambda rows: [row.update(messages=None) for row in rows], r"row 1|no column"),
    "not a picture": (lambda rows: rows[0].update(images=["rows.jsonl"]), r"row 1: cannot identify image file"),
}


def test_a_broken_file_is_named(saved, tmp_path):
    saved[1].write_text(saved[1].read_text() + '{"images": [')
    with pytest.raises(RequestError, match=r"rows\.jsonl: line 25: not JSON"):
        windows_of(saved, 100)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_row_is_named(saved, tmp_path, fault):
    change, said = FAULTS[fault]
    rewritten(saved[1], change)
    with pytest.raises(RequestError, match=said):
        llmprune.prune(saved[0], calibration=str(saved[1]), output=str(tmp_path / "out"), **ASK)
    assert not (tmp_path / "out").exists()


def test_pictures_that_fill_a_window_are_left_out_and_counted(saved):
    wide = saved[1].parent / "0-0.png"
    rewritten(saved[1], lambda rows: rows[0].update(images=["0-0.png"] * 7, messages=None, text="seven"))
    assert wide.exists()
    windows = windows_of(saved, 100)
    assert windows.left_out == 1


def test_windows_of_equal_tokens_are_counted(saved):
    """Rows that differ in their pictures alone."""
    said = "the same words " * 12
    rewritten(saved[1], lambda rows: [row.update(images=row["images"][:1], messages=None, text=said) for row in rows])
    windows = windows_of(saved, 100)
    assert len(windows.ids_NL) < 24
    assert windows.left_out > 0
    assert "rows left out that fit into no window, or repeat another one's tokens" in describe(windows).seen


def test_a_model_without_a_processor_is_refused(saved, tmp_path):
    (saved[0] / "processor_config.json").unlink()
    with pytest.raises(RequestError, match=r"model: (has no processor of pictures and text|its processor cannot be used)"):
        llmprune.prune(saved[0], calibration=str(saved[1]), output=str(tmp_path / "out"), **ASK)


def test_a_text_model_reads_the_text_of_such_rows(tmp_path):
    rows = save_rows(tmp_path / "data", form="text")
    rewritten(rows, lambda lines: [line.update(text=line["text"] * 20) for line in lines])
    report = llmprune.prune(
        "llama", calibration=str(rows), output=str(tmp_path / "out"), pattern="2:4", method="wanda", samples=4, sequence_length=64, eval=[str(rows)]
    )
    assert report.calibration.pictures == 0


def test_a_folder_is_read_again_as_it_was_saved(saved):
    again = load_processor(saved[0])
    assert type(again) is type(saved[2])
    shutil.rmtree(saved[0])
    with pytest.raises(RequestError):
        load_processor(saved[0])
