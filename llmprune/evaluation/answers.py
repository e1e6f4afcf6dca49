"""What lm-eval has found, as a value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskResult:
    """lm-eval's results for one task (or group of tasks): metrics by its names, such as ``acc,none`` and ``acc_stderr,none``."""

    task: str
    metrics: dict[str, float]
    samples: int | None  # questions that counted
    shots: int | None
    task_version: str | None
    lm_eval: str
    dtype: str

    def __str__(self) -> str:
        said = []
        for name, value in self.metrics.items():
            metric, _, kept = name.partition(",")
            error = self.metrics.get(f"{metric}_stderr,{kept}")
            if not metric.endswith("_stderr"):
                said.append(f"{metric} {value:.4f}" + ("" if error is None else f" ± {error:.4f}") + ("" if kept in ("", "none") else f" ({kept})"))
        how = [f"{self.samples} samples" if self.samples else "", "" if self.shots is None else f"{self.shots}-shot"]
        how += [f"task version {self.task_version}" if self.task_version else "", self.dtype, f"lm-eval {self.lm_eval}"]
        return f"{self.task}: {', '.join(said)} ({', '.join(h for h in how if h)})"
