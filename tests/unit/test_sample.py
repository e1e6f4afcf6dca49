"""The sample's prompt: as transformers itself would give it to the model."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from llmprune.checkpoint.resolve import BUNDLED
from llmprune.evaluation.sample import A_DATE, PROMPT, ids_of

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
