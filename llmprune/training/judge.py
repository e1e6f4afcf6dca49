"""The judge of a recovery: perplexity of the whole model, as it would be saved, on texts that it is not trained on.

A candidate is better if no text got worse than it was at the start, and their mean loss is the lowest so far; so the start itself remains one.

Shapes: N = windows, L = tokens of a window, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llmprune.evaluation.perplexity import defined, name_of, surprise
from llmprune.results import Perplexity
from llmprune.training.data import Packs

TOKENS_AT_ONCE = 2048


@torch.no_grad()
def perplexity_on(model: nn.Module, packs: Packs, heard: Callable[[int, int], None] = lambda done, total: None) -> Perplexity:
    """By the definition of ``llmprune.evaluation.perplexity``; of dialogues, over the tokens to learn alone. The model is left as it was.

    heard: called with (windows done, windows).
    """
    training, device = model.training, next(model.parameters()).device
    total, dtype = torch.zeros((), dtype=torch.float64), ""
    each, done = max(1, TOKENS_AT_ONCE // packs.windows.ids_NL.shape[1]), 0
    heard(done, len(packs))
    model.eval()
    for ids_NL, labels_NL in zip(packs.windows.ids_NL.split(each), packs.labels_NL.split(each), strict=True):
        logits_NLV = model(input_ids=ids_NL.to(device), use_cache=False).logits
        dtype = name_of(logits_NLV)
        for logits_LV, labels_L in zip(logits_NLV, labels_NL.to(device), strict=True):
            total += surprise(logits_LV, labels_L[1:])
        done += len(ids_NL)
        heard(done, len(packs))
    model.train(training)
    return defined(total, packs.learned, packs.windows, dtype)


@dataclass(frozen=True)
class Judge:
    """The texts that decide."""

    texts: tuple[Packs, ...]

    def losses(self, model: nn.Module) -> list[float]:
        """Mean negative log-likelihood on each text; infinite where the model has broken down."""
        found = [math.log(perplexity_on(model, text).value) for text in self.texts]
        return [loss if math.isfinite(loss) else math.inf for loss in found]


def score(losses: Sequence[float], start: Sequence[float]) -> float:
    """What is compared: the mean loss; infinite where a text got worse than at the start."""
    return math.inf if any(now > then for now, then in zip(losses, start, strict=True)) else sum(losses) / len(losses)


def best_of(start: Sequence[float], history: Sequence[Sequence[float]]) -> int:
    """The number of the best candidate in ``history``; -1 for the start, which wins ties."""
    scores = [sum(start) / len(start), *(score(losses, start) for losses in history)]
    return scores.index(min(scores)) - 1
