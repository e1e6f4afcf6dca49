"""Evolution from the best of some ratios: every matrix is pruned at a few steps around them, all steps of equal weight counts; offspring raise the
ratios of some matrices and lower as many, so the budget stays exact; the fittest in divergence from the dense model survives.
Offspring are judged on few windows, the best of them on more. The result is taken only if the model actually pruned by it diverges less on unseen
windows.

Sieberling et al., EvoPress, https://arxiv.org/abs/2410.14649; there every matrix is pruned on the dense model's inputs, here on those of the model
that is pruned by the start.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

Steps = dict[str, int]


@dataclass(frozen=True)
class Search:
    starts: tuple[str, ...] = ("uniform", "fisher", "sensitivity")
    generations: Annotated[int, Field(ge=1, description="of the evolution")] = 24
    offspring: Annotated[int, Field(ge=1, description="of each generation")] = 16
    most_switches: Annotated[int, Field(ge=1, description="pairs of matrices that an offspring moves weights between, at most")] = 3
    rounds: tuple[tuple[int, int], ...] = ((2, 4), (8, 1))  # windows, and how many offspring survive on them
    windows: Annotated[int, Field(ge=1, description="on which the last of the offspring meets its parent")] = 24
    seed: int = 0
    tried: ClassVar[bool] = True
    evolves: ClassVar[bool] = True

    def improve(self, room: dict[str, tuple[int, int]], fitness: Callable[[list[Steps], int], list[float]]) -> Steps | None:
        draw = random.Random(self.seed)
        if len(room) < 2:
            return None
        parent: Steps = dict.fromkeys(room, 0)
        (parent_fitness,) = fitness([parent], self.windows)
        for _ in range(self.generations):
            offspring = [child for child in (self._child(parent, room, draw) for _ in range(self.offspring)) if child != parent]
            for windows, survivors in self.rounds:
                judged = fitness(offspring, windows)
                offspring = [offspring[i] for i in sorted(range(len(offspring)), key=judged.__getitem__)[:survivors]]
            for child, child_fitness in zip(offspring, fitness(offspring, self.windows), strict=True):
                if child_fitness < parent_fitness:
                    parent, parent_fitness = child, child_fitness
        return parent if any(parent.values()) else None

    def _child(self, parent: Steps, room: dict[str, tuple[int, int]], draw: random.Random) -> Steps:
        child = dict(parent)
        for _ in range(min(draw.randint(1, self.most_switches), draw.randint(1, self.most_switches))):
            ups = [name for name, (_, high) in room.items() if child[name] < high]
            downs = [name for name, (low, _) in room.items() if child[name] > low]
            up, down = (draw.choice(names) if names else "" for names in (ups, downs))
            if up != down and up and down:
                child[up] += 1
                child[down] -= 1
        return child
