"""What a recovery trains towards: the next token, the dense model's predictions, or the dense model's hidden states.

    ce      -log p(next token)
    kd      T^2 KL(dense / T || pruned / T), mixed with ce               Hinton et al., https://arxiv.org/abs/1503.02531
    blocks  |h - h'|^2 / |h|^2 of each block's output, mixed with ce     the loss of a reconstruction, over the whole model at once

All are sums over the tokens that are learned, divided by their number in the step, so that accumulation changes nothing.

Shapes: N = windows, L = tokens of a window, V = vocabulary, T = tokens that are learned, D = hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmprune.evaluation.divergence import kl

LOSSES = ("kd", "ce", "blocks")
NOT_LEARNED = -100  # a label, as transformers has it


@dataclass(frozen=True)
class Objective:
    """mix: the dense model's share of the loss, the rest is ce. dense: in evaluation mode, on the same device; None for ce."""

    loss: str
    dense: nn.Module | None = None
    temperature: float = 1.0
    mix: float = 1.0

    def __call__(self, model: nn.Module, ids_NL: Tensor, labels_NL: Tensor, learned: Tensor | int | None = None) -> Tensor:
        """The loss of one micro-batch. learned: the tokens that are learned in the whole step; None: those of this micro-batch."""
        learn_NL = labels_NL[:, 1:] != NOT_LEARNED
        share = 0.0 if self.dense is None else self.mix
        ours = self._run(model, ids_NL)
        ours_TV, parts = ours.logits[:, :-1][learn_NL], []
        if share < 1:
            parts.append((1 - share) * F.cross_entropy(ours_TV.float(), labels_NL[:, 1:][learn_NL], reduction="sum"))
        if share > 0 and self.dense is not None:
            with torch.no_grad():
                theirs = self._run(self.dense, ids_NL)
            parts.append(share * self._apart(ours, ours_TV, theirs, learn_NL))
        return torch.stack(parts).sum() / (learn_NL.sum() if learned is None else learned)

    def _run(self, model: nn.Module, ids_NL: Tensor) -> Any:
        return model(input_ids=ids_NL, use_cache=False, output_hidden_states=self.loss == "blocks")

    def _apart(self, ours: Any, ours_TV: Tensor, theirs: Any, learn_NL: Tensor) -> Tensor:
        """Summed over the tokens that are learned."""
        if self.loss == "blocks":
            return relative_error(ours.hidden_states[1:], theirs.hidden_states[1:]) * learn_NL.sum()
        return distilled(theirs.logits[:, :-1][learn_NL], ours_TV, self.temperature).sum()


def distilled(dense_TV: Tensor, pruned_TV: Tensor, temperature: float) -> Tensor:
    """[T]: T^2 KL(dense / T || pruned / T), whose gradients keep their size at any temperature."""
    return temperature**2 * kl(dense_TV / temperature, pruned_TV / temperature)


def relative_error(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Tensor:
    """Mean over blocks of |h - h'|^2 / |h|^2. Both: hidden states [N, L, D] after each block, as transformers returns them."""
    pairs = zip(ours, theirs, strict=True)
    return torch.stack([(a.float() - b.float()).square().sum() / b.float().square().sum() for a, b in pairs]).mean()
