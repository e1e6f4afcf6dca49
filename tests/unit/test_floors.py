"""The house: imports point down only, nothing goes round in circles, and the front door is light."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import llmprune

ROOT = Path(llmprune.__file__).parent
FILES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(ROOT.rglob("*.py"))}


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, dotted name after ``llmprune``) of every import of the package, wherever in the file it stands; "" is the package itself."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(node.lineno, name.partition(".")[2]) for name in names if name.split(".")[0] == "llmprune"]
    return found


def module_of(dotted: str) -> str:
    """The file that a dotted name lies in, as a key of FILES."""
    parts = dotted.split(".")
    while parts:
        path = "/".join(parts)
        if path in FILES or f"{path}/__init__" in FILES:
            return path if path in FILES else f"{path}/__init__"
        parts.pop()
    return "__init__"


def loaded_when_imported(tree: ast.Module) -> ast.Module:
    """Without the bodies of functions and of ``if TYPE_CHECKING``."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Strip().visit(tree)


def room_of(file: str) -> str:
    """A folder, or a file of the root."""
    folder, _, name = file.rpartition("/")
    return folder or name


@functools.cache
def folder_graph() -> dict[str, set[str]]:
    """What each folder, or file of the root, imports, counting imports inside functions and those for types alone. Python loads the front door
    before any file behind it, so it is not counted.
    """
    graph: dict[str, set[str]] = {}
    for file, path in FILES.items():
        targets = {module_of(dotted) for _, dotted in imports(ast.parse(path.read_text(encoding="utf-8"))) if dotted} - {"__init__"}
        graph.setdefault(room_of(file), set()).update({room_of(target) for target in targets} - {room_of(file)})
    return graph


def test_folders_make_no_circle() -> None:
    assert list(TopologicalSorter(folder_graph()).static_order())


WORDS = {"types", "errors", "results", "methods"}  # of the root: every folder may import them
FOLDERS = sorted({file.rpartition("/")[0] for file in FILES} - {""})
FORM = re.compile(r"[^\n]+\?\n\nWords: ([^\n]+(?:\n[^\n]+)*)\.\nImports: ([^.]+)\.")


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_says_what_it_is_for(folder: str) -> None:
    """Its ``__init__`` holds a docstring and nothing else: a question, its words, and the folders that it imports, all of them and no others."""
    tree = ast.parse(FILES[f"{folder}/__init__"].read_text(encoding="utf-8"))
    assert len(tree.body) == 1
    said = FORM.fullmatch(ast.get_docstring(tree) or "")
    assert said, f"llmprune/{folder}/__init__.py: its docstring has another form"
    assert said[2].replace("\n", " ") == (", ".join(sorted(folder_graph()[folder] - WORDS)) or "none"), f"llmprune/{folder}/__init__.py"


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_taken_from_the_front_door(file: str) -> None:
    """All that is behind it stays above; but ``Report.push`` is ``llmprune.push``, and ``save`` likewise."""
    if file.split("/")[0] in ("api", "cli", "__init__", "__main__"):
        return
    tree = ast.parse(FILES[file].read_text(encoding="utf-8"))
    wrong = [f"{line}: llmprune.{dotted}" for line, dotted in imports(tree) if module_of(dotted) == "__init__" and dotted not in ("", "__version__")]
    uses = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "llmprune"}
    free = {"__version__", "__file__"} | ({"push", "save"} if file == "report/result" else set())
    wrong += [f"llmprune.{attribute}" for attribute in uses - free]
    assert wrong == [], f"{file}: {wrong}"


def test_nothing_goes_round_in_circles() -> None:
    graph = {}
    for file, path in FILES.items():
        tree = loaded_when_imported(ast.parse(path.read_text(encoding="utf-8")))
        graph[file] = {module_of(dotted) for _, dotted in imports(tree) if dotted} - {file}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


@pytest.mark.parametrize("folder", sorted({room_of(file) for file in FILES}))
def test_files_of_one_folder_make_no_circle(folder: str) -> None:
    """Counting imports inside functions and those for types alone: each file can be read after those below it."""
    graph = {}
    for file, path in FILES.items():
        if room_of(file) == folder:
            graph[file] = {module_of(dotted) for _, dotted in imports(ast.parse(path.read_text(encoding="utf-8"))) if dotted} - {file}
    assert {file for file in TopologicalSorter(graph).static_order() if room_of(file) == folder} == graph.keys()


@pytest.mark.parametrize("kind", ["criteria", "patterns", "solvers", "allocation"])
def test_methods_of_one_kind_do_not_know_each_other(kind: str) -> None:
    """Each is one idea in one file, with helpers beside it whose names begin with _. What two need lies below them, in maths."""
    for file, path in FILES.items():
        if file.startswith(f"{kind}/"):
            targets = {module_of(dotted) for _, dotted in imports(ast.parse(path.read_text(encoding="utf-8")))} - {file}
            others = [t for t in targets if t.split("/")[0] in ("criteria", "patterns", "solvers", "allocation") and not t.startswith(f"{kind}/_")]
            assert others == [], file


def modules_after(code: str) -> set[str]:
    run = subprocess.run([sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


HEAVY = {"torch", "transformers", "accelerate", "datasets", "numpy", "safetensors", "huggingface_hub"}


@pytest.mark.parametrize(
    "code",
    [
        "import llmprune; llmprune.__version__; llmprune.LlmpruneError",
        "import llmprune.cli.main",
        "import llmprune.recipe.reading",
        "from llmprune.methods import KINDS, names, document; [document(kind, name) for kind in KINDS for name in names(kind)]",
    ],
    ids=["front-door", "cli", "recipe", "methods"],
)
def test_the_front_door_loads_nothing_heavy(code: str) -> None:
    assert modules_after(code) & HEAVY == set()


def test_every_public_name_is_there() -> None:
    assert [name for name in llmprune.__all__ if not hasattr(llmprune, name)] == []
    with pytest.raises(AttributeError, match="no_such_name"):
        llmprune.no_such_name  # noqa: B018
