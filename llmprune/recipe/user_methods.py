"""A user's own methods. A criterion is a function in a Python file, ``--criterion my.py:score``, or in Python the function itself:

    needs = ("input_sq",)  # the statistics that it reads, by their names in llmprune.types.STATISTICS; none by default


    def score(weight_RC, stats):  # the smallest scores are dropped first
        return weight_RC.abs() * stats.input_sq_C.sqrt()

A solver is a dataclass, ``--solver my.py:Mine`` (or ``my.py:Mine+reconstruct``), that follows ``llmprune.types.Solver``; or in Python the class.

They are code, so no recipe file may name one. A run identifies one by the content of its file, not of what that imports.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from llmprune.errors import MISTAKES, RequestError, StoppedError, mistake
from llmprune.methods import trait
from llmprune.recipe.named import check_after
from llmprune.recipe.user_faults import fault, fault_of_pruned, made_up, wrong_on

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.types import Pattern, Pruned, Solver, Stat, Stats

SHOWN = 16  # digits of the hash
ROWS, COLUMNS = 3, 8  # of the matrix that it is tried on


@dataclass(frozen=True)
class UserClass:
    """A user's solver class. name: last name of its file, and the class's. after: the solver that goes over blocks after it, if any."""

    name: str
    sha256: str
    cls: type[Any]
    after: str = ""

    def __str__(self) -> str:
        return f"{self.name}@{self.sha256[:SHOWN]}" + (f"+{self.after}" if self.after else "")


@dataclass(frozen=True)
class UserSolver:
    """A Solver (``llmprune.types``) by a user's class, with its results checked. name: last name of the file, and the class's."""

    name: str
    method: Solver

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset(self.method.needs)

    @property
    def own_score(self) -> bool:
        return self.method.own_score

    @property
    def work(self) -> tuple[int, int]:
        """Bytes held for every C^2, and for every weight (``llmprune.methods.DEFAULTS``)."""
        a_square, a_weight = trait(self.method, "work")
        return a_square, a_weight

    def solve(self, weight_RC: Tensor, score_RC: Tensor | None, stats: Stats, pattern: Pattern, drop: int) -> Pruned:
        """Raises StoppedError for an invalid result."""
        pruned, wrong = self.attempt(weight_RC, score_RC, stats, pattern, drop)
        if wrong or pruned is None:
            raise StoppedError(f"solver {self.name}: {wrong}", "fix the class, and add --restart to start over with it")
        return pruned

    def attempt(self, weight_RC: Tensor, score_RC: Tensor | None, stats: Stats, pattern: Pattern, drop: int) -> tuple[Pruned | None, str]:
        """(result, what is wrong with it)."""
        try:
            pruned = self.method.solve(weight_RC, score_RC, stats, pattern, drop)
        except MISTAKES as error:
            return None, f"raises {mistake(error)}"
        return pruned, fault_of_pruned(pruned, weight_RC, drop)


@dataclass(frozen=True)
class UserCriterion:
    """A Criterion (``llmprune.types``) by a user's function. name: last name of the file, and the function's."""

    name: str
    sha256: str
    function: Callable[[Tensor, Stats], Tensor]
    needs: frozenset[Stat]

    def __str__(self) -> str:
        return f"{self.name}@{self.sha256[:SHOWN]}"

    def score(self, weight_RC: Tensor, stats: Stats) -> Tensor:
        """Raises StoppedError for invalid scores."""
        score_RC, wrong = self.attempt(weight_RC, stats)
        if wrong:
            raise StoppedError(f"criterion {self.name}: {wrong}", "fix the function, and add --restart to start over with it")
        return score_RC

    def attempt(self, weight_RC: Tensor, stats: Stats) -> tuple[Tensor, str]:
        """(scores, what is wrong with them)."""
        try:
            score_RC = self.function(weight_RC, stats)
        except MISTAKES as error:
            return weight_RC, f"raises {mistake(error)}"
        return score_RC, fault(score_RC, weight_RC)


def read_criterion(value: Any) -> Any:
    """The criterion of a function, or of a text that names one in a file; any other value as it is. Raises RequestError."""
    if isinstance(value, FunctionType):
        return from_function(value)
    return from_file(value) if is_code(value) else value


def read_solver(value: Any) -> Any:
    """A class, or that of a text that names one in a file; any other value as it is. Raises RequestError."""
    if isinstance(value, type):
        return from_class(value)
    return class_from_file(value) if is_code(value) else value


READERS: dict[str, Callable[[Any], Any]] = {"criterion": read_criterion, "solver": read_solver}


def is_code(value: Any) -> bool:
    """Whether what a recipe names is in a file, not a built-in method."""
    return isinstance(value, str) and (":" in value or value.endswith(".py"))


def refuse_code(where: str, values: dict[str, Any]) -> None:
    """Raises RequestError where a recipe file names code."""
    for key in READERS:
        if is_code(values.get(key)):
            named = {"criterion": "my.py:score", "solver": "my.py:Mine"}[key]
            raise RequestError(f"{where}: {key} {values[key]!r} is user code, which no recipe may run", f"give it by hand: --{key} {named}")


def from_file(text: str) -> UserCriterion:
    """Of "path/to/my.py:score", whose code is run. Raises RequestError."""
    source, found, name, path = ran("criterion", text, "my.py:score")
    functions = [key for key, value in found.items() if isinstance(value, FunctionType)]
    if name not in functions:
        raise RequestError(f"criterion {path.name}: has no function {name!r}", f"it has: {', '.join(functions) or 'none'}")
    return tried(f"{path.name}:{name}", source, found[name], found.get("needs", ()))


def class_from_file(text: str) -> UserClass:
    """Of "path/to/my.py:Mine" or "path/to/my.py:Mine+reconstruct", whose code is run. Raises RequestError."""
    place, _, named = text.rpartition(":")
    first, plus, after = named.partition("+")
    source, found, name, path = ran("solver", f"{place}:{first}", "my.py:Mine")
    classes = [key for key, value in found.items() if isinstance(value, type) and is_dataclass(value)]
    if name not in classes:
        raise RequestError(f"solver {path.name}: has no dataclass {name!r}", f"it has: {', '.join(classes) or 'none'}")
    if plus:
        check_after(text, found[name], after)
    return user_class(f"{path.name}:{name}", source, found[name], after)


def from_class(cls: type[Any]) -> UserClass:
    """Of a dataclass whose source can be read, as with functions. Raises RequestError."""
    try:
        source, path = "".join(inspect.findsource(cls)[0]), Path(inspect.getfile(cls))
    except (OSError, TypeError):
        raise RequestError(f"solver {cls.__name__}: its source cannot be read", "put it into a file: my.py:Mine") from None
    if not is_dataclass(cls):
        raise RequestError(f"solver {cls.__name__}: is not a dataclass", "write @dataclass(frozen=True) before it")
    return user_class(f"{path.name}:{cls.__qualname__}", source.encode(), cls)


def user_class(name: str, source: bytes, cls: type[Any], after: str = "") -> UserClass:
    """Raises RequestError for a class that does not say what every solver says."""
    needs, own_score, solve = (getattr(cls, name, None) for name in ("needs", "own_score", "solve"))
    if not isinstance(own_score, bool) or not callable(solve):
        raise RequestError(f"solver {name}: has no own_score (True or False), or no solve", "docs/extending.md shows the smallest solver")
    check_needs(f"solver {name}", needs)
    return UserClass(name, hashlib.sha256(source).hexdigest(), cls, after)


def check_needs(what: str, needs: Any) -> None:
    """Raises RequestError unless all are statistics."""
    from llmprune.types import STATISTICS

    unknown = [need for need in needs if need not in STATISTICS] if isinstance(needs, tuple | list | set | frozenset) else [needs]
    if unknown:
        raise RequestError(f"{what}: needs {unknown[0]!r} is unknown", f"there are: {', '.join(STATISTICS)}")


def ran(what: str, text: str, example: str) -> tuple[bytes, dict[str, Any], str, Path]:
    """(source, globals, the name asked for, path) of "path/to/my.py:name", whose code is run. Raises RequestError."""
    place, _, name = text.rpartition(":")
    path = Path(place).expanduser()
    if not place or not name.isidentifier():
        raise RequestError(f"{what} {text!r} names no {'function' if what == 'criterion' else 'class'}", f"write {example}")
    try:
        source = path.read_bytes()
        module = ModuleType(f"{path.stem}@{hashlib.sha256(source).hexdigest()[:SHOWN]}")  # no name that an import could ask for
    except OSError as error:
        raise RequestError(f"{what} {path.name}: {error.strerror}", f"write the path from the current folder: {example}") from None
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where the types of a dataclass's fields are looked up
    try:
        exec(compile(source, str(path), "exec"), vars(module))
        return source, vars(module), name, path
    except MISTAKES as error:
        raise RequestError(f"{what} {path.name}: does not import ({mistake(error)})", "fix the file") from error


def from_function(function: FunctionType) -> UserCriterion:
    """Of a function whose source can be read; whatever it uses from elsewhere is not part of its identity. Raises RequestError."""
    try:
        source = "".join(inspect.findsource(function)[0])
    except OSError:
        raise RequestError(f"criterion {function.__name__}: its source cannot be read", "put it into a file: my.py:score") from None
    name = f"{Path(function.__code__.co_filename).name}:{function.__qualname__}"
    return tried(name, source.encode(), function, inspect.unwrap(function).__globals__.get("needs", ()))


def tried(name: str, source: bytes, function: Any, needs: Any) -> UserCriterion:
    """The criterion, once it has scored a small matrix. needs: of its module, where the function has no attribute of that name."""
    needs = vars(function).get("needs", needs)
    needs = (needs,) if isinstance(needs, str) else needs
    check_needs(f"criterion {name}", needs)
    criterion = UserCriterion(name, hashlib.sha256(source).hexdigest(), function, frozenset(needs))
    weight_RC, stats = made_up(criterion.needs, ROWS, COLUMNS)
    wrong = wrong_on(weight_RC, stats, lambda: criterion.attempt(weight_RC, stats)[1])
    if wrong:
        hint = f"it is called with weights [rows, columns] and the statistics in needs: {', '.join(sorted(criterion.needs)) or 'none'}"
        raise RequestError(f"criterion {name}: {wrong}", hint)
    return criterion


def try_solver(solver: UserSolver, pattern: Pattern | None) -> None:
    """Prune a small matrix with it. pattern: None for units of columns. Raises RequestError."""
    import torch

    from llmprune.maths.unit_columns import Units

    tall, wide = (pattern.tall, pattern.unit) if pattern is not None else (1, 1)
    weight_RC, stats = made_up(solver.needs, -(-ROWS // tall) * tall, -(-COLUMNS // wide) * wide)
    pattern = pattern or Units(torch.arange(COLUMNS).view(-1, 2))
    drop = pattern.dropped(len(weight_RC), weight_RC.shape[1], 0.5)
    score_RC = None if solver.own_score else weight_RC.abs()
    wrong = wrong_on(weight_RC, stats, lambda: solver.attempt(weight_RC, score_RC, stats, pattern, drop)[1])
    if wrong:
        said = f"weights {list(weight_RC.shape)}, {'no scores' if solver.own_score else 'scores'}, the statistics in needs, and {drop} to drop"
        raise RequestError(f"solver {solver.name}: {wrong}", f"it was called with {said}")
