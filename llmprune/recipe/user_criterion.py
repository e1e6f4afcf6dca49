"""A user's own criterion: a function in a Python file, ``--criterion my.py:score``, or in Python the function itself.

    needs = ("input_sq",)  # the statistics that it reads, by their names in llmprune.types.Stat; none by default


    def score(weight_RC, stats):  # the smallest scores are dropped first
        return weight_RC.abs() * stats.input_sq_C.sqrt()

It is code, so no recipe file may name one. A run identifies it by the content of its file, not of what that imports.
"""

from __future__ import annotations

import hashlib
import inspect
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

from llmprune.errors import RequestError, StoppedError

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.types import Stat, Stats

SHOWN = 16  # digits of the hash
ROWS, COLUMNS = 3, 8  # of the matrix that it is tried on
# What a mistake in a user's code raises. Anything else keeps its traceback, which points into that code.
MISTAKES: tuple[type[Exception], ...] = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError),
    *(OSError, RuntimeError, SyntaxError, TypeError, ValueError),
)


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
            return weight_RC, f"raises {_named(error)}"
        return score_RC, fault(score_RC, weight_RC)


def read_criterion(value: Any) -> Any:
    """The criterion of a function, or of a text that names one in a file; any other value as it is. Raises RequestError."""
    if isinstance(value, FunctionType):
        return from_function(value)
    return from_file(value) if is_code(value) else value


def is_code(value: Any) -> bool:
    """Whether a recipe's criterion names a file, not a built-in one."""
    return isinstance(value, str) and (":" in value or value.endswith(".py"))


def refuse_code(where: str, value: Any) -> None:
    """Raises RequestError where a recipe file names code."""
    if is_code(value):
        raise RequestError(
            f"{where}: criterion {value!r} is user code, which no recipe may run", "give it on the command line: --criterion my.py:score"
        )


def from_file(text: str) -> UserCriterion:
    """Of "path/to/my.py:score", whose code is run. Raises RequestError."""
    place, _, name = text.rpartition(":")
    path = Path(place).expanduser()
    if not place or not name.isidentifier():
        raise RequestError(f"criterion {text!r} names no function", "write my.py:score")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise RequestError(f"criterion {path.name}: {error.strerror}", "write the path from the current folder: my.py:score") from None
    try:
        found = runpy.run_path(str(path), run_name=path.stem)
    except MISTAKES as error:
        raise RequestError(f"criterion {path.name}: does not import ({_named(error)})", "mend the file") from error
    functions = [key for key, value in found.items() if isinstance(value, FunctionType)]
    if name not in functions:
        raise RequestError(f"criterion {path.name}: has no function {name!r}", f"it has: {', '.join(functions) or 'none'}")
    return tried(f"{path.name}:{name}", source, found[name], found.get("needs", ()))


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
    from llmprune.types import STATISTICS

    needs, known = vars(function).get("needs", needs), STATISTICS
    needs = (needs,) if isinstance(needs, str) else needs
    unknown = [need for need in needs if need not in known] if isinstance(needs, tuple | list | set | frozenset) else [needs]
    if unknown:
        raise RequestError(f"criterion {name}: needs {unknown[0]!r} is unknown", f"there are: {', '.join(known)}")
    criterion = UserCriterion(name, hashlib.sha256(source).hexdigest(), function, frozenset(needs))
    weight_RC, stats = _made_up(criterion.needs)
    copies = {key: value.clone() for key, value in _tensors(weight_RC, stats).items()}
    _, wrong = criterion.attempt(weight_RC, stats)
    changed = [key for key, value in _tensors(weight_RC, stats).items() if not value.equal(copies[key])]
    if wrong or changed:
        hint = f"it is called with weights [rows, columns] and the statistics in needs: {', '.join(sorted(criterion.needs)) or 'none'}"
        raise RequestError(f"criterion {name}: {wrong or f'changes {changed[0]} in place'}", hint)
    return criterion


def fault(score_RC: Any, weight_RC: Tensor) -> str:
    """What is wrong with scores; usually nothing."""
    from torch import Tensor

    if not isinstance(score_RC, Tensor):
        return f"gives {type(score_RC).__name__}, not a tensor"
    if score_RC.shape != weight_RC.shape:
        return f"gives scores {list(score_RC.shape)} for weights {list(weight_RC.shape)}"
    if not score_RC.is_floating_point():
        return f"gives {str(score_RC.dtype).removeprefix('torch.')}, not floating-point scores"
    if score_RC.device != weight_RC.device:
        return f"gives scores on {score_RC.device} for weights on {weight_RC.device}"
    return "gives scores that are NaN" if bool(score_RC.isnan().any()) else ""


def _made_up(needs: frozenset[Stat]) -> tuple[Tensor, Stats]:
    """Small weights, and positive statistics of the shapes that their names end in."""
    import torch

    from llmprune.types import STATISTICS, Stats, shape_of

    draw = torch.Generator().manual_seed(0)
    sizes = {"R": ROWS, "C": COLUMNS}
    values: dict[str, Any] = {}
    for need, field in STATISTICS.items():
        if need in needs:
            shape = shape_of(field.name)
            value = torch.rand([sizes[letter] for letter in shape], generator=draw) + 0.1
            values[field.name] = value @ value.T + torch.eye(COLUMNS) if shape == "CC" else value
    return torch.randn(ROWS, COLUMNS, generator=draw), Stats(tokens=64, grad_tokens=64, grad_windows=4, **values)


def _tensors(weight_RC: Tensor, stats: Stats) -> dict[str, Tensor]:
    from torch import Tensor

    return {"its weights": weight_RC} | {key: value for key, value in vars(stats).items() if isinstance(value, Tensor)}


def _named(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:120]}" if first else type(error).__name__
