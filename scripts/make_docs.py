"""Writes those parts of the pages in docs/ that are generated from the code: ``python scripts/make_docs.py``.

A part stands between two comments, ``<!-- made: methods -->`` and ``<!-- end: methods -->``; the rest of a page is written by hand. methods are the
docstrings of the methods' files (the first paragraph, which has the equation, as it is), recipes the first comments of the recipes, folders the
docstrings of the package's folders, loop the whole of ``llmprune/engine.py``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from llmprune.methods import KINDS, document, own_names

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llmprune"
PAGES = (ROOT / "docs" / "methods.md", ROOT / "docs" / "recipes.md", ROOT / "docs" / "architecture.md")
TITLES = {
    "criteria": ("Criteria", "`--criterion`: what scores a weight; the smallest scores are dropped first."),
    "patterns": (
        "Patterns",
        "`--pattern`: which shapes of zeros are allowed. Those that make a model smaller have a [separate page](structured.md).",
    ),
    "solvers": ("Solvers", "`--solver`: what chooses the mask, by the criterion's scores or its own, and repairs the kept weights."),
    "allocation": ("Allocations", "`--allocation`: how one budget is shared out over the matrices."),
}
PLAIN = re.compile(r"(``.+?``|https?://[^\s,;]+)")  # code and links, in which nothing is escaped
SCHEMA_LINE = "#:schema"


def methods() -> Iterator[str]:
    """Markdown lines: one section a kind, one heading a method."""
    for kind in KINDS:
        title, said = TITLES[kind]
        yield from (f"## {title}", "", said, "")
        for name in own_names(kind):
            equation, _, rest = document(kind, name).partition("\n\n")
            yield from (f"### {name}", "", "```text", equation, "```", "", *([escaped(rest), ""] if rest else []))


def escaped(text: str) -> str:
    """Text with Markdown's characters escaped, except in code and links."""
    parts = PLAIN.split(text)
    return "".join(part.replace("``", "`") if i % 2 else re.sub(r"([*_<\[])", r"\\\1", part) for i, part in enumerate(parts))


def recipes() -> Iterator[str]:
    """Markdown lines: a list of the recipes, each with its first comment."""
    for path in sorted((ROOT / "recipes").glob("*.toml")):
        yield f"- [`{path.name}`](../recipes/{path.name}): {comment(path.read_text(encoding='utf-8'))}"
    yield ""


def comment(recipe: str) -> str:
    """The sentences before the first key."""
    said: list[str] = []
    for line in recipe.splitlines():
        if not line.startswith("#"):
            break
        said += [] if line.startswith(SCHEMA_LINE) else [line.removeprefix("#").strip()]
    return " ".join(said)


def folders() -> Iterator[str]:
    """Markdown lines: the modules of the root, then each folder with its question, its words and its imports, the highest first."""
    yield from ("| module of the root | |", "|---|---|")
    for path in sorted(PACKAGE.glob("*.py")):
        yield f"| `{path.name}` | {escaped(docstring(path).partition(chr(10) * 2)[0].replace(chr(10), ' '))} |"
    yield ""
    said = {path.parent.relative_to(PACKAGE).as_posix(): docstring(path) for path in PACKAGE.glob("*/**/__init__.py")}
    for folder in in_floors({name: imports_in(text) for name, text in said.items()}):
        question, words, imports = re.split(r"\n\nWords: |\nImports: ", said[folder])
        yield from (
            f"**`{folder}/`** {question}",
            "",
            *(escaped(f"- {line}".replace("\n", " ")) for line in (f"Words: {words}", f"Imports: {imports}")),
            "",
        )


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def imports_in(text: str) -> set[str]:
    """What the last line of a folder's docstring names."""
    return set(re.findall(r"[\w/]+", text.rpartition("Imports: ")[2]))


def in_floors(imports: dict[str, set[str]]) -> list[str]:
    """The folders so that each stands above all that it imports; those of one floor by name."""
    below = {folder: targets & imports.keys() for folder, targets in imports.items()}
    floors: dict[str, int] = {}
    for folder in TopologicalSorter(below).static_order():
        floors[folder] = 1 + max((floors[target] for target in below[folder]), default=0)
    return sorted(floors, key=lambda folder: (-floors[folder], folder))


def loop() -> Iterator[str]:
    """The engine's file, unedited."""
    yield from ("```python", (PACKAGE / "engine.py").read_text(encoding="utf-8").removesuffix("\n"), "```", "")


def fresh(page: str) -> str:
    """The page with its made parts as they have to be now."""
    for name, make in (("methods", methods), ("recipes", recipes), ("folders", folders), ("loop", loop)):
        begin, end = f"<!-- made: {name} -->\n", f"<!-- end: {name} -->\n"
        if begin in page:
            before, rest = page.split(begin)
            after = rest.split(end)[1]
            page = f"{before}{begin}\n" + "\n".join(make()) + f"\n{end}{after}"
    return page


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fresh(page.read_text(encoding="utf-8")), encoding="utf-8")
