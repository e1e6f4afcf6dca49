"""Dialogues as token windows: rows of ``messages``, written out by the tokenizer's own chat template and packed; the tokens of the assistant's turns,
with what ends them, are the ones to learn.

Shapes: N = windows, L = tokens of a window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmprune.data.sources import TextSource, rows
from llmprune.data.tokenizer import UNRENDERED
from llmprune.data.windows import Windows
from llmprune.errors import RequestError, mistake

MESSAGES = "messages"
LEARNED = "assistant"


def is_chat(source: TextSource) -> bool:
    """Whether the first row holds a list of messages. Raises RequestError when it cannot be read."""
    first = next(iter(rows(source)), {}) if source.builder != "text" else {}
    return isinstance(first.get(MESSAGES), list)


def chat_windows(source: TextSource, tokenizer: Any, length: int, wanted: int | None = None) -> tuple[Windows, Tensor]:
    """(windows, bool [N, L]: the tokens to learn); as many as there are, or ``wanted``. Dialogues follow each other, and an incomplete last window is
    dropped.

    Raises RequestError for a tokenizer without a chat template, a row that the template does not take, or less than one window.
    """
    if not tokenizer.chat_template:
        raise RequestError(f"{source.dataset}: holds dialogues, and the tokenizer has no chat template", "give plain text, or add a chat template")
    ids: list[int] = []
    learn: list[bool] = []
    for number, row in enumerate(rows(source), 1):
        name = f"{source.dataset}, row {number}"
        more_ids, more_learn = tokens_of(checked(row.get(MESSAGES), name), tokenizer, name)
        ids += more_ids
        learn += more_learn
        if wanted is not None and len(ids) >= wanted * length:
            break
    count = len(ids) // length
    if not count:
        raise RequestError(f"{source.dataset}: {len(ids)} tokens, less than one window of {length}", "give more, or a smaller --sequence-length")
    ids_NL, learn_NL = (torch.tensor(all_[: count * length]).view(count, length) for all_ in (ids, learn))
    return Windows(ids_NL, source.dataset, source.split), learn_NL


def tokens_of(messages: list[dict[str, str]], tokenizer: Any, name: str) -> tuple[list[int], list[bool]]:
    """(token ids, which of them to learn) of one dialogue. A token is learned if it begins inside of an assistant's turn."""
    text, spans = written(messages, tokenizer, name)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learn = [any(a <= begin < b for a, b in spans) and end > begin for begin, end in encoded["offset_mapping"]]
    return encoded["input_ids"], learn


def written(messages: list[dict[str, str]], tokenizer: Any, name: str) -> tuple[str, list[tuple[int, int]]]:
    """(the dialogue's text, the characters [begin, end) of each assistant's turn): what the template adds to the text before the turn with the
    prompt for it. Raises RequestError for a template that writes earlier turns otherwise once later ones follow.
    """
    text = rendered(messages, tokenizer, name)
    spans = []
    for n, message in enumerate(messages):
        if message["role"] == LEARNED:
            before = rendered(messages[:n], tokenizer, name, prompt=True) if n else ""
            through = rendered(messages[: n + 1], tokenizer, name)
            if not (text.startswith(through) and through.startswith(before)):
                raise RequestError(f"{name}: the chat template writes a turn otherwise when others follow", "split such dialogues into one turn each")
            spans.append((len(before), len(through)))
    return text, spans


def rendered(messages: list[dict[str, str]], tokenizer: Any, name: str, prompt: bool = False, **more: str) -> str:
    """more: what the template may read beside the messages. Raises RequestError for messages that it does not take."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **more)
    except UNRENDERED as error:
        raise RequestError(f"{name}: the chat template does not take it ({mistake(error)})", "leave such rows out") from None


def checked(messages: Any, name: str) -> list[dict[str, str]]:
    """Raises RequestError for anything else than messages with a role and a text, one of the assistant's among them."""
    sound = isinstance(messages, list) and all(isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content")) for m in messages)
    if not sound or not messages:
        raise RequestError(f"{name}: {MESSAGES!r} is no list of messages with role and content", "leave such rows out")
    if all(message["role"] != LEARNED for message in messages):
        raise RequestError(f"{name}: no turn of the {LEARNED}, so there is nothing to learn", "leave such rows out")
    return messages
