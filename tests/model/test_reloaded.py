"""Every run loads its result again before it is published, and notices what is not the source's or the pruned model's."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import tiny
from families import tiny_windows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llmprune
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.checkpoint.sink import Sink
from llmprune.errors import PromiseError, RequestError
from llmprune.export.check import compared
from llmprune.export.reload import Reloader

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
QUICK = {"pattern": "2:4", "method": "magnitude", "calibration": "bundled-calibration", "samples": 4, "sequence_length": 64}
PICTURES = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30}}


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """The bundled model as people's are: with a chat template, a processor of images, and a tensor that its class does not know."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BUNDLED / "llama", tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "model/preprocessor_config.json").write_text(json.dumps(PICTURES))
    file = tmp_path / "model/model.safetensors"
    save_file(load_file(file) | {"score.weight": torch.ones(2, 192)}, file, {"format": "pt"})
    return tmp_path / "model"


@pytest.mark.fresh_process
def test_a_result_is_loaded_in_a_fresh_process(model, tmp_path) -> None:
    report = llmprune.prune(model, output=str(tmp_path / "out"), **QUICK)
    found = report.reloaded
    assert (found.difference, found.tokens, found.instead) == (0, 64, "")
    assert found.equal == ("tokenizer", "chat template", "processor")
    assert str(found) == (
        "loaded again by transformers in a fresh process: logits equal to the pruned model's; "
        "equal to the source's: tokenizer, chat template, processor"
    )
    assert json.loads((tmp_path / "out/llmprune.json").read_text())["reloaded"]["equal"] == list(found.equal)


def test_what_does_not_load_from_the_source_either_is_named(model, tmp_path) -> None:
    (model / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Nobodys"}))
    found = llmprune.prune(model, output=str(tmp_path / "out"), **QUICK).reloaded
    assert found.unread == ("processor",)
    assert str(found).endswith("chat template; not compared, because the source's does not load here: processor")
    assert str(found) in html.unescape((tmp_path / "out/report.html").read_text())


def other_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = 1.01 * tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def lost_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def other_tokens(folder: Path) -> None:
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace('"Ġriver"', '"Ġrivr"'))


def lost_tokens(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE + "!")


def other_pictures(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES | {"size": {"shortest_edge": 31}}))


def other_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nobody's"}))


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (other_weight, "logits differ from the pruned model's by 0.0"),
    (lost_weight, "does not fit its class, missing keys: model.layers.3.mlp.up_proj.weight"),
    (other_tokens, "tokenizer does not load as the source's does"),
    (lost_tokens, "tokenizer does not load as the source's does"),
    (other_template, "chat template does not load as the source's does"),
    (other_pictures, "processor does not load as the source's does"),
]


def damaged(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    """Something befalls the folder after it was written."""
    finish = Sink.finish

    def finish_badly(self: Sink) -> None:
        finish(self)
        damage(self.folder)

    monkeypatch.setattr(Sink, "finish", finish_badly)


@pytest.mark.parametrize(("damage", "said"), DAMAGE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_result_is_not_published(model, tmp_path, monkeypatch, damage, said) -> None:
    damaged(monkeypatch, damage)
    with pytest.raises(PromiseError, match=said):
        llmprune.prune(model, output=str(tmp_path / "out"), **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.fresh_process
def test_what_transformers_says_of_a_result_that_does_not_load(model, tmp_path) -> None:
    shutil.copytree(model, tmp_path / "out")
    other_kind(tmp_path / "out")
    reloader = Reloader(model, tmp_path, torch.float32)
    with reloader, pytest.raises(PromiseError, match=r"does not load with transformers: .*nobody's"):
        reloader.load(tmp_path / "out", torch.tensor([[1, 2]]))


@pytest.mark.fresh_process
def test_the_process_ends_with_a_run_that_fails(tmp_path) -> None:
    reloader = Reloader(BUNDLED / "llama", tmp_path, torch.float32)
    with reloader:
        reloader.start()
        process = reloader._process
        assert process.poll() is None
        process.kill()
        process.wait()
        with pytest.raises(MemoryError):
            reloader.load(BUNDLED / "llama", torch.tensor([[1, 2]]))
    again = Reloader(BUNDLED / "llama", tmp_path, torch.float32)
    with again:
        again.start()
    assert again._process.returncode is not None


def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.export.check.memory_limit", lambda: 1000)
    monkeypatch.setattr(Reloader, "load", lambda *about: pytest.fail("it was loaded whole"))


@pytest.mark.parametrize("pattern", ["2:4", "channels"])
def test_without_memory_for_the_whole_its_blocks_are_loaded(model, tmp_path, monkeypatch, pattern) -> None:
    no_room(monkeypatch)
    options: dict[str, Any] = QUICK | {"pattern": pattern, "sparsity": None if pattern == "2:4" else 0.25}
    found = llmprune.prune(model, output=str(tmp_path / "out"), **options).reloaded
    assert found.difference < 1e-4
    assert found.instead.startswith("loaded again block by block, not by transformers: loading the result takes about ")
    assert found.instead.endswith(" bytes at once, more than were free")


def test_a_process_that_is_killed_for_its_memory_does_not_end_the_run(model, tmp_path, monkeypatch) -> None:
    def killed(*about: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Reloader, "load", killed)
    found = llmprune.prune(model, output=str(tmp_path / "out"), **QUICK).reloaded
    assert found.difference == 0
    assert "by transformers: the process that loaded the result was killed" in found.instead


def test_block_by_block_a_damaged_result_is_noticed_too(model, tmp_path, monkeypatch) -> None:
    no_room(monkeypatch)
    for damage, error, said in ((other_weight, PromiseError, "logits differ"), (lost_weight, RequestError, "model.layers.3.mlp.up_proj.weight")):
        with monkeypatch.context() as patch:
            damaged(patch, damage)
            with pytest.raises(error, match=said):
                llmprune.prune(model, output=str(tmp_path / damage.__name__), **QUICK)
        assert not (tmp_path / damage.__name__).exists()


def test_a_live_model_has_nothing_to_load_again() -> None:
    report = llmprune.prune(tiny("llama"), pattern="2:4", method="magnitude", calibration=tiny_windows(4, 16))
    assert report.reloaded is None


def test_where_arithmetic_rounds_a_few_tokens_may_be_routed_otherwise() -> None:
    wanted = torch.randn(1, 64, 50)
    other = wanted.clone()
    other[0, :3] += 2
    there, here = torch.device("cuda"), torch.device("cpu")  # where the pruned model ran; the result is loaded here
    assert compared(wanted, other, torch.bfloat16, there) == 0
    for got, dtype, device in ((other, torch.float32, there), (other, torch.bfloat16, here), (wanted + 2, torch.bfloat16, there)):
        with pytest.raises(PromiseError, match="differ"):
            compared(wanted, got, dtype, device)
    assert compared(wanted / 0, other, torch.float32, here) is None


def test_a_padding_row_is_what_transformers_makes_of_it(tmp_path) -> None:
    """Youtu's class writes zeros over it after loading; tokens of that number then have no embedding, whatever the checkpoint stores."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    parts = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["youtu"](**sizes, **parts, pad_token_id=3))
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "model")
    ids_NL = torch.arange(96).remainder(16).view(4, 24)  # 3 among them
    report = llmprune.prune(tmp_path / "model", pattern="2:4", method="magnitude", calibration=ids_NL, output=str(tmp_path / "out"))
    assert report.reloaded.difference == 0
    before, after = (load_file(tmp_path / folder / "model.safetensors")["model.embed_tokens.weight"] for folder in ("model", "out"))
    assert torch.equal(before, after)
    assert before[3].all()
