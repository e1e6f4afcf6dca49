"""`inspect --manifest`: an output against the hashes in its own llmprune.json. And a source against those that somebody has given for it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llmprune.checkpoint.resolve import BUNDLED

RUN = ("--model", "llama", "--sparsity", 0.5, "--method", "magnitude", "--samples", 2, "--sequence-length", 32)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output, made once."""
    from llmprune import prune

    folder = tmp_path_factory.mktemp("finished") / "out"
    prune("llama", 0.5, method="magnitude", samples=2, sequence_length=32, output=str(folder))
    return folder


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_an_output_is_as_the_run_left_it(cli, output):
    listed = json.loads((output / "llmprune.json").read_text())
    assert listed["files"] == {n: hashlib.sha256((output / n).read_bytes()).hexdigest() for n in listed["files"]}
    stored = load_file(output / "model.safetensors")
    assert listed["tensors"] == {n: hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest() for n, t in stored.items()}
    ran = cli("inspect", output, "--manifest")
    assert ran.code == 0
    assert ran.err == f"manifest of out: all {len(listed['files'])} files and {len(listed['tensors'])} tensors are as the run left them\n"
    (output / "README.md").write_text("my own words")  # the card is its owner's to edit
    (output / ".gitattributes").write_text("")
    assert cli("inspect", output, "--manifest").code == 0


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


NORM = "model.norm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a-weight": (lambda p: flip(p / "model.safetensors", -1), ["1 changed files: model.safetensors", "1 changed tensors: model."]),
    "a-header": (lambda p: flip(p / "model.safetensors", 3), ["1 changed files: model.safetensors", "1 unreadable: model.safetensors: header of"]),
    "cut": (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-9]), ["changed files", "header describes"]),
    "no-weights": (lambda p: (p / "model.safetensors").unlink(), ["1 missing files: model.safetensors", "no safetensors weights"]),
    "config": (lambda p: flip(p / "config.json", -4), ["changed files: config.json"]),
    "no-tokenizer": (lambda p: (p / "tokenizer.json").unlink(), ["1 missing files: tokenizer.json"]),
    "extra": (lambda p: (p / "modeling.py").write_text(""), ["1 extra files: modeling.py"]),
    "renamed": (
        lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes().replace(NORM.encode(), b"model.norm.wEight")),
        ["1 changed files: model.safetensors", f"1 missing tensors: {NORM}", "1 extra tensors: model.norm.wEight"],
    ),
}


@pytest.mark.parametrize("which", DAMAGE)
def test_what_has_changed_is_named(cli, output, which):
    damage, says = DAMAGE[which]
    damage(output)
    ran = cli("inspect", output, "--manifest")
    assert ran.code == 1
    (error,) = [line for line in ran.err.splitlines() if line.startswith("error: manifest of out: ")]
    assert all(part in error for part in says), error
    printed = cli("inspect", output, "--manifest", "--json")
    assert printed.code == 1
    assert any(json.loads(printed.out).values())


def test_every_damaged_tensor_is_named(cli, output):
    wanted = set()
    with safe_open(output / "model.safetensors", "pt") as file:
        names = list(file.keys())[::5]
    header = json.loads((output / "model.safetensors").read_bytes()[8:].split(b"\0")[0].partition(b"}}")[0] + b"}}")
    start = (output / "model.safetensors").stat().st_size - max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
    for name in names:
        flip(output / "model.safetensors", start + header[name]["data_offsets"][0])
        wanted.add(name)
    found = json.loads(cli("inspect", output, "--manifest", "--json").out)
    assert set(found["changed_tensors"]) == wanted
    assert not any(found[k] for k in ("missing_tensors", "extra_tensors", "unreadable"))


def test_what_has_no_manifest(cli, output):
    assert "holds no llmprune.json" in cli("inspect", BUNDLED / "llama", "--manifest").err
    (output / "llmprune.json").write_text('{"files": {"config.json": 3}}')
    ran = cli("inspect", output, "--manifest")
    assert ran.code == 2
    assert "lists no files" in ran.err
    (output / "llmprune.json").write_text('{"files": {"config.json": "", "../x": ""}}')
    assert "lies outside the folder" in cli("inspect", output, "--manifest").err
    assert cli("inspect", output, "--manifest", "--verify", "2:4").code == 2


def test_a_source_with_a_manifest_is_checked_before_it_is_pruned(cli, output):
    again = ("--model", output, *RUN[2:], "--calibration", BUNDLED / "calibration.txt", "--output", "again")
    (output / "extra.txt").write_text("mine")
    flip(output / "model.safetensors", -1)
    ran = cli(*again)
    assert ran.code == 2
    assert "out: 1 files differ from llmprune.json: model.safetensors" in ran.err
    assert "remove llmprune.json" in ran.err
    assert not Path("again").exists()
    (output / "llmprune.json").unlink()
    assert cli(*again).code == 0


def test_a_snapshot_of_the_hub_is_what_its_blobs_are_named_for(cli, tmp_path):
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in (BUNDLED / "llama").iterdir():
        data = path.read_bytes()
        name = hashlib.sha256(data).hexdigest() if path.suffix == ".safetensors" else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        (blobs / name).write_bytes(data)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    ask = ("--model", snapshot, *RUN[2:], "--calibration", BUNDLED / "calibration.txt")
    assert cli(*ask, "--output", "fine").code == 0
    flip((snapshot / "model.safetensors").resolve(), -1)
    ran = cli(*ask, "--output", "spoiled")
    assert ran.code == 2
    assert "main: 1 files differ from the Hub's hashes: model.safetensors" in ran.err
