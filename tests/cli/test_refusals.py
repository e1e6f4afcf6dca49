"""Bad input: one line, exit 2, nothing written, the source and existing outputs untouched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmprune
from llmprune.checkpoint.resolve import BUNDLED

LLAMA = BUNDLED / "llama"
TEXT = BUNDLED / "calibration.txt"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(cli, *words: object, says: str, hint: str = "") -> None:
    """The command exits 2 with one error line and one hint line, and writes nothing here."""
    before = snapshot(Path.cwd())
    ran = cli(*words)
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert ran.code == 2, ran.err
    assert len(errors) == 1
    assert says in errors[0], ran.err
    assert "Traceback" not in ran.err
    assert hint in ran.err
    assert snapshot(Path.cwd()) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--sparsity", "-0.5"), "outside 0 <= sparsity < 1"),
        (("--sparsity", "1.0"), "outside 0 <= sparsity < 1"),
        (("--sparsity", "1.5"), "outside 0 <= sparsity < 1"),
        (("--sparsity", "50"), "outside 0 <= sparsity < 1"),
        (("--sparsity", "nan"), "is not a number"),
        (("--sparsity", "abc"), "is not a number"),
        (("--sparsity", "0.7", "--pattern", "2:4"), "pattern 2:4 means sparsity 0.5, not 0.7"),
        ((), "no sparsity"),
        (("--pattern", "5:4"), "would keep 5 of every 4"),
        (("--pattern", "4:4"), "would keep 4 of every 4"),
        (("--pattern", "0:4"), "would keep 0 of every 4"),
        (("--pattern", "2:x"), "pattern '2:x' is unknown"),
        (("--pattern", "block:4"), "pattern 'block:4' is unknown"),
        (("--pattern", "block:1x1", "--sparsity", "0.5"), "pattern 'block:1x1' has no block of more than one weight"),
        (("--pattern", "block:4x4"), "no sparsity"),
        (("--pattern", "block:5x4", "--sparsity", "0.5"), "matrices have a shape that 5 x 4 do not divide"),
        (("--pattern", "block:4x4", "--sparsity", "0.5", "--group", "row"), "group 'row' with pattern block:4x4"),
        (("--pattern", "2:4", "--group", "row"), "group 'row' with pattern 2:4"),
        (("--sparsity", "0.5", "--method", "wnda"), "method 'wnda' is unknown"),
        (("--sparsity", "0.5", "--criterion", "magnitud"), "criterion 'magnitud' is unknown"),
        (("--sparsity", "0.5", "--solver", "mask"), "solver 'mask' is unknown"),
        (("--sparsity", "0.5", "--allocation", "unifrom"), "allocation 'unifrom' is unknown"),
        (("--sparsity", "0.5", "--criterion", "wanda", "--solver", "sparsegpt"), "ranks by its own saliency"),
        (("--sparsity", "0.5", "--solver", "mask_only"), "needs a criterion"),
        (("--sparsity", "0.5", "--method", "wanda", "--criterion", "wanda"), "together with"),
        (("--sparsity", "0.5", "--skip", "("), "is not a regular expression"),
        (("--sparsity", "0.5", "--samples", "0"), "samples 0"),
        (("--sparsity", "0.5", "--samples", "x"), "--samples"),
        (("--sparsity", "0.5", "--dtype", "int8"), "dtype 'int8'"),
        (("--sparsity", "0.5", "--device", "cuda:99"), "device 'cuda:99'"),
        (("--sparsity", "0.5", "--frobnicate"), "--frobnicate"),
        (("--sparsity", "0.5", "--samples", "1000"), "182 windows of 256, 1000 asked for"),
        (("--sparsity", "0.5", "--sequence-length", "1024"), "512 positions"),
        (("--sparsity", "0.5", "--only", "nothing_is_called_so"), "no matrix is selected"),
        (("--sparsity", "0.5", "--calibration", "absent.txt"), "no such file"),
        (("--sparsity", "0.5", "--calibration", "unheard-of"), "no known data set"),
        (("--sparsity", "0.5", "--eval", "absent.jsonl"), "no such file"),
        (("--sparsity", "0.5", "--recipe", "absent.toml"), "recipe absent.toml"),
    ],
)
def test_bad_flags(cli, words, says):
    refused(cli, "--model", "llama", *words, says=says)


def test_nearest_name_is_offered(cli):
    refused(cli, "--model", "llama", "--sparsity", 0.5, "--method", "sparsgpt", says="'sparsgpt'", hint="did you mean 'sparsegpt'?")


def test_no_model(cli):
    refused(cli, "--sparsity", 0.5, says="no model", hint="--model llama")


def test_missing_folder(cli):
    refused(cli, "--model", "./absent", "--sparsity", 0.5, says="no such folder")


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the bundled model that a test may damage."""
    return Path(shutil.copytree(LLAMA, tmp_path / "model"))


def damaged(cli, model: Path, says: str) -> None:
    before = snapshot(model)
    refused(cli, "--model", model, "--sparsity", 0.5, "--calibration", TEXT, "--sequence-length", 256, says=says)
    assert snapshot(model) == before


def test_folder_without_safetensors(cli, model):
    (model / "model.safetensors").unlink()
    damaged(cli, model, "no safetensors weights")


def test_pickles_only(cli, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    damaged(cli, model, "only pickles (pytorch_model.bin)")


def test_folder_without_config(cli, model):
    (model / "config.json").unlink()
    damaged(cli, model, "model/config.json")


def test_truncated_safetensors(cli, model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    damaged(cli, model, "header describes")


def test_missing_shard(cli, model):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    half = sorted(tensors)[: len(tensors) // 2]
    save_file({k: tensors[k] for k in half}, model / "model-00001-of-00002.safetensors")
    names = {k: f"model-0000{1 if k in half else 2}-of-00002.safetensors" for k in tensors}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    damaged(cli, model, "1 of 2 weight files missing: model-00002-of-00002.safetensors")


def test_nan_weight(cli, model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4:6] = torch.nan
    save_file(tensors, model / "model.safetensors")
    damaged(cli, model, "NaN or infinite weights in model.layers.2.mlp.up_proj.weight (2)")
    refused(cli, "eval", model, "--data", TEXT, says="NaN or infinite weights in model.layers.2.mlp.up_proj.weight (2)")


def test_missing_tensor(cli, model):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.5.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")
    damaged(cli, model, "1 tensors missing: model.layers.5.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "lama"}, "model_type 'lama' is unknown"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers is 100000"),
        ({"num_hidden_layers": 9}, "num_hidden_layers is 9, the weights hold 8 blocks: all tensors missing from block 8 on"),
        ({"num_hidden_layers": 7}, "9 tensors of blocks that the config does not have: model.layers.7."),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"intermediate_size": 512}, "another shape"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantised (gptq)"),
        ({"hidden_size": "wide"}, "cannot build 'llama'"),
    ],
)
def test_config_that_does_not_fit(cli, model, change, says):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    damaged(cli, model, says)


def test_all_that_does_not_fit_is_named_at_once(cli, model):
    tensors = load_file(model / "model.safetensors")
    for name in ("up_proj", "down_proj"):
        del tensors[f"model.layers.5.mlp.{name}.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 5)
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros_like(tensors["model.layers.3.mlp.up_proj.weight"]).to(torch.int8)
    save_file(tensors, model / "model.safetensors")
    damaged(cli, model, "model.layers.3.mlp.up_proj.weight (I8); 2 tensors missing: model.layers.5.mlp.up_proj.weight, model.layers.5.mlp.down_proj")
    damaged(cli, model, "1 tensors of another shape: model.layers.2.mlp.up_proj.weight is [3, 5], the config says")


def test_a_tokenizer_with_code_of_its_own(cli, model):
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "own.py").write_text("raise SystemExit('run')")
    damaged(cli, model, "tokenizer")


def test_a_model_of_code_of_its_own(cli, model):
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text("raise SystemExit('run')")
    damaged(cli, model, "model_type 'own' is unknown to transformers")


def test_code_of_its_own_is_not_run_by_an_answer_in_a_pipe(model, monkeypatch):
    """transformers asks where it is not told, and ``yes`` answers."""
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    (model / "own.py").write_text("raise SystemExit('run')")
    config = json.loads((model / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config | own))
    with pytest.raises(ValueError, match="trust_remote_code"):
        llmprune.load(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        llmprune.load(model)


@pytest.mark.parametrize("damage", ["absent", "not-json", "empty", "a-list", "other-class"])
def test_an_unusable_tokenizer(cli, model, damage):
    path = model / "tokenizer.json"
    if damage == "absent":
        path.unlink()
    else:
        path.write_text({"not-json": "{", "empty": "", "a-list": "[]", "other-class": '{"version": "1.0", "model": {"type": "Own"}}'}[damage])
    damaged(cli, model, "tokenizer")


def test_ids_beyond_the_vocabulary(cli, model):
    config = json.loads((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensor[:100].clone()
    save_file(tensors, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}))
    damaged(cli, model, "the model's vocabulary is 0 to 99")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"  \n ", "holds no text"),
        (b"a few words", "tokens, less than one window of"),
        (b"\xff\xfe\x00\x01" * 5000, "text.txt: line 1: not UTF-8"),
    ],
)
def test_unusable_text(cli, tmp_path, content, says):
    (tmp_path / "text.txt").write_bytes(content)
    refused(cli, "--model", "llama", "--sparsity", 0.5, "--calibration", tmp_path / "text.txt", says=says)


def test_width_that_m_does_not_divide(cli, model):
    refused(
        cli, "--model", "llama", "--pattern", "3:9", says="56 matrices have a width that 9 does not divide: model.layers.0.self_attn.q_proj.weight ["
    )


def test_existing_outputs(cli, model):
    Path("file").write_text("mine")
    Path("full").mkdir()
    Path("full/config.json").write_text("{}")
    Path("notes").mkdir()
    Path("notes/diary.txt").write_text("mine")
    ask = ("--model", model, "--sparsity", 0.5, "--calibration", TEXT, "--sequence-length", 256, "--output")
    refused(cli, *ask, "file", says="is a file")
    refused(cli, *ask, "file", "--overwrite", says="is a file")
    refused(cli, *ask, "full", says="exists already", hint="--overwrite")
    refused(cli, *ask, "notes", "--overwrite", says="contains no config.json")
    refused(cli, *ask, model, "--overwrite", says="is the source model")
    refused(cli, *ask, model / ".." / "model", "--overwrite", says="is the source model")
    refused(cli, *ask, model / "inside", says="is inside the other")
    refused(cli, *ask, model.parent, "--overwrite", says="is inside the other")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('sparsty = 0.5\nmodel = "llama"', "recipe key 'sparsty' is unknown"),
        ("sparsity = ", "not valid TOML"),
        ("model = 3\nsparsity = 0.5", "model 3"),
        ('model = "llama"\nsparsity = true', "sparsity True"),
        ('model = "llama"\nsparsity = 0.5\npush = "me/mine"', "recipe key 'push' is unknown"),
        ('model = "llama"\nsparsity = 0.5\ntrust_remote_code = true', "recipe key 'trust_remote_code' is unknown"),
    ],
)
def test_bad_recipes(cli, content, says):
    Path("r.toml").write_text(content)
    refused(cli, "--recipe", "r.toml", says=says)


def test_a_recipe_of_insane_size(cli):
    Path("r.toml").write_bytes(b"#" * (1 << 20) + b"\n")
    refused(cli, "--recipe", "r.toml", says="larger than 1048576 bytes")


def test_other_commands(cli, model):
    refused(cli, "inspect", "./absent", says="no such folder")
    refused(cli, "inspect", "llama", "--verify", "2:x", says="pattern '2:x' is unknown")
    refused(cli, "eval", "llama", "--window", 4096, says="512 positions")
    refused(cli, "eval", model, says="no data")
    refused(cli, "methods", "wandas", says="'wandas' is unknown", hint="did you mean 'wanda'?")
    refused(cli, "prun", says="prun")
