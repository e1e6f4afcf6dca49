"""What the names of a recipe stand for: methods, qualities, patterns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from llmprune.errors import RequestError
from llmprune.methods import build, find, names, trait
from llmprune.pruners.coarse import COARSE

Group = Literal["row", "matrix"]


@dataclass(frozen=True)
class Method:
    """What a name stands for: criterion, solver, the group in which unstructured weights compete, and what the solver aims at."""

    criterion: str | None
    solver: str  # one that goes over matrices; "+reconstruct" goes over the block after it
    group: Group
    asymmetric: bool = False  # aims at the dense path's outputs (llmprune.maths.asymmetric_target)
    fisher_rows: bool = False  # weighs rows by the Fisher information of their outputs
    allocation: str = "uniform"  # of unstructured sparsity
    polish_steps: int = 0  # of whole-model distillation at the end
    mean_bias: bool = False  # biases make up for the means of what goes


POLISH_STEPS = 100

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
    "fast": Method("wanda", "refit", "row", asymmetric=True),
    "balanced": Method(None, "admm", "matrix", asymmetric=True, fisher_rows=True, allocation="fisher"),
    "max": Method(None, "admm+reconstruct", "matrix", asymmetric=True, fisher_rows=True, allocation="fisher", polish_steps=POLISH_STEPS),
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

LINES = ("row", "column")  # of one matrix, zeroed

# What the qualities are there; scores are summed over the columns of the matrix that reads a unit.
STRUCTURED_QUALITIES = {
    "fast": Method("wanda", "refit", "matrix", asymmetric=True, allocation="auto"),
    "balanced": Method(None, "block_obs", "matrix", asymmetric=True, fisher_rows=True, allocation="auto"),
    "max": Method(None, "block_obs+reconstruct", "matrix", asymmetric=True, fisher_rows=True, allocation="auto", polish_steps=POLISH_STEPS),
}

STRUCTURED_METHODS = {
    "magnitude": Method("magnitude", "mask_only", "matrix"),
    "flap": Method("fluctuation", "mask_only", "matrix", mean_bias=True),
    "taylor": Method("taylor", "mask_only", "matrix"),
    "wanda": Method("wanda", "mask_only", "matrix"),
}

DEFAULT_QUALITY = "balanced"


def split_solver(text: str) -> tuple[str, str | None]:
    """(the solver that goes over matrices, the one that goes over each block after it) of "admm", "admm+reconstruct" or "reconstruct", which is both.

    Raises RequestError for anything else.
    """
    first, plus, last = text.partition("+")
    over_blocks = trait(find("solvers", first), "fits_blocks")
    if not plus:
        return first, first if over_blocks else None
    if over_blocks or last not in names("solvers") or not trait(find("solvers", last), "fits_blocks"):
        raise RequestError(f"solver {text!r}", f"only a solver that goes over blocks can follow another: {', '.join(block_solvers())}")
    return first, last


def block_solvers() -> list[str]:
    """The solvers that can follow another, as in admm+reconstruct."""
    return [name for name in names("solvers") if trait(find("solvers", name), "fits_blocks")]


def is_tried(allocation: str) -> bool:
    """Whether an allocation prunes the whole model on trial."""
    return bool(trait(find("allocation", allocation), "tried"))


def build_pattern(text: str, group: Group) -> Any:
    """The pattern that ``text`` spells: "unstructured", N:M, block:RxC, row or column. Raises RequestError for anything else."""
    if text == "unstructured":
        return build("patterns", "unstructured", group=group)
    if text in LINES:
        return build("patterns", "vector", lines=text)
    if text.startswith("block:"):
        height, width = parse_block(text)
        return build("patterns", "block", height=height, width=width)
    n, m = parse_nm(text)
    return build("patterns", "nm", n=n, m=m)


def in_groups(text: str) -> bool:
    """Whether a pattern says by itself how much goes, as N:M does (or is none at all)."""
    return text not in ("unstructured", *LINES, *STRUCTURED) and not text.startswith("block:")


def parse_block(text: str) -> tuple[int, int]:
    """(R, C) of "block:RxC". Raises RequestError when it is none."""
    match = re.fullmatch(r"block:(\d{1,4})x(\d{1,4})", text)
    if not match or not int(match[1]) * int(match[2]) > 1:
        raise RequestError(f"pattern {text!r} is no block", "write block:RxC, such as block:4x4 (4 rows by 4 columns)")
    return int(match[1]), int(match[2])


def parse_nm(text: str) -> tuple[int, int]:
    """(N, M) of a pattern such as "2:4": N non-zeros in every M. Raises RequestError when it is none."""
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
    if not match:
        raise RequestError(
            f"pattern {text!r} is unknown",
            f"there are: unstructured, N:M such as 2:4 (2 non-zeros in every 4), block:RxC such as block:4x4, {', '.join(LINES + STRUCTURED)}",
        )
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m:
        raise RequestError(f"pattern {text!r} would keep {n} of every {m} weights", "N:M needs 0 < N < M, such as 2:4")
    return n, m
