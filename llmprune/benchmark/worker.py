"""One model in a separate process, so that its peak memory can be measured. It obeys one word per line and answers one line of JSON.

    python -m llmprune.benchmark.worker        first line: a Task; then any of lap, peak

Answers are {"found": ...}, or {"error": ..., "hint": ..., "code": ...} for expected errors. The process ends with its input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import torch
import transformers
from transformers import AutoConfig

from llmprune.benchmark.kernels import convert, two_of_four, why_not
from llmprune.benchmark.laps import Runner, Workload
from llmprune.benchmark.memory import forget_peak, peak_resident, resident
from llmprune.errors import LlmpruneError, RequestError, StoppedError, first_line, out_of_memory
from llmprune.model.skeleton import UNBUILDABLE
from llmprune.model.wrappers import auto_class


@dataclass(frozen=True)
class Task:
    """A checkpoint and how it is run. ``kernel_repeat`` above 0: its 2:4 matrices are measured that many times and then run compressed."""

    folder: str
    dtype: str
    device: str
    prompt_length: int
    new_tokens: int
    batch: int
    threads: int | None = None
    compiled: bool = False
    trust_remote_code: bool = False
    kernel_repeat: int = 0


class Contender:
    """The loaded model of a task."""

    def __init__(self, task: Task) -> None:
        self._device = torch.device(task.device)
        if task.threads is not None:
            torch.set_num_threads(task.threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        _import_model(task)
        self._before = resident()
        self._model = load(task)
        workload = Workload(task.prompt_length, task.new_tokens, task.batch)
        self.facts: dict[str, Any] = {
            "parameters": self._model.num_parameters(),
            "threads": torch.get_num_threads(),
            "two_of_four": 0 if why_not(self._device) else sum(map(len, two_of_four(self._model).values())),
        }
        if task.kernel_repeat:
            kernels = convert(self._model, (task.batch, task.batch * task.prompt_length), task.kernel_repeat)
            self.facts["kernels"] = [asdict(k) for k in kernels]
        self._runner = Runner(self._model, workload, task.compiled)
        self._loading_apart = self._forget_peak()

    def lap(self) -> dict[str, Any]:
        return asdict(self._runner.lap())

    def peak(self) -> dict[str, Any]:
        """Peak bytes in use while laps ran, weights included, libraries not; and whether loading is excluded."""
        if self._device.type == "cuda":
            most: int | None = torch.cuda.max_memory_allocated(self._device)
        elif self._device.type == "cpu":
            highest = peak_resident()
            most = None if highest is None else highest - self._before
        else:
            most = None
        return {"bytes": most, "loading_apart": self._loading_apart}

    def _forget_peak(self) -> bool:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            return True
        return forget_peak()


def _import_model(task: Task) -> None:
    """Import the model's code, so that it does not count as the model's memory. What fails here fails again in ``load``, which reports it."""
    try:
        config = AutoConfig.from_pretrained(task.folder, trust_remote_code=task.trust_remote_code)
        with torch.device("meta"):
            auto_class(config.model_type).from_config(config, trust_remote_code=task.trust_remote_code)
    except (*UNBUILDABLE, OSError):
        return


def load(task: Task) -> Any:
    """The model as plain transformers loads it, in evaluation mode.

    Raises RequestError when transformers does not load it, or would draw weights at random that the checkpoint lacks.
    """
    options = {"dtype": getattr(torch, task.dtype), "trust_remote_code": task.trust_remote_code, "output_loading_info": True}
    try:
        config = AutoConfig.from_pretrained(task.folder, trust_remote_code=task.trust_remote_code)
        model, loaded = auto_class(config.model_type).from_pretrained(task.folder, **options)
        model = model.to(task.device).eval()
    except (*UNBUILDABLE, OSError) as error:
        if out_of_memory(error):
            raise
        raise RequestError(
            f"transformers cannot load it ({first_line(error)[:160]})", "check the checkpoint; its own model code needs --trust-remote-code"
        ) from None
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise RequestError(f"the checkpoint lacks {len(missing)} tensors, first {missing[0]!r}", "fetch the checkpoint again")
    return model


def answered(action: Callable[[], Any]) -> dict[str, Any]:
    """The result of an action, or an expected error; a bug keeps its traceback."""
    try:
        return {"found": action()}
    except LlmpruneError as error:
        return {"error": error.message, "hint": error.hint, "code": error.exit_code}
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        stop = StoppedError(f"out of memory ({first_line(error)[:120]})", "use a smaller --batch or a shorter --prompt-length")
        return {"error": stop.message, "hint": stop.hint, "code": stop.exit_code}


def serve(lines: TextIO, answers: TextIO) -> None:
    """Answer until the input ends."""

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    task, contenders = Task(**json.loads(lines.readline())), []

    def start() -> dict[str, Any]:
        contenders.append(Contender(task))
        return contenders[0].facts

    say(answered(start))
    for line in lines:
        say(answered({"lap": contenders[0].lap, "peak": contenders[0].peak}[line.strip()]))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and closes the input
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a model's own code prints must not mix with the answers
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
