"""Recipe files for people and their editors: checked as a run reads them, started with comments, described by a JSON schema."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llmprune.errors import RequestError
from llmprune.methods import names, spellings
from llmprune.pruners.coarse import COARSE
from llmprune.recipe.named import METHODS, QUALITIES, STRUCTURED, STRUCTURED_METHODS, as_regex, block_solvers, in_groups
from llmprune.recipe.reading import keys, read_recipe
from llmprune.recipe.recipe import BUDGETS, Recipe
from llmprune.recipe.user_methods import refuse_code
from llmprune.recipe.values import spelt

HEAD = """\
# Run it: llmprune --recipe FILE; flags override it. Check it: llmprune recipe check FILE
# For editors that know JSON schemas: llmprune recipe schema > recipe.schema.json, and this as the first line here:
# #:schema ./recipe.schema.json
"""
UNSET = "..."  # where a default depends on the model, the pattern or the quality


def problem(path: Path) -> str | None:
    """Why a run would refuse a recipe before it has seen the model; None if it would not."""
    try:
        read_recipe(path, {})
    except RequestError as error:
        return f"{error.message} (hint: {error.hint})"
    return None


def draft(given: dict[str, Any]) -> str:
    """A recipe of the given values (by default half of the weights of the bundled model), and every other key as a comment.

    Raises RequestError as a run of it would.
    """
    refuse_code("a recipe", given)
    values = {"model": "llama"} | given
    pattern = values.get("pattern", "unstructured")
    if not values.keys() & set(BUDGETS) and not in_groups(pattern):
        values["sparsity"] = 0.25 if pattern in STRUCTURED else 0.5
    chosen = read_recipe(None, values).model_dump(exclude_unset=True)
    said = [_line(key, spelt(chosen[key])) for key in keys() if key in chosen]
    others = [f"# {_line(key, _default(key))}" for key in keys() if key not in chosen]
    return "\n".join((HEAD, *said, "\n# Other keys:", *others)) + "\n"


def _line(key: str, value: str) -> str:
    return f"{key} = {value}  # {Recipe.model_fields[key].description}"


def _default(key: str) -> str:
    value = Recipe.model_fields[key].get_default(call_default_factory=True)
    return UNSET if value is None else spelt(value)


def write_draft(path: Path, given: dict[str, Any]) -> None:
    """``draft`` as a file. Raises RequestError where it exists already, or cannot be written."""
    text = draft(given)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RequestError(f"recipe {path.name}: exists already", "choose another name") from None
    except OSError as error:
        raise RequestError(f"recipe {path.name}: cannot be written ({error.strerror})", "check the path") from None


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, from the fields of ``Recipe`` and the methods."""
    raw = Recipe.model_json_schema()
    properties = {key: _property(raw["properties"][key]) for key in keys()}
    for key, known in _choices().items():
        properties[key]["enum"] = known
    forms = {spelling: as_regex(spelling) for name in names("patterns") for spelling in spellings(name)}
    words = [spelling for spelling, regex in forms.items() if regex == re.escape(spelling)]
    numbered = [regex for spelling, regex in forms.items() if spelling not in words]
    properties["pattern"]["anyOf"] = [{"enum": [*words, *STRUCTURED]}, {"pattern": f"^({'|'.join(numbered)})$"}]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Recipe of llmprune",
        "description": "The options of a pruning run; flags of the command line override them.",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _property(raw: dict[str, Any]) -> dict[str, Any]:
    """A field as an editor needs it: TOML has no null, and the key serves as the title."""
    kept = {key: value for key, value in raw.items() if key != "title" and not (key == "default" and value is None)}
    kinds = [kind for kind in kept.pop("anyOf", []) if kind != {"type": "null"}]
    return kept | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {})


def _choices() -> dict[str, list[str]]:
    solvers, after = names("solvers"), block_solvers()
    return {
        "quality": list(QUALITIES),
        "method": sorted(METHODS | STRUCTURED_METHODS),
        "criterion": [*names("criteria"), *(criterion for row in COARSE.values() if not row.scores for criterion in row.criteria)],
        "solver": [*solvers, *(f"{solver}+{last}" for last in after for solver in solvers if solver not in after)],
        "allocation": names("allocation"),
    }
