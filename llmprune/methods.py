"""A method is a file: ``llmprune/<kind>/<name>.py`` holds one public dataclass. There is no registry to edit; ``_name.py`` beside it is a helper.
Other packages offer theirs by entry points of the groups ``llmprune.criteria``, ``.solvers``, ``.allocations`` and ``.patterns``.

The dataclass's fields are the method's options; its class attributes describe it, with ``DEFAULTS`` for those that it omits.
Listing and checking names imports nothing heavy; only ``find`` imports the method asked for.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import pkgutil
import re
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llmprune.errors import MISTAKES, RequestError, mistake

if TYPE_CHECKING:
    from llmprune.types import Allocation, Criterion, Pattern, Solver, TriedAllocation

SENTENCE = re.compile(r"(?<=\.)\s+(?=[A-Z])")  # between two sentences
KINDS = {"criteria": "criterion", "patterns": "pattern", "solvers": "solver", "allocation": "allocation"}  # a folder, and the singular
DEFAULTS = MappingProxyType(
    {
        # of criteria and solvers
        "units_only": False,  # scores whole columns only: for structured patterns
        # of solvers
        "by_slab": False,  # asks the pattern about some columns at a time
        "repairs": True,  # changes the kept weights
        "fits_blocks": False,  # goes over a block once all its matrices have their masks (BlockSolver)
        "work": (56, 60),  # bytes held at the peak for every C^2, and for every weight; by default the most of any built-in one
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
    """The methods of one kind, in alphabetical order, those of other packages last."""
    return own_names(kind) + sorted(offered(kind))


def own_names(kind: str) -> list[str]:
    """Those that llmprune has itself."""
    package = importlib.import_module(f"llmprune.{kind}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


@cache
def offered(kind: str) -> dict[str, list[EntryPoint]]:
    """The methods that other packages offer, by name; none is loaded. A name that llmprune has stays llmprune's."""
    found: dict[str, list[EntryPoint]] = {}
    own = own_names(kind)
    for entry in entry_points(group=f"llmprune.{'allocations' if kind == 'allocation' else kind}"):
        if entry.name not in own:
            found.setdefault(entry.name, []).append(entry)
    return found


def packages(kind: str, name: str) -> dict[str, str]:
    """Name and version of the package that a method comes from; nothing for one of llmprune's own."""
    return {entry.dist.name: entry.dist.version for entry in offered(kind).get(name, []) if entry.dist}


def check_name(what: str, name: str, known: list[str]) -> None:
    """RequestError naming the nearest known name, unless ``name`` is one."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RequestError(f"{what} {name!r} is unknown", f"{hint}there are: {', '.join(known)}")


def find(kind: str, name: str) -> type[Any]:
    """The class of the method of that name. Raises RequestError for an unknown name, one that several packages have, or a file or an entry point
    that is no method.
    """
    if name in own_names(kind):
        return public_class(importlib.import_module(f"llmprune.{kind}.{name}"))
    check_name(KINDS[kind], name, names(kind))
    if len(offered(kind)[name]) > 1:
        raise RequestError(f"{KINDS[kind]} {name!r} is in several packages: {', '.join(sorted(packages(kind, name)))}", "uninstall all but one")
    return loaded(KINDS[kind], offered(kind)[name][0])


def loaded(what: str, entry: EntryPoint) -> type[Any]:
    """The class of an entry point, whose package is imported. Raises RequestError."""
    where = f"{what} {entry.name!r} of {entry.dist.name if entry.dist else entry.value}"
    try:
        cls = entry.load()
    except MISTAKES as error:
        raise RequestError(f"{where}: does not import ({mistake(error)})", "ask its authors, or uninstall it") from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise RequestError(f"{where}: {entry.value} is not a dataclass", "ask its authors, or uninstall it")
    return cls


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
    """How recipes spell a pattern (a capital letter stands for a number), each with an example; read without importing it. Another package's is
    spelled as its entry point is named.
    """
    if name in offered("patterns"):
        return {name: name}
    return _own_spellings(name)


@cache
def _own_spellings(name: str) -> dict[str, str]:
    """``spellings`` of a pattern of ours, whose file does not change while it is imported from."""
    tree = ast.parse((Path(__file__).parent / "patterns" / f"{name}.py").read_text(encoding="utf-8"))
    said = (n for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "spellings" and n.value is not None)
    return next((ast.literal_eval(node.value) for node in said if node.value is not None), {})


def sentence(kind: str, name: str) -> str:
    """The first sentence of a method's document."""
    words = " ".join(document(kind, name).partition("\n\n")[0].split())
    return SENTENCE.split(words, maxsplit=1)[0]


def document(kind: str, name: str) -> str:
    """The docstring of a method's file (equation, paper, link), read without importing it; of another package's module, which is imported."""
    if name in offered(kind):
        return (sys.modules[find(kind, name).__module__].__doc__ or "").strip()
    path = Path(__file__).parent / kind / f"{name}.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
