"""The sample: the prompt as transformers itself would give it to the model, its continuation by ``generate``, and when there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune.checkpoint.resolve import BUNDLED, open_source
from llmprune.evaluation import sample
from llmprune.evaluation.sample import A_DATE, PROMPT, Prompt, ids_of, prompt_for, written
from llmprune.recipe.reading import read_recipe
from llmprune.run.phases import has_sample, phases
from llmprune.run.prepare import prepare
from llmprune.stream.checkpoint import CheckpointStream

TEMPLATE = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("chat", [False, True])
def test_a_chat_model_gets_its_template(chat: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "llama")
    tokenizer.chat_template = TEMPLATE if chat else None
    asked = [{"role": "user", "content": PROMPT}]
    plain = tokenizer(PROMPT)["input_ids"]
    wanted = tokenizer.apply_chat_template(asked, add_generation_prompt=True, date_string=A_DATE)["input_ids"] if chat else plain
    assert list(ids_of(tokenizer, chat)) == list(wanted)


def test_a_continuation_is_that_of_generate_and_reads_the_embeddings_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("llama")
    stream = CheckpointStream(source, torch.float32, torch.device("cpu"))
    prompt = prompt_for(stream, source)
    assert isinstance(prompt, Prompt)
    read: list[torch.device] = []
    load = stream.loader.load_outer
    monkeypatch.setattr(stream.loader, "load_outer", lambda device, unused: (read.append(device), load(device, unused)))
    text = written(stream, prompt)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED / "llama")
    ids_L = model.generate(torch.tensor([prompt.ids]), max_new_tokens=sample.TOKENS, do_sample=False)[0, len(prompt.ids) :]
    assert text == prompt.tokenizer.decode(ids_L, skip_special_tokens=True)
    assert len(read) == 1
    assert all(p.is_meta for p in stream.skeleton.parameters())


@pytest.mark.parametrize(("windows", "asked", "there"), [(2, False, False), (2, True, True), (128, False, True)])
def test_there_is_a_sample_where_it_takes_a_small_part_of_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, windows: int, asked: bool, there: bool
) -> None:
    monkeypatch.setattr(sample, "TOKENS", 32)
    (tmp_path / "few.txt").write_text((BUNDLED / "evaluation.txt").read_text()[:6000])
    ask = {"model": "llama", "pattern": "2:4", "method": "wanda", "samples": windows, "output": str(tmp_path / "out"), "write_sample": asked}
    job = prepare(read_recipe(None, ask | {"eval": [str(tmp_path / "few.txt")]}))
    assert has_sample(job) == there
    names = [name for name, _ in phases(job)]
    texts = ["sample"] if there else []
    assert names == ["dense evaluation", *texts, "prune", "pruned evaluation", *texts, "write"]
