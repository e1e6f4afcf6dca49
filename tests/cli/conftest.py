from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace

import huggingface_hub
import pytest
from cli.hub import Hub, stand_in
from cli.runner import Cli
from huggingface_hub.utils import close_session

from llmprune.checkpoint.resolve import BUNDLED


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line, in an empty current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Cli(capsys)


@pytest.fixture
def small(tmp_path) -> tuple[object, ...]:
    """Flags that keep a run on the bundled model short."""
    text = tmp_path / "small.txt"
    text.write_text((BUNDLED / "evaluation.txt").read_text()[:4000])
    return ("--samples", 8, "--sequence-length", 64, "--eval", text)


CANARY = "hf_canaryThatNobodyMaySee"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[Hub]:
    """A stand-in for the Hub that the client in this process talks to, logged in; its retries do not wait."""
    with stand_in(Hub(token=CANARY)) as served:
        monkeypatch.setenv("HF_TOKEN", CANARY)
        values = {"ENDPOINT": served.base, "HUGGINGFACE_CO_URL_TEMPLATE": f"{served.base}/{{repo_id}}/resolve/{{revision}}/{{filename}}"}
        values |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "cache")}
        values |= {"HF_TOKEN_PATH": str(tmp_path / "no-token")}
        for name, value in values.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None}))
        close_session()
        yield served
        close_session()
