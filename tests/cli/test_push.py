"""Pushing to the Hub: what arrives loads and is what was there; nothing else is touched; and what is cut off is finished by the same command."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from cli.conftest import CANARY
from cli.hub import INITIAL, WAYS, Hub
from huggingface_hub import ModelCard
from often import often
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.errors import LlmpruneError
from llmprune.publish.card import PLACE
from llmprune.publish.hub import MARK, push
from llmprune.report.stored import read_run

QUICK = {"model": "llama", "samples": 8, "sequence_length": 64}
# Every kind of output, by the recipe that makes it.
OUTPUTS = {
    "dense-shaped": {"pattern": "2:4", "method": "magnitude"},
    "sliced": {"pattern": "channels", "sparsity": 0.25, "uniform": True},
    "fewer-layers": {"pattern": "layers", "sparsity": 0.25},
    "custom-class": {"pattern": "structured", "sparsity": 0.25},
}
DENSE = "dense-shaped"
NOBODY = "http://127.0.0.1:9"  # where nothing listens


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> dict[str, Path]:
    return {}


@pytest.fixture
def output(made, tmp_path, tmp_path_factory, request) -> Path:
    """A copy of a finished output; tests choose its kind by parametrising ``output`` indirectly."""
    kind = getattr(request, "param", DENSE)
    if kind not in made:
        made[kind] = tmp_path_factory.mktemp("made") / "result"
        text = made[kind].with_name("small.txt")
        text.write_text((BUNDLED / "evaluation.txt").read_text()[:4000])
        llmprune.prune(**QUICK | OUTPUTS[kind], eval=[str(text)], output=str(made[kind]))
    return shutil.copytree(made[kind], tmp_path / "out")


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def expected(folder: Path, repo: str) -> dict[str, bytes]:
    """What a new repository holds after a push."""
    files = INITIAL | files_of(folder)
    return files | {"README.md": files["README.md"].replace(PLACE.encode(), repo.encode())}


@pytest.mark.parametrize("output", often(OUTPUTS, "dense-shaped", "sliced"), indirect=True)
def test_what_is_pushed_loads(hub: Hub, output, cli, tmp_path, monkeypatch, request):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    ran = cli("push", output, "tiny")
    assert ran.code == 0, ran.err
    assert "me/tiny (private, new)" in ran.out
    repository = hub.repositories["models/me/tiny"]
    assert repository.private
    assert len(repository.commits) == 2, "the Hub's own and ours"
    assert repository.files == expected(output, "me/tiny")
    own = "auto_map" in json.loads((output / "config.json").read_text())
    assert own == ("custom-class" in request.node.name)
    assert own == ("trust_remote_code=True" in repository.files["README.md"].decode())
    here = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=own)
    there, said = AutoModelForCausalLM.from_pretrained(
        "me/tiny", cache_dir=tmp_path / "cache", token=CANARY, trust_remote_code=own, output_loading_info=True
    )
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert there.state_dict().keys() == here.state_dict().keys()
    assert all(torch.equal(value, there.state_dict()[key]) for key, value in here.state_dict().items())
    assert AutoTokenizer.from_pretrained("me/tiny", cache_dir=tmp_path / "cache", token=CANARY)("one").input_ids
    assert not (output / MARK).exists()
    assert "holds it already" in cli("push", output, "me/tiny").out
    assert "is private" in cli("push", output, "me/tiny", "--public").err
    assert len(repository.commits) == 2


def test_the_card_passes_the_hubs_checks(hub: Hub, output):
    loaded = ModelCard.load(output / "README.md")
    loaded.validate()
    assert hub.log == ["POST /api/validate-yaml"]
    assert loaded.data.tags == ["pruned", "llmprune", "2:4", "magnitude"]
    (found,) = loaded.data.eval_results
    pair = json.loads((output / "llmprune.json").read_text())["perplexity"][0]
    assert (found.metric_type, found.metric_value, found.metric_args["dense"]) == ("perplexity", pair["pruned"]["value"], pair["dense"]["value"])
    assert ModelCard(str(loaded)).data.to_dict() == loaded.data.to_dict()


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("way", often(WAYS, "dropped"))
def test_whatever_request_fails_the_same_command_finishes(hub: Hub, output, way, lasting):
    push(output, "me/clean")
    requests, stops = hub.asked, []
    assert requests > 8
    for at in range(1, requests + 1):
        hub.repositories.clear()
        hub.blobs.clear()
        hub.writes.clear()
        hub.fail(at, way, lasting)
        try:
            push(output, "me/tiny")
        except LlmpruneError as error:
            stops.append(error)
        hub.fail(None)
        pushed = push(output, "me/tiny")
        assert pushed.complete, at
        repository = hub.repositories["models/me/tiny"]
        assert len(repository.commits) == 2, at
        assert repository.private
        assert repository.files == expected(output, "me/tiny")
        arrived = [write for write in hub.writes if write.startswith("large")]
        assert len(set(arrived)) == len(hub.blobs)
        assert len(arrived) == len(set(arrived)) or way in ("dropped", "truncated"), "only what lost its answer is sent again"
        assert not (output / MARK).exists()
    assert len(stops) == requests if lasting else stops
    assert {error.exit_code for error in stops} == {3}
    assert all(f"llmprune push {output} me/tiny resumes" in error.hint for error in stops)
    assert not any(CANARY in error.message + error.hint for error in stops)


def test_large_files_that_have_arrived_are_not_sent_again(hub: Hub, output):
    push(output, "me/first")
    hub.writes.clear()
    pushed = push(output, "me/second")
    assert hub.writes == ["create models/me/second", "commit models/me/second"]
    assert pushed.created
    assert hub.repositories["models/me/second"].files == expected(output, "me/second")


OLD = {
    ".gitattributes": b"",
    "README.md": b"# Mine\n",
    "picture.png": b"png",
    "notes/model.safetensors": b"in a folder that nobody loads",
    "LICENSE": b"mine",
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"old 1",
    "model-00002-of-00002.safetensors": b"old 2",
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"old",
    "modeling_old.py": b"print()",
    "adapter_config.json": b"{}",
    "tokenizer.model": b"old",
}


def test_an_existing_repository_only_when_asked(hub: Hub, output, cli):
    repository = hub.add("models/me/old", OLD, private=True)
    ran = cli("push", output, "me/old")
    assert ran.code == 2
    assert ran.err.splitlines() == [
        "error: repository me/old: exists already",
        "hint: add --existing to replace the model in it, or choose another name",
    ]
    planned = cli("push", output, "me/old", "--existing", "--dry-run")
    assert planned.code == 0
    assert "would remove: pytorch_model.bin" in planned.out
    assert hub.writes == []
    assert cli("push", output, "me/old", "--existing").code == 0
    assert len(repository.commits) == 2
    kept = {name: OLD[name] for name in (".gitattributes", "picture.png", "notes/model.safetensors", "LICENSE")}
    assert repository.files == kept | {name: data for name, data in expected(output, "me/old").items() if name != ".gitattributes"}


def test_an_empty_repository_of_somebody_else_is_existing_too(hub: Hub, output):
    hub.add("models/me/old", dict(INITIAL), private=True)
    with pytest.raises(LlmpruneError, match="exists already"):
        push(output, "me/old")
    assert hub.writes == []


@pytest.mark.parametrize("private", [True, False])
def test_visibility_is_as_asked_or_refused(hub: Hub, output, private):
    hub.add("models/me/old", OLD, private=private)
    with pytest.raises(LlmpruneError, match="is private" if private else "is public"):
        push(output, "me/old", existing=True, public=private)
    assert hub.writes == []
    pushed = push(output, "me/new", public=not private)
    assert pushed.public != private
    assert hub.repositories["models/me/new"].private == private


def test_somebody_commits_meanwhile(hub: Hub, output, monkeypatch):
    """Their commit is not written over."""
    repository = hub.add("models/me/old", OLD, private=True)
    real = llmprune.publish.hub.send

    def send(*arguments):
        repository.commit(OLD | {"theirs.txt": b"new"})
        return real(*arguments)

    monkeypatch.setattr("llmprune.publish.hub.send", send)
    with pytest.raises(LlmpruneError, match="commit has happened since"):
        push(output, "me/old", existing=True)
    assert len(repository.commits) == 2


def damage(output: Path, how: str) -> Path:
    if how == "partial":
        return output.rename(output.with_name("out.partial"))
    if how == "unreported":
        (output / "llmprune.json").unlink()
    elif how == "edited":
        (output / "config.json").write_text((output / "config.json").read_text() + " ")
    elif how == "weights":
        with open(output / "model.safetensors", "r+b") as file:
            file.seek(-2, 2)
            file.write(b"\x01\x02")
    elif how == "missing":
        (output / "tokenizer.json").unlink()
    elif how == "outside":
        report = json.loads((output / "llmprune.json").read_text())
        report["files"]["../secret"] = "0"
        (output / "llmprune.json").write_text(json.dumps(report))
    return output


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("partial", "is unfinished"),
        ("unreported", "holds no llmprune.json"),
        ("edited", "differ from what the run wrote, first 'config.json'"),
        ("weights", "differ from what the run wrote, first 'model.safetensors'"),
        ("missing", "1 of 5 files are missing, first 'tokenizer.json'"),
        ("outside", "lies outside the folder"),
    ],
)
def test_only_a_finished_and_verified_output(hub: Hub, output, cli, how, said):
    ran = cli("push", damage(output, how), "me/tiny")
    assert ran.code == 2
    assert said in ran.err
    assert len(ran.err.splitlines()) == 2
    assert hub.log == []


def test_the_card_may_be_edited_and_other_files_stay_at_home(hub: Hub, output, cli):
    (output / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    (output / "notes.txt").write_text("secret")
    (output / ".env").write_text("secret")
    ran = cli("push", output, "me/tiny")
    assert ran.code == 0, ran.err
    assert "left out: notes.txt" in ran.out
    assert ".env" not in ran.out
    files = hub.repositories["models/me/tiny"].files
    assert b"# Mine" in files["README.md"]
    assert not files.keys() & {"notes.txt", ".env"}


@pytest.mark.parametrize("repo", ["me/a/b", "me/a..b", "../up", "", "-x"])
def test_bad_names(hub: Hub, output, cli, repo):
    ran = cli("push", output, "--", repo)
    assert ran.code == 2, ran.err
    assert len(ran.err.splitlines()) == 2
    assert hub.log == []


def test_tokens(hub: Hub, output, cli, monkeypatch):
    hub.role = "read"
    assert "the token may only read" in cli("push", output, "me/tiny").err
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused = cli("push", output, "me/tiny")
    assert refused.code == 2
    assert "the Hub refuses" in refused.err
    assert "hf_wrong" not in refused.err
    monkeypatch.delenv("HF_TOKEN")
    refused = cli("push", output, "me/tiny")
    assert refused.code == 2
    assert refused.err.splitlines()[0] == "error: no Hub token"
    assert hub.writes == []


def test_a_dry_run_needs_neither_token_nor_network(hub: Hub, output, cli, monkeypatch):
    seen = json.loads(cli("push", output, "me/tiny", "--dry-run", "--json").out)
    for lost, reason in (("HF_TOKEN", "no Hub token"), ("ENDPOINT", "refused")):
        with monkeypatch.context() as without:
            without.delenv("HF_TOKEN") if lost == "HF_TOKEN" else without.setattr("huggingface_hub.constants.ENDPOINT", NOBODY)
            dry = cli("push", output, "me/tiny", "--dry-run", "--json")
        assert dry.code == 0, dry.err
        found = json.loads(dry.out)
        assert reason in found["unseen"]
        assert (found["sent"], found["commit"], found["complete"]) == (seen["sent"], None, False)
    assert hub.writes == []


def test_prune_and_push(hub: Hub, cli, small, tmp_path):
    """Refused before any work, or done in one go; the token is in nothing that was printed or written."""
    ask = ("--model", "llama", "--pattern", "2:4", "--method", "magnitude", *small, "--output", "out")
    hub.add("models/me/old", OLD, private=True)
    refused = cli(*ask, "--push", "me/old")
    assert refused.code == 2
    assert "exists already" in refused.err
    assert cli(*ask, "--existing").code == 2
    assert not any(path.name.startswith("out") for path in Path.cwd().iterdir())
    dry = cli(*ask, "--push", "me/tiny", "--dry-run")
    assert dry.code == 0
    assert hub.writes == []
    ran = cli(*ask, "--push", "me/tiny")
    assert ran.code == 0, ran.err
    assert "pushed to me/tiny (private, new)" in ran.out
    assert hub.repositories["models/me/tiny"].files == expected(Path("out"), "me/tiny")
    printed = "".join(text for one in (refused, dry, ran) for text in (one.out, one.err))
    written = [path for path in tmp_path.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert CANARY not in printed
    assert written == []
    sent = [data for repository in hub.repositories.values() for data in repository.files.values()]
    assert not any(CANARY.encode() in data or str(tmp_path).encode() in data for data in sent)


def test_a_push_is_checked_before_any_work(hub: Hub, cli):
    """Also where the Hub does not answer. A recipe may be a stranger's, so it cannot say where a model is sent."""
    words = ("--model", "llama", "--sparsity", 0.5, "--output", "out", "--push", "me/old")
    hub.add("models/me/old", OLD, private=True)
    assert "exists already" in cli(*words).err
    hub.fail(1, "500", lasting=True)
    silent = cli(*words)
    assert (silent.code, len(silent.err.splitlines())) == (2, 2)
    hub.fail(None)
    Path("recipe.toml").write_text('model = "llama"\npush = "me/new"\n')
    refused = cli("--recipe", "recipe.toml", "--sparsity", 0.5, "--output", "out")
    assert refused.code == 2
    assert "recipe key 'push' is unknown" in refused.err
    assert [path.name for path in Path.cwd().iterdir()] == ["recipe.toml"]


@pytest.mark.parametrize("way", WAYS)
def test_cut_off_in_two_lines(hub: Hub, output, cli, way):
    hub.fail(4, way, lasting=True)
    ran = cli("push", output, "me/tiny")
    assert ran.code == 3
    error, hint = ran.err.splitlines()
    assert error.startswith("error: repository me/tiny: ")
    assert hint.startswith("hint: llmprune push ")
    assert CANARY not in ran.out + ran.err


def test_the_python_face(hub: Hub, output, tmp_path):
    ask = QUICK | {"pattern": "2:4", "method": "magnitude", "output": str(tmp_path / "made")}
    report = llmprune.prune(**ask)
    pushed = report.push("tiny", public=True)
    assert (pushed.repo, pushed.public, pushed.complete) == ("me/tiny", True, True)
    assert pushed.commit is not None
    held = [llmprune.push(result, "tiny", public=True) for result in (report, report.output, str(report.output), read_run(report.output))]
    assert [(h.repo, h.commit, h.complete) for h in held] == [("me/tiny", None, True)] * 4
    planned = llmprune.push(report, "me/other", dry_run=True)
    assert (planned.complete, "models/me/other" in hub.repositories) == (False, False)
    assert planned == report.push("me/other", dry_run=True)


def test_a_live_model_has_nothing_to_push(hub: Hub, output):
    model, _ = llmprune.load(output)
    ask = {"pattern": "2:4", "method": "magnitude", "calibration": torch.ones(1, 8, dtype=torch.long)}
    with pytest.raises(LlmpruneError, match="push with a model in memory"):
        llmprune.prune(model, **ask, push="me/x")
    report = llmprune.prune(model, **ask)
    for push_it in (report.push, partial(llmprune.push, report)):
        with pytest.raises(LlmpruneError, match="live model"):
            push_it("me/x")
    assert hub.repositories == {}
