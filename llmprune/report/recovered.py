"""What a recovery found: the record that llmprune.json has of each training after the pruning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmprune.results import Calibration, Evaluation, Perplexity


@dataclass(frozen=True)
class Measured:
    """A recovered model on one text: before, after, and the dense model where it was at hand. decides: whether the best step was chosen by it."""

    before: Perplexity
    after: Perplexity
    dense: Perplexity | None
    decides: bool

    @property
    def excess(self) -> float | None:
        """What is left of the pruning's loss: of the mean negative log-likelihood's excess over the dense model's."""
        if self.dense is None or not 0 < self.dense.value < self.before.value < math.inf:
            return None
        return math.log(self.after.value / self.dense.value) / math.log(self.before.value / self.dense.value)


@dataclass(frozen=True)
class Recovered:
    """What a training of the kept weights has done. request: as it was resolved; source: sha256 of the weight files before.

    losses: (step, training loss); held_out: (step, mean negative log-likelihood on each text that decides), from step 0 on.
    """

    request: dict[str, Any]
    source: dict[str, str]
    dense: str | None  # the dense model's name, if it was used
    data: Calibration
    learned: int  # tokens of the data that are targets
    trained: int  # numbers that were trained
    best: int  # the step that was kept; 0: the model as it was
    done: int  # steps that were done
    measured: tuple[Measured, ...]
    losses: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, tuple[float, ...]], ...]
    changed: tuple[str, ...]  # tensors that differ from before, by their names in the checkpoint
    earlier: tuple[Evaluation, ...] = ()  # what was measured of the model before
    notes: tuple[str, ...] = ()

    @property
    def figures(self) -> list[tuple[str, float | None, float, float | None]]:
        """(text, perplexity of the dense model, before, after) of each text, then of what was measured of the model before alone."""
        found = [(text_of(one.after), one.dense.value if one.dense else None, one.before.value, one.after.value) for one in self.measured]
        older = [(text_of(one.pruned), one.dense.value, one.pruned.value, None) for one in self.earlier]
        return [*found, *older]

    @property
    def said(self) -> str:
        """In a line."""
        asked = self.request
        towards = f"towards {self.dense}'s predictions" if asked["loss"] == "kd" else f"by loss {asked['loss']}"
        kept = f"step {self.best} of {self.done} kept" if self.best else f"no step of {self.done} was better than the start, which is kept"
        return f"{asked['parameters']} parameters trained {towards} on {self.learned:,} tokens of {self.data.dataset}: {kept}"


def text_of(one: Perplexity) -> str:
    return f"{one.dataset}, {one.split}"
