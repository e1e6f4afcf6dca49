"""Where a result may go: refused before any work, in one line, with nothing written; and the modes of what is written."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import huggingface_hub
import pytest

from llmprune.checkpoint.files import lock_folder
from llmprune.checkpoint.resolve import BUNDLED


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(BUNDLED / "llama", tmp_path / "model"))


def refused(cli, model: Path, output: object, says: str, *more: object) -> None:
    """Exit 2, one error line, nothing new beside the output or in the source."""
    before = [sorted(folder.rglob("*")) for folder in (Path.cwd(), model)]
    text = BUNDLED / "calibration.txt"
    ran = cli("--model", model, "--sparsity", 0.5, "--calibration", text, "--sequence-length", 64, "--samples", 8, "--output", output, *more)
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert (ran.code, len(errors)) == (2, 1), ran.err
    assert says in errors[0]
    assert "Traceback" not in ran.err
    assert [sorted(folder.rglob("*")) for folder in (Path.cwd(), model)] == before


def test_the_source_by_any_spelling(cli, model):
    Path("link").symlink_to(model)
    Path("up").symlink_to(model.parent)
    for spelling in ("link", "link/", "up/model", model / ".." / "model", "../here/link"):
        refused(cli, model, spelling, "is the source model", "--overwrite")
    refused(cli, model, "link/inside", "is inside the other")
    refused(cli, model, "up", "is inside the other", "--overwrite")


def test_the_source_is_where_the_output_would_be_made(cli, model):
    source = model.rename(model.with_name("out.partial"))
    refused(cli, source, source.with_name("out"), "out.partial is the source model")
    inside = Path(shutil.copytree(source, source.with_name("new.partial") / "output"))
    refused(cli, inside, source.with_name("new"), "is inside the other")


def test_the_hubs_cache(cli, model, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    refused(cli, model, tmp_path / "hub" / "out", "is in the Hub's cache")
    (tmp_path / "hub").mkdir()
    Path("link").symlink_to(tmp_path / "hub")
    refused(cli, model, "link/models--a--b/snapshots/c", "is in the Hub's cache")


def test_what_is_in_the_way(cli, model):
    Path("nowhere").symlink_to("absent")
    Path("file").write_text("mine")
    Path("new.partial").write_text("mine")
    refused(cli, model, "nowhere", "is a file, or a link to nothing", "--overwrite")
    refused(cli, model, "file/out", "cannot be written to")
    refused(cli, model, "new", "new.partial is a file, or a link to nothing")
    refused(cli, model, ".", "is not a name for a new folder", "--overwrite")
    refused(cli, model, "..", "is not a name for a new folder", "--overwrite")


def test_a_folder_that_cannot_be_written_to(cli, model, monkeypatch):
    Path("shut").mkdir(mode=0o555)
    access = os.access  # root may write everywhere, but the file system may be read-only
    monkeypatch.setattr("os.access", lambda path, *mode: Path(path).name != "shut" and access(path, *mode))
    refused(cli, model, "shut/out", "shut cannot be written to")


def test_a_disk_that_is_too_small(cli, model, monkeypatch):
    """Weights, tokenizer, windows, reports and the default method's file of gradients, against what the file system says is free."""
    status = os.statvfs(".")
    weights = sum(path.stat().st_size for path in model.iterdir())
    asked = ["--model", model, "--sparsity", 0.5, "--calibration", BUNDLED / "calibration.txt", "--sequence-length", 64, "--output", "out"]
    for free, method, code in ((0, ["--method", "wanda"], 2), (2, ["--method", "wanda"], 0), (2, [], 2), (16, [], 0)):
        blocks = (weights + (free << 20)) // status.f_frsize
        monkeypatch.setattr("llmprune.run.preflight.os.statvfs", lambda path, n=blocks: os.statvfs_result((*status[:4], n, *status[5:])))
        ran = cli(*asked, *method, "--dry-run")
        assert ran.code == code, ran.err
        assert not code or "bytes, the disk has" in ran.err


def test_another_run_is_named(cli, model):
    Path("out.partial").mkdir()
    handle = lock_folder(Path("out.partial"))
    refused(cli, model, "out", f"out.partial: in use by process {os.getpid()}")
    os.close(handle)


@pytest.mark.parametrize(
    ("words", "mask", "mode"),
    [(("--pattern", "2:4"), 0o077, 0o600), (("--pattern", "2:4"), 0o022, 0o644), (("--pattern", "channels", "--sparsity", 0.25), 0o022, 0o644)],
)
def test_modes_follow_the_umask(cli, small, words, mask, mode):
    before = os.umask(mask)
    try:
        ran = cli("--model", "llama", "--method", "magnitude", "--output", "out", *words, *small)
    finally:
        os.umask(before)
    assert ran.code == 0, ran.err
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in Path("out").iterdir()} == {p.name: oct(mode) for p in Path("out").iterdir()}
    assert stat.S_IMODE(Path("out").stat().st_mode) == 0o777 & ~mask
