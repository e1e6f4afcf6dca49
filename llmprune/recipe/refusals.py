"""What a recipe cannot combine: budgets, N:M, methods and their parts, allocations, structured patterns."""

from __future__ import annotations

from llmprune.errors import RequestError
from llmprune.methods import check_name, find, names, own_names, trait
from llmprune.pruners.coarse import COARSE, Coarse
from llmprune.recipe.named import (
    METHODS,
    QUALITIES,
    STRUCTURED,
    STRUCTURED_METHODS,
    build_pattern,
    find_pattern,
    names_tried,
)
from llmprune.recipe.parts import Part
from llmprune.recipe.recipe import BUDGETS, Recipe
from llmprune.recipe.user_methods import UserClass, try_solver


def check(recipe: Recipe) -> None:
    """Raises RequestError for fields that contradict each other."""
    if recipe.structured:
        check_budget(recipe, "add --sparsity 0.25: the dropped share of the pattern's own parameters")
        refuse_group(recipe)
        check_structured(recipe)
    else:
        refuse_structured(recipe)
        check_zeros(recipe)
    check_names(recipe)
    check_rounds(recipe)
    if recipe.pattern not in COARSE:
        check_allocation(recipe)
        check_parts(recipe)
    check_exact(recipe)
    if recipe.options:
        recipe.made()


def check_zeros(recipe: Recipe) -> None:
    """Raises RequestError for a budget, a group or an order that a pattern of zeros contradicts."""
    build_pattern(recipe.pattern)
    if not recipe.takes_group:
        refuse_group(recipe)
    if recipe.in_groups:
        check_groups(recipe)
    else:
        check_budget(recipe, "add --sparsity 0.5, or --pattern 2:4")
    if recipe.permute and not trait(find_pattern(recipe.pattern), "n_of_m"):
        raise RequestError(f"channels reordered for pattern {recipe.pattern}", "only N:M gains from it; omit --permute")


def refuse_group(recipe: Recipe) -> None:
    """Raises RequestError for a group where anything but single weights competes."""
    if recipe.group is not None:
        raise RequestError(f"group {recipe.group!r} with pattern {recipe.pattern}", "groups are for unstructured; omit --group")


def check_budget(recipe: Recipe, hint: str) -> None:
    """Raises RequestError unless just one budget is given."""
    given = budgets(recipe)
    if not given:
        raise RequestError("no sparsity", hint)
    if len(given) > 1:
        raise RequestError(f"{given[0]} together with {given[1]}", "give one budget")
    if recipe.max_ppl_increase is not None and recipe.allocation is not None and names_tried(recipe.allocation):
        raise RequestError(f"max_ppl_increase with allocation {recipe.allocation!r}, which makes trials itself", "use fisher or uniform")


def budgets(recipe: Recipe) -> list[str]:
    """Those that are given. Rounds have a goal, and a limit beside it."""
    return [name for name in BUDGETS if getattr(recipe, name) is not None and not (recipe.rounds and name == "max_ppl_increase")]


def check_rounds(recipe: Recipe) -> None:
    """Raises RequestError for options of rounds without any, and for what cannot be done in rounds."""
    given = [name for name in ("schedule", "recover_steps", "recover_data", "rewind") if getattr(recipe, name) is not None]
    if recipe.rounds is None:
        if given:
            raise RequestError(f"{given[0]} without rounds", "add --rounds 4")
        return
    if recipe.structured:
        raise RequestError(f"rounds with pattern {recipe.pattern}", "they are for zeros; prune and recover by turns: the result can be cut again")
    if recipe.target_params:
        raise RequestError("target_params with rounds", "give a sparsity")
    if recipe.mixed:
        raise RequestError(f"rounds with pattern {recipe.pattern} mixed by allocation {recipe.allocation!r}", "omit --allocation")
    if recipe.recover_steps == 0 and (recipe.rewind or recipe.recover_data):
        raise RequestError(f"{'rewind' if recipe.rewind else 'recover_data'} without a recovery", "give --recover-steps 1 or more")
    if recipe.in_groups:
        built = build_pattern(recipe.pattern)
        if recipe.rounds > built.m - built.n:
            most = built.m - built.n
            raise RequestError(f"{recipe.rounds} rounds to {recipe.pattern}, where a group loses {most} weights", f"give --rounds {most} or less")


def check_groups(recipe: Recipe) -> None:
    """Raises RequestError for a budget that N:M contradicts."""
    if recipe.mixed:
        check_budget(recipe, f"{recipe.pattern} is the sparsest pattern of a matrix: give the total, as in --sparsity {recipe.most / 2:g}")
        if recipe.sparsity is not None and recipe.sparsity >= recipe.most:
            raise RequestError(
                f"pattern {recipe.pattern} mixed by allocation {recipe.allocation!r} at sparsity {recipe.sparsity:g}",
                f"{recipe.pattern} is the sparsest pattern of a matrix: ask for less than {recipe.most:g} in all, or omit --allocation",
            )
        return
    others = [name for name in budgets(recipe) if name != "sparsity"]
    if others:
        raise RequestError(f"{others[0]} with pattern {recipe.pattern}, which fixes the ratio", "add --allocation fisher to mix it with denser ones")
    if recipe.sparsity is not None and abs(recipe.sparsity - recipe.most) > 1e-9:
        raise RequestError(
            f"pattern {recipe.pattern} means sparsity {recipe.most:g}, not {recipe.sparsity:g}",
            "omit one of them, or add --allocation fisher to mix it with denser ones",
        )


def check_allocation(recipe: Recipe) -> None:
    """Raises RequestError for an unknown allocation, or one that pattern or ratios contradict."""
    if recipe.allocation is not None:
        check_name("allocation", recipe.allocation, names("allocation"))
    if recipe.in_groups and recipe.allocation == "explicit":
        raise RequestError(f"allocation 'explicit' with pattern {recipe.pattern}", "name what stays dense with --skip")
    if recipe.in_groups and recipe.allocation is not None and trait(find("allocation", recipe.allocation), "evolves"):
        raise RequestError(f"allocation {recipe.allocation!r} with pattern {recipe.pattern}", "it moves single weights; use auto or sensitivity")
    if bool(recipe.ratios) != (recipe.parts.allocation == "explicit"):
        raise RequestError(
            "ratios and allocation 'explicit' go together",
            "give both: --allocation explicit and --ratio REGEX=0.5, or a table [ratios] in the recipe",
        )
    odd = [r for r in recipe.ratios.values() if not 0 <= r < 1]
    if odd:
        raise RequestError(f"ratios: {odd[0]:g} is outside 0 <= ratio < 1", "half is 0.5")


def check_structured(recipe: Recipe) -> None:
    """Raises RequestError for options that do not apply to a structured pattern."""
    pattern = recipe.pattern
    if recipe.permute:
        raise RequestError(f"channels reordered for pattern {pattern}", "only N:M gains from it; omit --permute")
    if recipe.allocation is not None and (recipe.allocation == "explicit" or trait(find("allocation", recipe.allocation), "evolves")):
        raise RequestError(f"allocation {recipe.allocation!r} with pattern {pattern}", "use sensitivity or uniform")
    if recipe.uniform and recipe.allocation not in (None, "uniform"):
        raise RequestError(f"uniform sizes with allocation {recipe.allocation!r}", "omit one of them")
    if recipe.rotate and pattern != "hidden":
        raise RequestError(f"a rotated residual stream with pattern {pattern}", "it is for hidden alone; omit --rotate")
    if pattern in COARSE:
        check_coarse(recipe, COARSE[pattern])
    elif recipe.pad and recipe.one_size:
        raise RequestError("zeros up to the widest layer where all have one size", "omit --pad, or add --allocation sensitivity")


def check_coarse(recipe: Recipe, mode: Coarse) -> None:
    """Raises RequestError for options that do not apply to a pattern that decides for the whole model."""
    for name, why in mode.refuses.items():
        if getattr(recipe, name):
            raise RequestError(f"{name} with pattern {mode.name}, {why}", f"leave {name} out")
    for what, kind, asked, known in (
        ("allocation", "allocation", recipe.allocation, mode.allocations),
        ("solver", "solvers", recipe.solver, mode.solvers),
    ):
        if asked is not None and asked not in known:
            check_name(what, str(asked), [*names(kind), *([] if isinstance(asked, str) else [str(asked)])])
            raise RequestError(f"{what} {str(asked)!r} with pattern {mode.name}", f"use {' or '.join(reversed(known))}")
    if recipe.target == "asymmetric" and not mode.repairs:
        raise RequestError(f"an asymmetric target with pattern {mode.name}, which repairs nothing", "leave target out")
    if recipe.criterion_name is not None and not (mode.scores and not isinstance(recipe.criterion, str)):
        check_name("criterion", recipe.criterion_name, names("criteria") if mode.scores else list(mode.criteria))


def refuse_structured(recipe: Recipe) -> None:
    """Raises RequestError for options that apply to structured patterns alone."""
    if recipe.target_size is not None:
        raise RequestError(
            f"target_size with pattern {recipe.pattern}: zeros take as much space as other weights", "use a structured pattern, or --target-params"
        )
    if recipe.target_latency_ratio is not None:
        raise RequestError(f"target_latency_ratio with pattern {recipe.pattern}: zeros take as long as others", "use a structured pattern")
    given = [name for name in ("round_to", "uniform", "exact", "pad", "rotate") if getattr(recipe, name)]
    if given:
        raise RequestError(f"{given[0]} with pattern {recipe.pattern}", f"it is for structured patterns: {', '.join(STRUCTURED)}")


def check_exact(recipe: Recipe) -> None:
    """Raises RequestError for exact where no single size follows from the sparsity: other budgets are met to within one unit anyway."""
    if recipe.exact and recipe.sparsity is None:
        raise RequestError("exact without a sparsity: other budgets are met to within one unit", "omit --exact")
    if recipe.exact and (recipe.pattern == "structured" or not recipe.one_size):
        raise RequestError(f"exact with pattern {recipe.pattern} and sizes that share one budget", "omit --exact: it is met to within one unit")


def check_units(recipe: Recipe, parts: list[Part]) -> None:
    """Raises RequestError for parts that do not fit the pattern's units, or are for units alone."""
    pattern = recipe.pattern
    whole = recipe.structured or not trait(find_pattern(pattern), "in_slabs")
    for part in parts:
        if whole and trait(part.cls, "by_slab"):
            others = [name for name in own_names("solvers") if not trait(find("solvers", name), "by_slab")]
            raise RequestError(f"solver {part.name!r} with pattern {pattern}: it decides slab by slab", f"use one of {', '.join(others)}")
        if not recipe.structured and trait(part.cls, "units_only"):
            raise RequestError(f"{part.name!r} with pattern {pattern}", "it is for structured patterns alone")


def check_names(recipe: Recipe) -> None:
    """Raises RequestError for an unknown quality, method or part, or ones that exclude each other."""
    given = [name for name in ("quality", "method") if getattr(recipe, name) is not None]
    if recipe.criterion is not None or recipe.solver is not None:
        given.append("criterion or solver")
    if len(given) > 1:
        raise RequestError(f"{given[0]} together with {given[1]}", "give a quality, a method, or a method's parts")
    if recipe.quality is not None:
        check_name("quality", recipe.quality, list(QUALITIES))
    if recipe.method is not None:
        check_name("method", recipe.method, list(METHODS | STRUCTURED_METHODS))
        known = STRUCTURED_METHODS if recipe.structured else METHODS
        if recipe.method not in known:
            raise RequestError(f"method {recipe.method!r} with pattern {recipe.pattern}", f"there are: {', '.join(known)}")


def check_parts(recipe: Recipe) -> None:
    """Raises RequestError for a criterion, a solver, a target and a polish that cannot be combined."""
    parts = {part.role: part for part in recipe.methods()}
    criterion, solver = recipe.parts.criterion, parts["solver"]
    check_units(recipe, [parts[role] for role in ("criterion", "solver") if role in parts])
    if solver.cls.own_score and criterion is not None:
        raise RequestError(f"solver {solver.name!r} ranks by its own saliency, not by {criterion!r}", "omit --criterion, or use mask_only")
    if not solver.cls.own_score and criterion is None:
        raise RequestError(f"solver {solver.name!r} needs a criterion", f"add --criterion, one of {', '.join(names('criteria'))}")
    if recipe.parts.asymmetric and not trait(solver.cls, "repairs"):
        raise RequestError(f"an asymmetric target with solver {solver.name!r}, which repairs nothing", "use refit, sparsegpt or admm")
    if recipe.polish_steps is not None and recipe.polish is None and not recipe.parts.polish_steps:
        raise RequestError(f"{recipe.polish_steps} polish steps without a polish", "add --polish kd")
    if isinstance(recipe.solver, UserClass):
        made = recipe.made()
        try_solver(made["solver"], made.get("pattern"))
