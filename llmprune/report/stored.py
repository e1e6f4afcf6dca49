"""Results that lie on disk: llmprune.json of a run, sweep.json of a sweep, what ``llmprune bench --json`` printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.checkpoint.files import to_json, write_whole
from llmprune.checkpoint.resolve import is_bundled
from llmprune.errors import RequestError

if TYPE_CHECKING:
    from llmprune.evaluation.harness import TaskResult

RUN, SWEEP = "llmprune.json", "sweep.json"
OF_RUN = frozenset({"recipe", "source", "calibration", "sparsity", "perplexity", "blocks", "smaller", "sample", "notes", "environment", "timings"})
OF_SWEEP = frozenset({"dense", "rows", "source", "environment"})
OF_BENCH = frozenset({"setting", "models", "ratios", "notes"})


def read_run(path: Path) -> dict[str, Any]:
    """The content of a run's llmprune.json. path: the file, or its folder. Raises RequestError."""
    return read(path / RUN if path.is_dir() else path, OF_RUN, "a run's llmprune.json")


def result_of(model: str) -> Path | None:
    """The folder that a model's name means, where a run has made it; None for any other model. Raises RequestError for a damaged llmprune.json."""
    folder = Path(model).expanduser()
    if is_bundled(model) or not (folder / RUN).is_file():
        return None
    read_run(folder)
    return folder


def add_tasks(folder: Path, answers: Sequence[TaskResult]) -> None:
    """Put what lm-eval says into a result's llmprune.json, in the place of older answers to the same: task, few-shot, number of questions."""
    content = read_run(folder)
    held = {(one["task"], one["shots"], one["samples"]): one for one in [*content.get("tasks", []), *map(asdict, answers)]}
    write_whole(folder / RUN, to_json(content | {"tasks": list(held.values())}))


def read_bench(path: Path) -> dict[str, Any]:
    return read(path, OF_BENCH, "what llmprune bench --json prints")


def read_any(path: Path) -> tuple[str, dict[str, Any]]:
    """("llmprune.json" or "sweep.json", its content), of a file or a folder. Raises RequestError."""
    if path.is_dir():
        held = [name for name in (RUN, SWEEP) if (path / name).is_file()]
        if not held:
            raise RequestError(f"{path.name}: holds neither {RUN} nor {SWEEP}", "give the output folder of a run or of a sweep")
        path = path / held[0]
    value = read(path, frozenset({"source"}), f"{RUN} or {SWEEP}")
    kind, wanted = (SWEEP, OF_SWEEP) if "rows" in value else (RUN, OF_RUN)
    return kind, checked(value, wanted, path, kind)


def read(path: Path, wanted: frozenset[str], what: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RequestError(f"{path.name}: no such file in {path.parent.name or 'the current folder'}", f"give {what}") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{path.name}: cannot be read ({str(error)[:120]})", f"give {what}") from None
    return checked(value, wanted, path, what)


def checked(value: Any, wanted: frozenset[str], path: Path, what: str) -> dict[str, Any]:
    missing = sorted(wanted - value.keys()) if isinstance(value, dict) else ["fields"]
    if missing:
        raise RequestError(f"{path.name}: has no {missing[0]!r}", f"give {what}, made by this version of llmprune")
    return dict(value)
