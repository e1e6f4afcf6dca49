"""Tasks of the lm-evaluation-harness, the optional package lm-eval (https://github.com/EleutherAI/lm-evaluation-harness): its tasks, prompts,
metrics and numbers. The whole model is in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmprune.errors import RequestError
from llmprune.evaluation.answers import TaskResult


def check_installed() -> None:
    """Raises RequestError without lm-eval."""
    if find_spec("lm_eval") is None:
        raise RequestError("tasks need lm-eval, which is not installed", 'pip install "llmprune[eval]", or pip install "lm-eval>=0.4.9"')


def find_tasks(names: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's task manager, when it knows every name. folder: of the user's own task files, which are then the only ones; this works offline.

    Raises RequestError.
    """
    check_installed()
    if folder is not None and not folder.is_dir():
        raise RequestError(f"task folder {folder.name}: no such folder", "give the folder that holds the task files (*.yaml)")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager() if folder is None else TaskManager(include_path=str(folder), include_defaults=False)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        known = f"it has {', '.join(sorted(manager.all_tasks)[:20]) or 'none'}" if folder is not None else "lm-eval ls tasks lists them"
        raise RequestError(f"task {unknown[0]!r}: unknown to lm-eval" + (f" in {folder.name}" if folder else ""), known)
    return manager


def run_tasks(model: Any, tokenizer: Any, manager: Any, names: Sequence[str], limit: int | None = None, batch: int = 8) -> list[TaskResult]:
    """lm-eval's numbers for a model in memory. limit: the first so many questions of each task."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=str(model.device))
    found: Any = lm_eval.simple_evaluate(model=wrapped, tasks=list(names), task_manager=manager, limit=limit, log_samples=False)
    return [_result(name, metrics, found, str(model.dtype).removeprefix("torch.")) for name, metrics in found["results"].items()]


def _result(name: str, metrics: dict[str, Any], found: dict[str, Any], dtype: str) -> TaskResult:
    numbers = {key: float(value) for key, value in metrics.items() if isinstance(value, int | float) and "," in key}
    samples = found.get("n-samples", {}).get(name, {}).get("effective")
    task_version = found.get("versions", {}).get(name)
    shots = found.get("n-shot", {}).get(name)
    return TaskResult(name, numbers, samples, shots, None if task_version is None else str(task_version), version("lm-eval"), dtype)
