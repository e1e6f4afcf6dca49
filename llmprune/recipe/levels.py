"""The sparsities of rounds: s (1 - (1 - t / T)^3), fast at first, or s t / T.

Zhu and Gupta, To prune, or not to prune, https://arxiv.org/abs/1710.01878
"""

from __future__ import annotations

from llmprune.recipe.named import build_pattern
from llmprune.recipe.recipe import Recipe


def levels(recipe: Recipe) -> list[tuple[str, float]]:
    """(pattern, sparsity) of every round. Of N:M every group loses at least one weight more in each round."""
    rounds = recipe.rounds or 1
    done = [number / rounds for number in range(1, rounds + 1)]
    shares = done if recipe.schedule == "linear" else [1 - (1 - share) ** 3 for share in done]
    if not recipe.in_groups:
        goal = recipe.ratio or 0.0
        return [(recipe.pattern, goal * share) for share in shares[:-1]] + [(recipe.pattern, goal)]
    built = build_pattern(recipe.pattern)
    most = built.m - built.n
    dropped = [min(max(number, round(most * share)), most - rounds + number) for number, share in enumerate(shares, 1)]
    return [(f"{built.m - drop}:{built.m}", drop / built.m) for drop in dropped]
