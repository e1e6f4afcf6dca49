"""The source files that a checkpoint's configs name for classes of their own (``auto_map``): copied, never run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_imports

from llmprune.checkpoint.companions import copy_companions
from llmprune.checkpoint.files import to_json, write_whole
from llmprune.checkpoint.source import read_json
from llmprune.errors import RequestError

NAMED = re.compile(r"([A-Za-z_]\w*)\.[\w.]+")  # module.Class; with a repository before it (org/name--module.Class), it is not in the folder


def named_code(folder: Path) -> set[str]:
    """The modules that the configs of a folder say are beside them."""
    return {name for path in folder.glob("*config.json") for name in _named_by(path)}


def copy_beside(source: Path, folder: Path) -> None:
    """Copy what belongs beside the weights into an output that has its config: companions, then the code that the configs name."""
    copy_companions(source, folder)
    copy_named_code(source, folder)


def copy_named_code(source: Path, folder: Path) -> None:
    """Copy the code that the configs in ``folder`` name, with what it imports from beside it, unless the folder has such a file already.

    A config.json that names a file which is nowhere loses its ``auto_map``: with it, transformers loads nothing, although it knows the kind.
    """
    for name in sorted(named_code(folder)):
        for file in _with_imports(source, f"{name}.py"):
            if not (folder / file).exists():
                write_whole(folder / file, (source / file).read_bytes())
    config = folder / "config.json"
    if any(not (folder / f"{name}.py").is_file() for name in _named_by(config)):
        write_whole(config, to_json({key: value for key, value in read_json(config).items() if key != "auto_map"}))


def _named_by(path: Path) -> Iterator[str]:
    try:
        entries = read_json(path).get("auto_map")
    except RequestError:  # a companion that is not JSON names nothing
        return
    for value in entries.values() if isinstance(entries, dict) else ():
        for name in value if isinstance(value, list) else [value]:  # a tokenizer's may be a pair
            if isinstance(name, str) and (found := NAMED.fullmatch(name)):
                yield found[1]


def _with_imports(folder: Path, file: str) -> list[str]:
    """The file and those that it imports relatively, by transformers' own rule; those that exist."""
    found, waiting = [], [file]
    while waiting:
        name = waiting.pop()
        if name not in found and (folder / name).is_file():
            found.append(name)
            waiting += [f"{module}.py" for module in get_relative_imports(folder / name)]
    return found
