"""Dialogues as token windows: written out by the tokenizer's own chat template and packed; the tokens of the assistant's turns, with what ends them,
are the ones that a recovery learns.

Shapes: N = windows, L = tokens of a window.
"""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import Tensor

from llmprune.data.documents import Dialogue, Form, dialogues
from llmprune.data.rows import BUFFER
from llmprune.data.sources import TextSource
from llmprune.data.tokenizer import UNRENDERED
from llmprune.data.windows import Documents, Windows, bos_of, filled, places
from llmprune.errors import RequestError, mistake

LEARNED = "assistant"


def chat_windows(
    source: TextSource,
    form: Form,
    tokenizer: Any,
    length: int,
    wanted: int | None = None,
    *,
    draw: int | None = None,
    bos: bool = False,
    learns: bool = False,
) -> tuple[Windows, Tensor | None]:
    """(windows, bool [N, L]: the tokens to learn); as many as there are, or ``wanted``. Dialogues follow each other, and an incomplete last window is
    dropped. draw: a seed by which rows are shuffled in a buffer. learns: whether there is something to learn, in each dialogue.

    Raises RequestError for a tokenizer without a chat template, a row that the template does not take, or less than one window.
    """
    if not tokenizer.chat_template:
        raise RequestError(
            f"{source.dataset}: holds dialogues ({form}), and the tokenizer has no chat template",
            "give plain text, name a column of text by --column, or add a chat template to the tokenizer",
        )
    ids, learn, ends, skipped = array("q"), bytearray(), [0], 0
    for name, dialogue in dialogues(source, form, draw):
        if dialogue is None:
            skipped += 1
            continue
        more, kept = tokens_of(dialogue, tokenizer, name) if learns else (ids_of(dialogue, tokenizer, name), [])
        ids.extend(more)
        learn.extend(kept)
        ends.append(len(ids))
        if wanted is not None and len(ids) >= wanted * length:
            break
    first = bos_of(tokenizer) if bos else None
    places_NL = places(ids, length, first)
    if not len(places_NL):
        raise RequestError(
            f"{source.dataset}: {len(ids)} tokens in {len(ends) - 1} dialogues, less than one window of {length}",
            "give more, or a smaller --sequence-length",
        )
    said = "" if draw is None else f"rows shuffled in a buffer of {BUFFER:,}, seed {draw}"
    packed = _packed(form, places_NL, torch.tensor(ends))
    windows = Windows(filled(ids, places_NL, first), source.dataset, source.split, said, bos=bos, skipped=skipped, documents=packed)
    return windows, (torch.tensor(learn, dtype=torch.bool)[places_NL] & (places_NL >= 0)) if learns else None


def _packed(form: Form, places_NL: Tensor, ends: Tensor) -> Documents:
    """Where dialogues begin and end; ends: the number of tokens before each one, and of all."""
    after_N = places_NL[:, -1] + 1
    begins, ends = ends[:-1], ends[1:]
    inside = begins < after_N[-1]
    window = torch.searchsorted(after_N, begins[inside], right=True)
    begun_N = torch.bincount(window, minlength=len(after_N))
    cut_N = torch.bincount(window[ends[inside] > after_N[window]], minlength=len(after_N))
    return Documents(str(form), tuple(begun_N.tolist()), tuple(cut_N.tolist()))


def ids_of(dialogue: Dialogue, tokenizer: Any, name: str) -> list[int]:
    """The token ids of one dialogue. The template writes what begins and ends it, so that the tokenizer adds nothing."""
    found: list[int] = tokenizer(rendered(dialogue, tokenizer, name), add_special_tokens=False, verbose=False)["input_ids"]
    return found


def tokens_of(messages: Dialogue, tokenizer: Any, name: str) -> tuple[list[int], list[bool]]:
    """(token ids, which of them to learn) of one dialogue. A token is learned if it begins inside of an assistant's turn."""
    if all(message["role"] != LEARNED for message in messages):
        raise RequestError(f"{name}: no turn of the {LEARNED}, so there is nothing to learn", "leave such rows out")
    text, spans = written(messages, tokenizer, name)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learn = [any(a <= begin < b for a, b in spans) and end > begin for begin, end in encoded["offset_mapping"]]
    return encoded["input_ids"], learn


def written(messages: Dialogue, tokenizer: Any, name: str) -> tuple[str, list[tuple[int, int]]]:
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


def rendered(messages: Dialogue, tokenizer: Any, name: str, prompt: bool = False, **more: str) -> str:
    """more: what the template may read beside the messages. Raises RequestError for messages that it does not take."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **more)
    except UNRENDERED as error:
        raise RequestError(f"{name}: the chat template does not take it ({mistake(error)})", "leave such rows out") from None
