"""A recipe read: a TOML file with command-line flags on top, checked before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmprune.errors import RequestError
from llmprune.methods import check_name
from llmprune.recipe.named import METHODS, QUALITIES, in_groups
from llmprune.recipe.recipe import BUDGETS, NAMED, Recipe
from llmprune.recipe.refusals import check
from llmprune.recipe.user_methods import READERS, refuse_code
from llmprune.recipe.values import read_toml

WHOLE = ("quality", "method")  # each stands for a criterion, a solver and their options


def read_recipe(path: Path | None, flags: dict[str, Any]) -> Recipe:
    """A TOML recipe (or none) with flags on top. Raises RequestError for anything malformed, unknown or contradictory."""
    stored = read_toml(path) if path else {}
    _check_keys(stored)
    refuse_code(f"recipe {path.name if path else ''}", stored)
    flags = {key: READERS[key](value) if key in READERS else value for key, value in flags.items()}
    stored = _under(stored, flags)
    tables = {key: stored[key] | table for key, table in flags.items() if isinstance(table, dict) and isinstance(stored.get(key), dict)}
    values = stored | flags | tables
    if "model" not in values:
        raise RequestError("no model", "add --model llama (the small bundled one), a folder, or a Hub id")
    try:
        recipe = Recipe(**values)
    except ValidationError as error:
        raise _refusal(error) from None
    check(recipe)
    return recipe


def _under(stored: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """What still holds of a recipe under flags: each replaces what it excludes, and another method brings its own polish and options."""
    replaced = {n for flag in NAMED if flag in flags for n in NAMED if n != flag and {n, flag} != {"criterion", "solver"}}
    if flags.keys() & set(BUDGETS):  # one budget at a time
        replaced |= set(BUDGETS)
    if flags.keys() & set(NAMED) and not flags.keys() & {"polish", "polish_steps"}:
        replaced.add("polish_steps")
    if any(flags.get(name, stored.get(name)) != stored.get(name) for name in WHOLE) or replaced & stored.keys() & set(WHOLE):
        replaced.add("options")
    return {key: value for key, value in stored.items() if key not in replaced}


def keys() -> list[str]:
    """The keys of a recipe file: whatever leaves the machine is asked for by hand."""
    return [name for name in Recipe.model_fields if name != "push"]


def _check_keys(stored: dict[str, Any]) -> None:
    """Raises RequestError for unknown keys, all of them at once."""
    unknown = [key for key in stored if key not in keys()]
    if len(unknown) > 1:
        raise RequestError(f"recipe keys {', '.join(map(repr, unknown))} are unknown", f"there are: {', '.join(keys())}")
    for key in unknown:
        check_name("recipe key", key, keys())


def _refusal(error: ValidationError) -> RequestError:
    """Names all invalid values."""
    found = {".".join(map(str, e["loc"])): f"{e['input']!r}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()}
    hints = [f"{field}: {_description(field)}" for field in found]
    return RequestError("; ".join(f"{field} {said}" for field, said in found.items()), "; ".join(hints))


def recipes_of_sweep(path: Path | None, flags: dict[str, Any], methods: list[str], sparsities: list[str], patterns: list[str]) -> list[Recipe]:
    """A recipe for every method or quality, pattern and sparsity; N:M fixes the sparsity. Raises RequestError for anything unknown."""
    found = []
    for method in methods:
        check_name("method", method, [*METHODS, *QUALITIES])
        kind = {"method" if method in METHODS else "quality": method}
        for pattern in patterns:
            grouped = in_groups(pattern) and flags.get("allocation") in (None, "uniform")
            shares: list[dict[str, Any]] = [{}] if grouped else [{"sparsity": s} for s in sparsities]
            found += [read_recipe(path, flags | kind | {"pattern": pattern} | share) for share in shares]
    if not found:
        raise RequestError("a sweep of nothing", "give --methods wanda,balanced and --sparsities 0.5,0.6, or --patterns 2:4")
    return found


def _description(field: str) -> str:
    known = Recipe.model_fields.get(field.split(".")[0])
    return (known.description if known else None) or "see llmprune prune --help"
