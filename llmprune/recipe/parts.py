"""The methods that a recipe is made of, and which of its options are whose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmprune.errors import RequestError, first_line
from llmprune.methods import check_name, find, packages, trait
from llmprune.recipe.named import Method, find_pattern, pattern_name, split_solver, takes_group
from llmprune.recipe.options import Option, options_of
from llmprune.recipe.user_methods import UserClass


@dataclass(frozen=True)
class Part:
    """One method. role: how a table of options calls it, as in ``solver.damping``. said: fields that the recipe sets by keys of its own."""

    role: str
    kind: str
    name: str
    cls: type[Any]
    said: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Option]:
        return {name: option for name, option in options_of(self.cls).items() if name not in self.said}

    def make(self, given: dict[str, Any], seed: int) -> Any:
        """The method. given: its options; one named ``seed`` is the recipe's unless it is given. Raises RequestError for values that it refuses."""
        seeded = {"seed": seed} if "seed" in self.options else {}
        try:
            return self.cls(**self.said | seeded | given)
        except (TypeError, ValueError) as error:
            raise RequestError(f"{self.role} {self.name}: {first_line(error)}", f"see llmprune methods {self.name}") from None


def solvers_of(solver: str | UserClass) -> list[Part]:
    """The solver, and the one that goes over blocks after it."""
    name, after = (str(solver), solver.after) if isinstance(solver, UserClass) else split_solver(solver)
    first = Part("solver", "solvers", name, solver.cls if isinstance(solver, UserClass) else find("solvers", name))
    if not after or after == name:
        return [first]
    return [first, Part("block_solver", "solvers", after, find("solvers", after))]


def pattern_of(text: str, group: str) -> Part:
    """The pattern that ``text`` spells."""
    cls = find_pattern(text)
    return Part("pattern", "patterns", pattern_name(text), cls, trait(cls, "parse")(text) | ({"group": group} if takes_group(cls) else {}))


def parts_of(method: Method, solver: str | UserClass, pattern: str | None, ranked: bool, ratios: dict[str, Any]) -> list[Part]:
    """The methods that ``method`` names. pattern: None for a structured one. ranked: its criterion is a method, and no measure of a coarse pattern's
    or function of the user's. ratios: what the recipe says to its allocation. Raises RequestError for names that are unknown.
    """
    found = [] if pattern is None else [pattern_of(pattern, method.group)]
    if ranked and method.criterion:
        found.append(Part("criterion", "criteria", method.criterion, find("criteria", method.criterion)))
    found.append(Part("allocation", "allocation", method.allocation, find("allocation", method.allocation), ratios))
    return found + solvers_of(solver)


def assigned(options: dict[str, Any], parts: list[Part]) -> dict[str, dict[str, Any]]:
    """Role -> its options, read. An option is named alone where one part has it, as ``role.name`` anywhere.

    Raises RequestError for one that no part has, or more than one, for a value that is none, and for one that is named twice.
    """
    found: dict[str, dict[str, Any]] = {part.role: {} for part in parts}
    for key, value in options.items():
        role, _, name = key.rpartition(".")
        takers = [part for part in parts if name in part.options and role in ("", part.role)]
        if not takers:
            check_name("option", key, _known(parts))
        if len(takers) > 1:
            raise RequestError(f"option {key!r} is one of {' and '.join(p.role for p in takers)}", f"write {takers[0].role}.{name}")
        if name in found[takers[0].role]:
            raise RequestError(f"option {key!r} is given twice", "name it once")
        found[takers[0].role][name] = takers[0].options[name].read(value)
    return found


def packages_of(parts: list[Part]) -> dict[str, str]:
    """Names and versions of the other packages that methods come from."""
    return {name: version for part in parts for name, version in packages(part.kind, part.name).items()}


def _known(parts: list[Part]) -> list[str]:
    """What may be named: an option alone where one part has it, with its role otherwise."""
    every = [name for part in parts for name in part.options]
    return [name if every.count(name) == 1 else f"{part.role}.{name}" for part in parts for name in part.options]
