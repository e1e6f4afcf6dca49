"""What a recipe cannot ask for together with a structured pattern, and what only such a pattern has a use for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.errors import RequestError
from llmprune.methods import COARSE, EXPERT_CRITERIA, LAYER_CRITERIA, STRUCTURED, check_name

if TYPE_CHECKING:
    from llmprune.recipe import Recipe


def check_structured(recipe: Recipe) -> None:
    """Raises RequestError for what a structured pattern has no use for."""
    pattern = recipe.pattern
    if recipe.permute:
        raise RequestError(f"channels reordered for pattern {pattern}", "only N:M gains by it; leave --permute out")
    if recipe.allocation in ("explicit", "search"):
        raise RequestError(f"allocation {recipe.allocation!r} with pattern {pattern}", "take sensitivity or uniform")
    if recipe.uniform and recipe.allocation not in (None, "uniform"):
        raise RequestError(f"uniform sizes with allocation {recipe.allocation!r}", "leave one of them out")
    if pattern == "experts" and recipe.target_latency_ratio is not None:
        raise RequestError("target_latency_ratio with pattern experts: a token goes through as many as before", "take channels or layers")
    if pattern in COARSE:
        for name in ("quality", "method", "solver", "target", "polish", "max_ppl_increase", "allocation", "round_to", "pad"):
            if getattr(recipe, name):
                raise RequestError(f"{name} with pattern {pattern}, which lets whole {pattern} go", f"leave {name} out")
        if recipe.criterion is not None:
            check_name("criterion", recipe.criterion, list(LAYER_CRITERIA if pattern == "layers" else EXPERT_CRITERIA))
    elif recipe.pad and recipe.one_size:
        raise RequestError("zeros up to the widest layer where all have one size", "leave --pad out, or add --allocation sensitivity")


def refuse_structured(recipe: Recipe) -> None:
    """Raises RequestError for what only a structured pattern has a use for."""
    if recipe.target_size is not None:
        raise RequestError(
            f"target_size with pattern {recipe.pattern}: zeros take as much room as other weights", "take a structured pattern, or --target-params"
        )
    if recipe.target_latency_ratio is not None:
        raise RequestError(f"target_latency_ratio with pattern {recipe.pattern}: zeros take as long as others", "take a structured pattern")
    given = [name for name in ("round_to", "uniform", "pad") if getattr(recipe, name)]
    if given:
        raise RequestError(f"{given[0]} with pattern {recipe.pattern}", f"it is for structured patterns: {', '.join(STRUCTURED)}")
