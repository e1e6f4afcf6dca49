"""Models and data sets by Hub id, through the real client and a stand-in server."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from cli.hub import Hub, commit_of, metadata_errors, serve, stand_in
from cli.runner import Ran
from forked import running
from huggingface_hub import ModelCard
from huggingface_hub.utils import close_session

from llmprune.checkpoint.resolve import BUNDLED
from llmprune.cli.main import main
from llmprune.data.sources import find_source

LLAMA = {p.name: p.read_bytes() for p in (BUNDLED / "llama").iterdir()}
README = b"---\nlicense: llama3.2\nlanguage:\n- en\nextra_gated_prompt: a promise\n---\n\n# A model\n"
ASK = ("--model", "org/tiny", "--sparsity", 0.5, "--method", "magnitude", "--sequence-length", 64, "--samples", 8, "--output", "out")


def run_at(base: str, here: Path, commands: tuple[tuple[object, ...], ...]) -> None:
    """In a process of its own: the commands, one after the other, with an empty cache; their ends as JSON in the last line of its errors."""
    os.chdir(here)
    values = {"ENDPOINT": base, "HUGGINGFACE_CO_URL_TEMPLATE": f"{base}/{{repo_id}}/resolve/{{revision}}/{{filename}}"}
    values |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(here / "home" / "hub")}
    for name, value in values.items():
        setattr(huggingface_hub.constants, name, value)
    datasets.config.HF_ENDPOINT, datasets.config.HF_HUB_OFFLINE = base, False
    close_session()
    ends = []
    for words in commands:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            try:
                main([str(word) for word in words])
            except SystemExit as end:
                ends.append((end.code or 0, out.getvalue(), err.getvalue()))
    print(json.dumps(ends), file=sys.stderr)


def llmprune(base: str, here: Path, *commands: tuple[object, ...]) -> list[Ran]:
    with running(lambda: run_at(base, here, commands)) as process:
        said = process.communicate()[1]
    assert process.returncode == 0, said
    return [Ran(*end) for end in json.loads(said.splitlines()[-1])]


def lines() -> list[bytes]:
    paragraphs = (BUNDLED / "evaluation.txt").read_text().split("\n\n")
    return [json.dumps({"text": p}).encode() + b"\n" for p in paragraphs]


def test_model_and_data_by_id(tmp_path):
    words = tmp_path / "words"
    words.mkdir()
    (words / "train.jsonl").write_bytes(b"".join(lines()))
    with serve({"models/org/tiny": BUNDLED / "llama", "datasets/org/words": words}) as (base, log):
        ran, gone = llmprune(base, tmp_path, (*ASK, "--calibration", "org/words"), ("--model", "org/absent", "--sparsity", 0.5))
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert report["source"]["name"] == "org/tiny"
    assert report["source"]["revision"] == commit_of(BUNDLED / "llama")
    assert report["calibration"]["dataset"] == "org/words"
    assert report["sparsity"]["pruned_matrices"] == 0.5
    assert not [line for line in log if line.startswith("GET") and line.endswith(".py")]
    assert gone.code == 2
    assert "'org/absent'" in gone.err
    assert "Traceback" not in gone.err


def test_pinned_to_a_revision(tmp_path):
    """The model and the data set as they were at a commit; the card says which, and carries the licence of that time."""
    hub = Hub()
    with stand_in(hub):
        model = hub.add("models/org/tiny", LLAMA | {"README.md": README})
        was = model.commits[0].id
        model.commit(LLAMA | {"config.json": b"{}", "README.md": b"---\nlicense: mit\n---\n"})
        data = hub.add("datasets/org/words", {"train.jsonl": b"".join(lines())})
        then = data.commits[0].id
        data.commit({"train.jsonl": b'{"text": ""}\n'})
        pinned, absent = ((*ASK, "--revision", was, "--calibration", f"org/words@{then}"), (*ASK, "--revision", "0" * 40, "--overwrite"))
        ran, absent = llmprune(hub.base, tmp_path, pinned, absent)
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert report["source"]["revision"] == was
    assert report["calibration"]["dataset"] == f"org/words@{then}"
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.base_model_relation, card.data.license, card.data.language) == (
        "org/tiny",
        "finetune",
        "llama3.2",
        ["en"],
    )
    assert "extra_gated_prompt" not in card.data.to_dict()
    assert f"[org/tiny](https://huggingface.co/org/tiny) at revision `{was}`" in card.text
    assert f'revision = "{was}"' in card.text
    assert metadata_errors(str(card)) == []
    assert absent.code == 2
    assert len(absent.err.splitlines()) == 2


def test_only_code_that_a_config_names_is_fetched_and_none_is_run(tmp_path):
    config = json.loads(LLAMA["config.json"]) | {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    own = {"config.json": json.dumps(config).encode(), "modeling_own.py": b"from .sizes import x\nraise SystemExit('run')\n", "sizes.py": b"x = 1\n"}
    hub = Hub()
    with stand_in(hub):
        hub.add("models/org/tiny", LLAMA | {"unnamed.py": b""})
        hub.add("models/org/own", LLAMA | own)
        other = ("--model", "org/own", *ASK[2:-1], "own", "--calibration", BUNDLED / "calibration.txt")
        ends = llmprune(hub.base, tmp_path, (*ASK, "--calibration", BUNDLED / "calibration.txt"), other)
    assert [end.code for end in ends] == [0, 0], ends[-1].err
    assert list((tmp_path / "out").glob("*.py")) == []
    assert {path.name for path in (tmp_path / "own").glob("*.py")} == {"modeling_own.py", "sizes.py"}
    assert list((tmp_path / "home").rglob("unnamed.py")) == []


@pytest.mark.slow
def test_windows_drawn_from_a_stream(tmp_path):
    """The first rows are not the only ones that windows come from; where they come from is said."""
    hub = Hub()
    with stand_in(hub):
        hub.add("models/org/tiny", LLAMA)
        rows = [json.dumps({"text": f"row {'early' if i < 400 else 'late'} " * 20}).encode() + b"\n" for i in range(800)]
        hub.add("datasets/org/words", {"train.jsonl": b"".join(rows)})
        words = ("--calibration", "org/words")
        first, drawn = llmprune(hub.base, tmp_path, (*ASK, *words), (*ASK[:-1], "drawn", *words, "--shuffle", "--seed", 3))
    assert (first.code, drawn.code) == (0, 0), first.err + drawn.err
    calibration = json.loads((tmp_path / "drawn" / "llmprune.json").read_text())["calibration"]
    assert calibration["drawn_from"] == "a stream shuffled in a buffer of 10,000 rows, seed 3"
    assert "8 windows of 64 from org/words (train), drawn from a stream shuffled in a buffer of 10,000 rows, seed 3" in drawn.out
    assert "drawn_from" not in json.loads((tmp_path / "out" / "llmprune.json").read_text())["calibration"]
    assert calibration["sha256"] != json.loads((tmp_path / "out" / "llmprune.json").read_text())["calibration"]["sha256"]


def test_a_data_sets_revision_is_the_commit_that_it_stands_for(hub: Hub, monkeypatch):
    data = hub.add("datasets/org/words", {"train.jsonl": b"".join(lines())})
    assert find_source("org/words", "calibration").identity == data.commits[0].id
    data.commit({"train.jsonl": b'{"text": "other"}\n'})
    source = find_source("org/words", "calibration")
    assert source.identity == source.revision == data.commits[1].id
    hub.fail(1, lasting=True)
    assert find_source("org/words", "calibration").identity is None
