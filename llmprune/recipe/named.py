"""What the names in a recipe mean: methods, qualities, patterns."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Literal

from llmprune.errors import RequestError
from llmprune.methods import find, names, offered, own_names, spellings, trait
from llmprune.pruners.coarse import COARSE

Group = Literal["row", "matrix"]


@dataclass(frozen=True)
class Method:
    """The meaning of a name: criterion, solver, the group in which unstructured weights compete, and the solver's target."""

    criterion: str | None
    solver: str  # one for matrices; "+reconstruct" trains the block after it
    group: Group
    asymmetric: bool = False  # aims at the dense path's outputs (llmprune.maths.asymmetric_target)
    allocation: str = "uniform"  # of unstructured sparsity
    polish_steps: int = 0  # of whole-model distillation at the end
    mean_bias: bool = False  # biases compensate for the means of dropped inputs


POLISH_STEPS = 200

# The papers' own recipes, unimproved, for comparison.
METHODS = {
    "magnitude": Method("magnitude", "mask_only", "matrix"),
    "wanda": Method("wanda", "mask_only", "row"),
    "ria": Method("ria", "mask_only", "row"),
    "sparsegpt": Method(None, "sparsegpt", "matrix"),
    "alps": Method(None, "admm", "matrix"),
}

# Ours.
QUALITIES = {
    "fast": Method(None, "coupled_refit", "matrix", asymmetric=True, allocation="fisher"),
    "balanced": Method(None, "kfac", "matrix", asymmetric=True, allocation="fisher"),
    "max": Method(None, "kfac+reconstruct", "matrix", asymmetric=True, allocation="fisher", polish_steps=POLISH_STEPS),
}

# Patterns that make the model smaller.
STRUCTURED_PATTERNS = {
    "channels": "FFN channels; sparsity is the share of the FFN",
    "heads": "query heads, equally many of every KV group; of the query and output projections",
    "kv-groups": "KV groups with their query heads; of attention",
    "kernel": "short convolutions with their inner channels (Mamba) or key heads (Qwen3-Next); of the mixer",
    **{name: f"{row.help}; of {row.budget}" for name, row in COARSE.items()},
    "structured": "channels and KV groups (or heads) under one budget of parameters; of attention and FFN",
}

STRUCTURED = tuple(STRUCTURED_PATTERNS)


# The qualities for these; scores are summed over the columns of the matrix that reads a unit.
STRUCTURED_QUALITIES = {
    "fast": Method("wanda", "refit", "matrix", asymmetric=True, allocation="auto"),
    "balanced": Method(None, "block_obs", "matrix", asymmetric=True, allocation="auto"),
    "max": Method(None, "block_obs+reconstruct", "matrix", asymmetric=True, allocation="auto", polish_steps=POLISH_STEPS),
}

STRUCTURED_METHODS = {
    "magnitude": Method("magnitude", "mask_only", "matrix"),
    "flap": Method("fluctuation", "mask_only", "matrix", mean_bias=True),
    "taylor": Method("taylor", "mask_only", "matrix"),
    "wanda": Method("wanda", "mask_only", "matrix"),
}

DEFAULT_QUALITY = "balanced"


def split_solver(text: str) -> tuple[str, str | None]:
    """(the solver for matrices, the one for each block after it) of "admm", "admm+reconstruct" or "reconstruct", which is both.

    Raises RequestError for anything else.
    """
    first, plus, last = text.partition("+")
    over_blocks = trait(find("solvers", first), "fits_blocks")
    if not plus:
        return first, first if over_blocks else None
    check_after(text, find("solvers", first), last)
    return first, last


def check_after(text: str, first: type[Any], last: str) -> None:
    """Raises RequestError unless the solver called ``last`` goes over blocks, and can do so after the class ``first``."""
    if trait(first, "fits_blocks") or last not in names("solvers") or not trait(find("solvers", last), "fits_blocks"):
        raise RequestError(f"solver {text!r}", f"only a solver for blocks can follow another: {', '.join(block_solvers())}")


def block_solvers() -> list[str]:
    """Our solvers that can follow another, as in admm+reconstruct. Those of other packages would have to be loaded to know."""
    return [name for name in own_names("solvers") if trait(find("solvers", name), "fits_blocks")]


def names_tried(allocation: str) -> bool:
    """Whether this is the name of an allocation that prunes the whole model on trial."""
    return bool(trait(find("allocation", allocation), "tried"))


def find_pattern(text: str) -> type[Any]:
    """The class of the pattern that ``text`` spells. Raises RequestError."""
    return find("patterns", pattern_name(text))


def pattern_name(text: str) -> str:
    """The name of the pattern that ``text`` spells, such as "unstructured", "2:4", "block:4x4", "row". Raises RequestError."""
    for name in names("patterns"):
        if any(re.fullmatch(as_regex(spelling), text) for spelling in spellings(name)):
            return name
    raise RequestError(f"pattern {text!r} is unknown", f"there are: {', '.join((*spelled_patterns(), *offered('patterns'), *STRUCTURED))}")


def build_pattern(text: str, group: Group = "matrix") -> Any:
    """The pattern that ``text`` spells; ``group`` where it takes one. Raises RequestError for what is none."""
    cls = find_pattern(text)
    return cls(**trait(cls, "parse")(text), **({"group": group} if takes_group(cls) else {}))


def n_of_m(text: str) -> tuple[int, int]:
    """(N, M) of a pattern that keeps N of every M neighbours. Raises RequestError for any other."""
    pattern = build_pattern(text)
    if not trait(pattern, "n_of_m"):
        raise RequestError(f"pattern {text!r} does not keep N of every M weights", "write N:M, such as 2:4")
    return pattern.n, pattern.m


def takes_group(pattern: type[Any]) -> bool:
    """Whether a pattern's weights compete in a group that a recipe may choose."""
    return "group" in (field.name for field in fields(pattern))


def in_groups(text: str) -> bool:
    """Whether a pattern fixes the sparsity, as N:M does. Raises RequestError for an unknown pattern."""
    return text not in STRUCTURED and bool(trait(find_pattern(text), "fixes_ratio"))


def as_regex(spelling: str) -> str:
    """A capital letter of a pattern's spelling stands for a number."""
    return re.sub("[A-Z]", r"\\d{1,4}", re.escape(spelling))


def spelled_patterns() -> list[str]:
    """How patterns that are not structured are spelled, with examples; the default first."""
    found = {spelling: example for name in own_names("patterns") for spelling, example in spellings(name).items()}
    ordered = sorted(found, key=lambda spelling: spelling != "unstructured")
    return [spelling if found[spelling] == spelling else f"{spelling} such as {found[spelling]}" for spelling in ordered]
