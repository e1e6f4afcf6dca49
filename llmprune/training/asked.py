"""What a training that masks weights can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmprune.errors import RequestError
from llmprune.methods import check_name, trait
from llmprune.recipe.named import build_pattern
from llmprune.training.schedules import Schedule

METHODS = ("gradual", "movement", "rigl", "soft", "constant")
EVERY, REGROW = 100, 0.3  # of the papers


@dataclass(frozen=True)
class Asked:
    """What a training was asked for. sparsity: share of each matrix; None: of N:M its own, or the model's zeros as they are. start, end, every:
    see ``Schedule``. skip, only: see ``Selection``. regrow: share of the kept weights that ``rigl`` exchanges at first.

    Raises RequestError for what contradicts itself.
    """

    method: str = "gradual"
    sparsity: float | None = None
    pattern: str = "unstructured"
    start: int | None = None
    end: int | None = None
    every: int | None = None
    skip: str | None = None
    only: str | None = None
    regrow: float | None = None

    def __post_init__(self) -> None:
        check_name("training method", self.method, list(METHODS))
        fixed = trait(self.built, "fixes_ratio")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise RequestError(f"sparsity {self.sparsity}", "give a share of the weights between 0 and 1, such as 0.5")
        if self.sparsity is not None and fixed and self.sparsity != self.built.sparsity:
            raise RequestError(f"pattern {self.pattern} at sparsity {self.sparsity}", f"{self.pattern} is {self.built.sparsity:.4g}; omit sparsity")
        if self.goal is None and self.grows:
            raise RequestError(f"{self.method} without a sparsity", "give the share of the weights to mask, such as sparsity=0.5, or pattern='2:4'")
        if self.method == "constant" and (self.start, self.end, self.every) != (None, None, None):
            raise RequestError("start, end or every with method constant, whose masks do not change", "omit them")
        if self.method == "soft" and self.every is not None:
            raise RequestError("every with method soft, whose masks change at every step", "omit it")
        if self.method in ("rigl", "soft") and not (trait(self.built, "n_of_m") or self.pattern == "unstructured"):
            raise RequestError(f"{self.method} with pattern {self.pattern}", "it decides on single weights: unstructured or N:M")
        if self.regrow is not None and (self.method != "rigl" or not 0 < self.regrow <= 1):
            raise RequestError(f"regrow {self.regrow} with method {self.method}", "it is rigl's, a share of the kept weights in (0, 1]")

    @property
    def grows(self) -> bool:
        """Whether more and more is masked."""
        return self.method in ("gradual", "movement", "soft")

    @property
    def exchanged(self) -> float:
        """Share of the kept weights that are exchanged at first."""
        return REGROW if self.regrow is None else self.regrow

    @property
    def built(self) -> Any:
        """The pattern."""
        return build_pattern(self.pattern)

    @property
    def goal(self) -> float | None:
        """The sparsity at the end; None: the model's."""
        return self.built.sparsity if trait(self.built, "fixes_ratio") else self.sparsity

    def schedule(self, steps: int | None) -> Schedule | None:
        """steps: of the whole training; masks change during its first half unless ``end`` is given. None for masks that do not change.

        Raises RequestError where ``end`` is unknown, or after the training.
        """
        if self.method == "constant":
            return None
        if self.end is None and steps is None:
            raise RequestError(f"{self.method} without an end", "give the number of optimizer steps after which masks no longer change")
        if self.end is not None and steps is not None and self.end > steps:
            raise RequestError(f"masks change until step {self.end}, but the training has {steps} steps", "train longer, or give a smaller end")
        start, end = self.start or 0, self.end if self.end is not None else (steps or 0) // 2
        usual = 1 if self.method == "soft" else min(EVERY, max(1, (end - start) // 10))
        return Schedule(start, end, usual if self.every is None else self.every)
