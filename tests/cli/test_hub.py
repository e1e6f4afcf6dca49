"""Models and data sets by Hub id, through the real client and a stand-in server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from cli.hub import commit_of, serve

from llmprune.checkpoint.resolve import BUNDLED


def llmprune(base: str, here: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": base, "HF_HOME": str(here / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "llmprune", *map(str, words)], env=environment, cwd=here, capture_output=True, text=True, check=False
    )


def test_model_and_data_by_id(tmp_path):
    words = tmp_path / "words"
    words.mkdir()
    paragraphs = (BUNDLED / "evaluation.txt").read_text().split("\n\n")
    (words / "train.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs))
    with serve({"models/org/tiny": BUNDLED / "llama", "datasets/org/words": words}) as (base, log):
        ask = ("--model", "org/tiny", "--sparsity", 0.5, "--sequence-length", 64, "--samples", 8, "--output", "out")
        ran = llmprune(base, tmp_path, *ask, "--calibration", "org/words")
        assert ran.returncode == 0, ran.stderr
        gone = llmprune(base, tmp_path, "--model", "org/absent", "--sparsity", 0.5)
    report = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert report["source"]["name"] == "org/tiny"
    assert report["source"]["revision"] == commit_of(BUNDLED / "llama")
    assert report["calibration"]["dataset"] == "org/words"
    assert report["sparsity"]["pruned_matrices"] == 0.5
    assert not [line for line in log if line.startswith("GET") and line.endswith(".py")]
    assert gone.returncode == 2
    assert "'org/absent'" in gone.stderr
    assert "Traceback" not in gone.stderr
