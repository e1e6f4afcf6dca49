"""A method is a file: ``llmprune/<kind>/<name>.py`` holds one public dataclass. There is no registry to edit; ``_name.py`` beside it is a helper.

The dataclass's fields are the method's options; its class attributes describe it, with ``DEFAULTS`` for those that it omits.
Listing and checking names imports nothing heavy; only ``find`` imports the method asked for.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import pkgutil
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llmprune.errors import RequestError

if TYPE_CHECKING:
    from llmprune.types import Allocation, Criterion, Pattern, Solver, TriedAllocation

KINDS = {"criteria": "criterion", "patterns": "pattern", "solvers": "solver", "allocation": "allocation"}  # a folder, and the singular
DEFAULTS = MappingProxyType(
    {
        # of criteria and solvers
        "units_only": False,  # scores whole columns only: for structured patterns
        # of solvers
        "by_slab": False,  # asks the pattern about some columns at a time
        "repairs": True,  # changes the kept weights
        "fits_blocks": False,  # goes over a block once all its matrices have their masks (BlockSolver)
        "work": (56, 44),  # bytes held at the peak for every C^2, and for every weight; by default the most of any built-in one
        # of patterns
        "parse": lambda text: {},  # the fields that a spelling stands for; raises RequestError
        "fixes_ratio": False,  # has a fixed ratio, its ``sparsity``
        "in_slabs": True,  # some columns of a matrix can be decided by themselves
        "n_of_m": False,  # keeps ``n`` of every ``m`` neighbours, so reordered input channels may hold more
        # of allocations
        "tried": False,  # prunes the whole model on trial (TriedAllocation)
        "evolves": False,  # moves single weights from matrix to matrix
    }
)


def trait(method: Any, name: str) -> Any:
    """A class attribute of a method, or its class; the default where it has none."""
    return getattr(method, name, DEFAULTS[name])


def names(kind: str) -> list[str]:
    """The methods of one kind, in alphabetical order."""
    package = importlib.import_module(f"llmprune.{kind}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def check_name(what: str, name: str, known: list[str]) -> None:
    """RequestError naming the nearest known name, unless ``name`` is one."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RequestError(f"{what} {name!r} is unknown", f"{hint}there are: {', '.join(known)}")


def find(kind: str, name: str) -> type[Any]:
    """The class of the method of that name. Raises RequestError for an unknown name, or a file without one public dataclass."""
    check_name(KINDS[kind], name, names(kind))
    return public_class(importlib.import_module(f"llmprune.{kind}.{name}"))


def public_class(module: Any) -> type[Any]:
    """The one public dataclass of a method's module. Raises RequestError."""
    own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__ and not c.__name__.startswith("_")]
    found = [c for c in own if dataclasses.is_dataclass(c)]
    if len(found) != 1:
        said = f"has the public dataclasses {', '.join(c.__name__ for c in found)}" if found else "has no public dataclass"
        raise RequestError(f"{module.__name__}: {said}", "a method's file has one; names of others begin with _")
    return found[0]


def build(kind: str, name: str, **options: Any) -> Any:
    """The method of that name, made with its options. Raises RequestError for an unknown name or option."""
    cls = find(kind, name)
    for option in options:
        check_name(f"option of {KINDS[kind]} {name}", option, [f.name for f in dataclasses.fields(cls)])
    return cls(**options)


def criterion(name: str, **options: Any) -> Criterion:
    """``build`` of a criterion, typed; likewise those below."""
    made: Criterion = build("criteria", name, **options)
    return made


def pattern(name: str, **options: Any) -> Pattern:
    made: Pattern = build("patterns", name, **options)
    return made


def solver(name: str, **options: Any) -> Solver:
    made: Solver = build("solvers", name, **options)
    return made


def allocation(name: str, **options: Any) -> Allocation | TriedAllocation:
    made: Allocation | TriedAllocation = build("allocation", name, **options)
    return made


def spellings(name: str) -> dict[str, str]:
    """How recipes spell a pattern (a capital letter stands for a number), each with an example; read without importing it."""
    tree = ast.parse((Path(__file__).parent / "patterns" / f"{name}.py").read_text(encoding="utf-8"))
    said = (n for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "spellings" and n.value is not None)
    return next((ast.literal_eval(node.value) for node in said if node.value is not None), {})


def document(kind: str, name: str) -> str:
    """The docstring of a method's file (equation, paper, link), read without importing it."""
    path = Path(__file__).parent / kind / f"{name}.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
