"""A model's greedy continuation of a prompt that is the same for every model: to be read beside another's, not to be measured. A chat model answers
the prompt, through its chat template.

This needs the whole model in memory, which pruning does not, so it is skipped for large models.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from llmprune.checkpoint.companions import tokenizer_files
from llmprune.checkpoint.source import Source
from llmprune.data.chat import rendered
from llmprune.data.tokenizer import load_tokenizer
from llmprune.errors import RequestError
from llmprune.model.kinds import longest_sequence
from llmprune.model.skeleton import count_parameters
from llmprune.results import NoSample, Sample
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.flow import Flow
from llmprune.stream.stream import Stream
from llmprune.stream.whole import WholeStream
from llmprune.types import SILENT, Listener

PROMPT = "The first thing to know about a river is"  # from no data set: the report may be published
TOKENS = 32
A_DATE = "26 Jul 2024"  # for templates that write today's date if none is given
TOO_LONG = "it would have taken more than a twentieth of the run; --write-sample asks for one"
MOST_BYTES = 600_000_000  # of weights; a fixed bound, so that a resumed run decides equally


@dataclass(frozen=True)
class Prompt:
    """The prompt in a model's tokens."""

    tokenizer: Any
    ids: tuple[int, ...]
    chat: bool


def prompt_for(stream: CheckpointStream | WholeStream, source: Source, chat: bool = True) -> Prompt | str:
    """The prompt, or the reason why there will be no sample. chat: through the chat template, where there is one."""
    size = count_parameters(stream.skeleton) * stream.dtype.itemsize
    if stream.resumable and size > MOST_BYTES:
        return f"the model takes {size / 1e9:,.1f} GB at once, and samples are written up to {MOST_BYTES / 1e9:.1f} GB"
    if not tokenizer_files(source.folder):
        return "the checkpoint has no tokenizer"
    try:
        tokenizer = load_tokenizer(source.folder)
    except RequestError:
        return "transformers cannot load the tokenizer"
    template = str(tokenizer.chat_template or "") if chat else ""
    if "strftime_now" in template and "date_string" not in template:
        return "the chat template writes today's date, so equal runs would differ"
    try:
        ids = ids_of(tokenizer, bool(template))
    except RequestError:
        return "the chat template does not take a user's message alone"
    config = stream.skeleton.config.get_text_config(decoder=True)
    positions = longest_sequence(config)
    if not ids or (positions and len(ids) + TOKENS > positions) or max(ids) >= config.vocab_size:
        return "the prompt does not fit the model"
    return Prompt(tokenizer, ids, bool(template))


def ids_of(tokenizer: Any, chat: bool) -> tuple[int, ...]:
    """The prompt as the model is used to it. Raises RequestError for a chat template that does not take it."""
    if not chat:
        return tuple(tokenizer(PROMPT)["input_ids"])
    text = rendered([{"role": "user", "content": PROMPT}], tokenizer, "the sample", prompt=True, date_string=A_DATE)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def written(stream: Stream, prompt: Prompt | str, listen: Listener = SILENT) -> str:
    """The continuation by the model as the stream holds it now; empty without a prompt. One forward per token, without a cache, which every
    model supports.
    """
    if isinstance(prompt, str):
        return ""
    ids_1L = torch.tensor([prompt.ids])
    listen.progress("sample", 0, TOKENS)
    with stream.outer(), ExitStack() as places:
        blocks = [places.enter_context(stream.block(index)) for index in range(len(stream.names))]
        for number in range(TOKENS):
            flow = Flow(stream, ids_1L)
            for index, block in enumerate(blocks):
                flow.through(index, block)
            ((_, logits_1LV),) = flow.logits()
            ids_1L = torch.cat([ids_1L, logits_1LV[:, -1:].argmax(-1).cpu()], 1)
            listen.progress("sample", number + 1, TOKENS)
    return prompt.tokenizer.decode(ids_1L[0, len(prompt.ids) :].tolist(), skip_special_tokens=True)


def beside(prompt: Prompt | str, dense: str, pruned: str) -> Sample | NoSample:
    """Both texts, or the reason why there are none."""
    return NoSample(prompt) if isinstance(prompt, str) else Sample(PROMPT, TOKENS, dense, pruned, prompt.chat)
