"""A method is a file: ``llmprune/<kind>/<name>.py`` holds one public dataclass. There is no registry to edit.

Listing and checking names imports nothing heavy; only ``build`` imports the method asked for.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import pkgutil
from pathlib import Path
from typing import Any

from llmprune.errors import RequestError

KINDS = ("criteria", "patterns", "solvers", "allocation")


def names(kind: str) -> list[str]:
    """The methods of one kind, in alphabetical order."""
    package = importlib.import_module(f"llmprune.{kind}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def check_name(what: str, name: str, known: list[str]) -> None:
    """RequestError naming the nearest known name, unless ``name`` is one."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RequestError(f"{what} {name!r} is unknown", f"{hint}there are: {', '.join(known)}")


def build(kind: str, name: str, **options: Any) -> Any:
    """The method of that name, made with its options. Raises RequestError for an unknown name or option."""
    check_name(kind, name, names(kind))
    module = importlib.import_module(f"llmprune.{kind}.{name}")
    (cls,) = [c for c in vars(module).values() if dataclasses.is_dataclass(c) and isinstance(c, type) and c.__module__ == module.__name__]
    for option in options:
        check_name(f"{kind}.{name} option", option, [f.name for f in dataclasses.fields(cls)])
    return cls(**options)


def document(kind: str, name: str) -> str:
    """The docstring of a method's file (equation, paper, link), read without importing it."""
    path = Path(__file__).parent / kind / f"{name}.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
