"""Speed of one live model, measured the way a user waits for it. Nothing is printed here.

A lap: a prompt of random token ids enters with an empty cache (logits of its last position only, where the forward can omit the others);
the likeliest token is the first one; ``new_tokens`` more are decoded greedily, one forward each, with the cache.

N = batch, L = tokens of the prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from llmprune.errors import RequestError

CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # transformers' names for it, the newest first
HOLDERS = (Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin)

T = TypeVar("T")


@dataclass(frozen=True)
class Workload:
    """What every lap does: sequences side by side, tokens of their prompt, tokens decoded after the first one."""

    prompt_length: int
    new_tokens: int
    batch: int = 1


@dataclass(frozen=True)
class Lap:
    """One lap: seconds of the prompt's forward, seconds until the first token is known, seconds of all decoded tokens; bytes of the
    cache right after the prompt.
    """

    prefill: float
    first_token: float
    decode: float
    kv_cache_bytes: int


@dataclass(frozen=True)
class Spread:
    """Median and range of a figure over the laps."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


class Runner:
    """A model and its workload, ready to run laps. ``compiled`` runs it through torch.compile with a cache of fixed size.

    Raises RequestError when the model's forward takes no cache, so that there is no decoding to measure.
    """

    def __init__(self, model: Any, workload: Workload, compiled: bool = False, seed: int = 0) -> None:
        takes = inspect.signature(model.forward).parameters
        name = next((n for n in CACHE_NAMES if n in takes), None)
        if name is None:
            raise RequestError(f"{type(model).__name__}: takes no key-value cache, so decoding cannot be measured", "give another causal LM")
        self._cache_name = name
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._workload, self._device = workload, model.device
        vocabulary = model.get_input_embeddings().num_embeddings
        draw = torch.Generator().manual_seed(seed)
        self._ids_NL = torch.randint(vocabulary, (workload.batch, workload.prompt_length), generator=draw).to(self._device)
        self._forward = torch.compile(model, dynamic=False) if compiled else model
        self._fixed = StaticCache(config=model.config, max_cache_len=workload.prompt_length + workload.new_tokens) if compiled else None

    @torch.no_grad()
    def lap(self) -> Lap:
        """Run once from an empty cache."""
        given: dict[str, Any] = {}
        if self._fixed is not None:
            self._fixed.reset()
            given[self._cache_name] = self._fixed
        wait(self._device)
        began = perf_counter()
        found = self._forward(input_ids=self._ids_NL, use_cache=True, **given, **self._last_only)
        wait(self._device)
        prefilled = perf_counter()
        token_N1 = found.logits[:, -1:].argmax(-1)
        wait(self._device)
        chosen = perf_counter()
        cached = cache_bytes(found[self._cache_name])
        decode = self._decode(token_N1, found[self._cache_name])
        return Lap(prefilled - began, chosen - began, decode, cached)

    def _decode(self, token_N1: Tensor, cache: Any) -> float:
        """Seconds of the workload's new tokens."""
        began = perf_counter()
        for _ in range(self._workload.new_tokens):
            found = self._forward(input_ids=token_N1, use_cache=True, **{self._cache_name: cache})
            token_N1, cache = found.logits[:, -1:].argmax(-1), found[self._cache_name]
        wait(self._device)
        return perf_counter() - began


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work; a CPU has none outstanding."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache object holds: keys, values, and the states of linear attention and state-space layers.

    Counters (tensors without a dimension) are not counted.
    """
    return sum(t.nbytes for t in {id(t): t for t in _tensors(cache)}.values() if t.dim())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, HOLDERS):
        yield from _tensors(vars(value))
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def in_turns(
    runners: Sequence[Callable[[], T]], repeat: int, warm_up: int = 1, done: Callable[[int, int], None] = lambda n, of: None
) -> list[list[T]]:
    """Run every runner once per round, A B A B ..., so that a drift of the machine's load affects all of them alike.

    Returns one list of ``repeat`` results per runner; the results of the first ``warm_up`` rounds are dropped.
    """
    kept: list[list[T]] = [[] for _ in runners]
    for turn in range(warm_up + repeat):
        for results, runner in zip(kept, runners, strict=True):
            result = runner()
            if turn >= warm_up:
                results.append(result)
        done(turn + 1, warm_up + repeat)
    return kept
