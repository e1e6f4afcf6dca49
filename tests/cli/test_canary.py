"""A token and a home folder that would be known anywhere: they are in nothing that a run prints, writes or sends, whether it succeeds or not."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path

import pytest
from cli.conftest import CANARY
from cli.hub import Hub

from llmprune.checkpoint.resolve import BUNDLED

HOME = "canary-home-xyz"
SHORT = ("--samples", 4, "--sequence-length", 32, "--calibration")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a model, a recipe and a text in it, as the environment has it."""
    home = tmp_path / HOME
    shutil.copytree(BUNDLED / "llama", home / "model")
    (home / "text.txt").write_text((BUNDLED / "evaluation.txt").read_text()[:8000])
    (home / "recipe.toml").write_text(f'method = "magnitude"\nsamples = 4\nsequence_length = 32\ncalibration = "{home}/text.txt"\n')
    for name, value in {"HOME": home, "USERPROFILE": home, "XDG_CACHE_HOME": home / ".cache"}.items():
        monkeypatch.setenv(name, str(value))
    return home


def marks(home: Path) -> list[bytes]:
    token = CANARY.encode()
    return [token, base64.b64encode(token)[:20], HOME.encode()]


def found_in(data: bytes, home: Path) -> list[bytes]:
    return [mark for mark in marks(home) if mark in data]


def test_neither_token_nor_home_is_printed_written_or_sent(hub: Hub, cli, home: Path):
    here = Path.cwd()
    common = ("--model", home / "model", "--recipe", home / "recipe.toml")
    hub.add("models/me/old", {"config.json": b"{}"}, private=True)
    (home / "broken").mkdir()
    (home / "binary.txt").write_bytes(bytes(9999))
    succeed = [
        (*common, "--pattern", "2:4", "--output", home / "result", "--push", "me/tiny"),
        (*common[:2], "--method", "wanda", "--sparsity", 0.5, *SHORT, home / "text.txt", "--output", "~/other", "--json"),
        (*common, "--sparsity", 0.5, "--eval", home / "text.txt", "--output", "here", "--dry-run"),
        ("inspect", home / "result", "--manifest"),
        ("report", home / "result"),
        ("compare", home / "result", "--html", home / "both.html"),
        ("push", home / "result", "me/other"),
    ]
    fail = [
        (*common, "--pattern", "2:4", "--output", home / "result"),
        (*common, "--pattern", "2:4", "--output", home / "new", "--push", "me/old"),
        ("--model", home / "absent", "--sparsity", 0.5),
        ("--model", home / "broken", "--sparsity", 0.5),
        ("--model", home / "model", "--sparsity", 0.5, "--calibration", home / "absent.txt"),
        ("--model", home / "model", "--sparsity", 0.5, "--calibration", home / "absent"),
        ("--model", home / "model", "--sparsity", 0.5, "--calibration", home / "binary.txt"),
        ("--recipe", home / "absent.toml"),
        ("push", home / "model", "me/x"),
        ("eval", home / "model", "--data", home / "absent.txt"),
        ("inspect", home / "model", "--manifest"),
    ]
    printed = ""
    for words, code in [*((words, 0) for words in succeed), *((words, 2) for words in fail)]:
        ran = cli(*words)
        assert ran.code == code, (words, ran.err)
        assert not found_in((ran.out + ran.err).encode(), home), (words, ran.out, ran.err)
        printed += ran.out
    assert "output: ~/result" in printed
    hub.fail(4, "500", lasting=True)
    cut = cli("push", home / "result", "me/third")
    assert cut.code == 3
    assert not found_in((cut.out + cut.err).encode(), home), cut.err
    made = [path for root in (here, home / "result", home / "other") for path in root.rglob("*") if path.is_file()]
    made.append(home / "both.html")
    assert {"llmprune.json", "report.html", "README.md", "config.json"} <= {path.name for path in made}
    assert [(path, found) for path in made if (found := found_in(path.read_bytes(), home))] == []
    assert [path for path in home.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()] == []
    assert len(hub.heard) > 10
    assert [request[:200] for request in hub.heard if found_in(request, home)] == []
