"""Results on disk: llmprune.json of a run, sweep.json of a sweep, what ``llmprune bench --json`` printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmprune.benchmark.kernels import Kernel
from llmprune.benchmark.result import Bench, Compared, Figures, Setting
from llmprune.checkpoint.files import REPORT, to_versioned_json, write_whole
from llmprune.checkpoint.resolve import is_bundled
from llmprune.errors import RequestError
from llmprune.evaluation.answers import TaskResult
from llmprune.report.fields import Fields
from llmprune.report.frontier import SWEEP, SweepReport
from llmprune.report.result import Report


def read_run(path: Path) -> Report:
    """A run's llmprune.json. path: the file, or its folder. Raises RequestError."""
    path = path / REPORT if path.is_dir() else path
    return Report.from_json(read(path, "a run's llmprune.json"), path.name, path.parent)


def result_of(model: str) -> Path | None:
    """The folder that a model's name refers to, if a run made it; None for any other model. Raises RequestError for a damaged llmprune.json."""
    folder = Path(model).expanduser()
    if is_bundled(model) or not (folder / REPORT).is_file():
        return None
    read_run(folder)
    return folder


def add_tasks(folder: Path, answers: Sequence[TaskResult]) -> None:
    """Store lm-eval's results in a result's llmprune.json, replacing older ones of the same task, few-shot count and number of questions."""
    report = read_run(folder)
    held = {(one.task, one.shots, one.samples): one for one in (*report.tasks, *answers)}
    write_whole(folder / REPORT, to_versioned_json(replace(report, tasks=tuple(held.values())).to_json()))


def read_bench(path: Path) -> Bench:
    what = "what llmprune bench --json prints"
    get = Fields(read(path, what), path.name, what).get
    return Bench(
        setting=get("setting", Setting),
        models=get("models", tuple[Figures, ...]),
        ratios=get("ratios", tuple[Compared, ...]),
        kernels=get("kernels", tuple[Kernel, ...], ()),
        notes=get("notes", tuple[str, ...]),
    )


def read_any(path: Path) -> Report | SweepReport:
    """Of a file or a folder. Raises RequestError."""
    if path.is_dir():
        held = [name for name in (REPORT, SWEEP) if (path / name).is_file()]
        if not held:
            raise RequestError(f"{path.name}: holds neither {REPORT} nor {SWEEP}", "give the output folder of a run or of a sweep")
        path = path / held[0]
    value = read(path, f"{REPORT} or {SWEEP}")
    kind = SweepReport if isinstance(value, dict) and "rows" in value else Report
    return kind.from_json(value, path.name, path.parent)


def read(path: Path, what: str) -> Any:
    """The JSON in a file. Raises RequestError for anything else."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RequestError(f"{path.name}: no such file in {path.parent.name or 'the current folder'}", f"give {what}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path.name}: cannot be read ({str(error)[:120]})", f"give {what}") from None
