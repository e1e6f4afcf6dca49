"""The sizes that keep the package readable: few modules in the root, short files, short functions. Complexity is ruff's (C901 in pyproject.toml)."""

from __future__ import annotations

import ast
import statistics
import tomllib
from pathlib import Path

import llmprune

ROOT = Path(llmprune.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def function_lengths() -> dict[str, int]:
    """Lines of every function, methods and nested ones too, from ``def`` to the last line, by file, name and line."""
    return {
        f"{named(path)}:{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    }


def test_the_root_has_few_modules() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} <= {"__init__", "__main__", "api", "engine", "errors", "methods", "results", "types"}


def test_files_are_short() -> None:
    lines = {named(path): path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert {file: count for file, count in lines.items() if count > 350} == {}


def test_functions_are_short() -> None:
    lengths = function_lengths()
    assert statistics.median(lengths.values()) <= 6
    assert {name: length for name, length in lengths.items() if length > 50} == {}


def test_ruff_checks_complexity() -> None:
    lint = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    assert "C901" in lint["select"]
    assert lint["mccabe"]["max-complexity"] <= 15
