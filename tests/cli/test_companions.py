"""The files beside a model's weights come along into every kind of output, and what is not the model's stays behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from cli.hub import Hub
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoTokenizer

import llmprune
from llmprune.checkpoint.companions import LARGEST, NOT_FETCHED, companions
from llmprune.checkpoint.resolve import BUNDLED, open_source
from llmprune.errors import RequestError
from llmprune.publish.hub import is_stale

QUICK = {"calibration": "bundled-calibration", "samples": 4, "sequence_length": 64, "output": "out"}
ALONG = (
    *("qwen.tiktoken", "tekken.json", "preprocessor_config.json", "sentencepiece.bpe.model", "chat_template.jinja", "LICENSE.pdf", "USE_POLICY.md"),
    *("additional_chat_templates/tools.jinja", "additional_chat_templates/deeper/rag.jinja"),
)
BEHIND = (
    *("pytorch_model.bin", "consolidated.00.pth", "params.json", "adapter_model.safetensors", "modeling_own.py"),
    *(
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "trainer_state.json",
        "training_args.bin",
        "all_results.json",
        "runs/one/x.txt",
    ),
    *("checkpoint-500/config.json", "checkpoint-500/tokenizer.json", "original/tokenizer.model", "onnx/decoder_config.json", "figures/card.png"),
    *("report.html", "README.md", "README_zh.md", ".gitattributes", ".git/HEAD", ".cache/huggingface/x", "train.jsonl", "hf_quant_config.json"),
    *("merged/config.json", "merged/vocab.json", "venv/lib/own.py", "venv/LICENSE"),
)
OWN = {"README.md", "report.html", "llmprune.json"}


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """The bundled model with much beside it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BUNDLED / "llama", tmp_path / "model")
    for name in (*ALONG, *BEHIND):
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"this is {name}")
    return tmp_path / "model"


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


KINDS = {
    "masked": {"pattern": "2:4", "method": "magnitude"},
    "sliced": {"pattern": "channels", "sparsity": 0.25, "method": "magnitude"},
    "rotated": {"pattern": "hidden", "sparsity": 0.25, "rotate": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_along_and_what_stays(model, kind):
    llmprune.prune(str(model), **KINDS[kind], **QUICK)
    assert names(Path("out")) - OWN == names(BUNDLED / "llama") | set(ALONG)
    assert all((Path("out") / name).read_bytes() == (model / name).read_bytes() for name in ALONG)
    assert set(ALONG) <= json.loads(Path("out/llmprune.json").read_text())["files"].keys()


def test_a_file_too_large_to_copy_is_named(model, cli):
    os.chdir(model.parent)
    (model / "corpus.txt").touch()
    os.truncate(model / "corpus.txt", LARGEST + 1)  # sparse: takes no disk
    words = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    ran = cli("--model", model, "--pattern", "2:4", "--method", "magnitude", *words)
    assert ran.code == 0, ran.err
    assert f"without corpus.txt, larger than {LARGEST:,} bytes" in ran.out
    assert json.loads(Path("out/llmprune.json").read_text())["source"]["left_behind"] == ["corpus.txt"]
    assert not Path("out/corpus.txt").exists()


def test_a_link_in_a_sub_folder_does_not_lead_out(model):
    Path("secret").write_text("key")
    (model / "additional_chat_templates" / "x.jinja").symlink_to(Path("secret").absolute())
    with pytest.raises(RequestError, match=r"model/additional_chat_templates/x\.jinja: a link that leads out of the folder"):
        open_source(str(model))
    (model / "additional_chat_templates" / "x.jinja").unlink()
    Path("elsewhere").mkdir()
    Path("elsewhere/key.txt").write_text("key")
    (model / "linked").symlink_to(Path("elsewhere").absolute())
    assert "linked/key.txt" not in {p.relative_to(model).as_posix() for p in companions(model)}


def test_a_download_follows_the_same_rule(hub: Hub, model):
    """The client fetches what comes along, the weights, and of the rest only what is read: the card, for its licence."""
    hub.add("models/org/tiny", {name: (model / name).read_bytes() for name in names(model) if not name.startswith("venv/")})
    source = open_source("org/tiny")
    assert {p.relative_to(source.folder).as_posix() for p in companions(source.folder)} == set(ALONG) | names(BUNDLED / "llama") - {
        "config.json",
        "model.safetensors",
    }
    assert {name for name in BEHIND if (source.folder / name).exists()} == {"README.md", "README_zh.md", "merged/config.json", "merged/vocab.json"}
    assert AutoTokenizer.from_pretrained(source.folder)("one").input_ids


def test_sharded_weights_and_their_index_are_fetched():
    wanted = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "llmprune.json", "config.json"]
    assert list(filter_repo_objects([*wanted, "gguf/x.gguf", "sub/model.safetensors", "a/b/.c/d"], ignore_patterns=list(NOT_FETCHED))) == wanted


def test_what_a_push_removes_would_be_loaded():
    removed = ["model.safetensors", "pytorch_model.bin.index.json", "vocab.json", "x.tiktoken", "additional_chat_templates/old.jinja", "modeling.py"]
    kept = [
        "LICENSE",
        "NOTICE.txt",
        "USE_POLICY.md",
        "preprocessor_config.json",
        "original/params.json",
        "onnx/model.onnx",
        "notes.txt",
        "a/vocab.json",
    ]
    assert [name for name in [*removed, *kept] if is_stale(name)] == removed
