"""``bench``: the speed, memory and size of a checkpoint, beside the dense one it came from, in one run.

Every model is in a separate process; their laps take turns, so that a drift of the machine's load affects all of them alike.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llmprune
from llmprune.benchmark.kernels import Kernel, why_not
from llmprune.benchmark.laps import Lap, Spread, in_turns
from llmprune.benchmark.result import Bench, Figures, Setting, compared
from llmprune.benchmark.worker import Task
from llmprune.checkpoint.resolve import open_source
from llmprune.checkpoint.source import DTYPES, Source
from llmprune.errors import LlmpruneError, RequestError, StoppedError, first_line
from llmprune.model.kinds import check_live, longest_sequence
from llmprune.model.skeleton import UNBUILDABLE
from llmprune.stream.devices import choose_device

DEFAULT_PROMPT = 512
COMPILED_WARM_UP = 3  # rounds: a cache of fixed size is set up in the first, so torch.compile compiles once more
QUIET = 0.5  # average number of running processes in the last minute
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
ROOT = Path(llmprune.__file__).parent.parent


@dataclass(frozen=True)
class Entrant:
    """A checked checkpoint that is to be measured."""

    source: Source
    role: str
    dtype: str
    positions: int | None


def bench(
    model: str | PathLike[str] | nn.Module,
    against: str | PathLike[str] | nn.Module | None = None,
    *,
    prompt_length: int | None = None,
    new_tokens: int = 64,
    batch: int = 1,
    repeat: int = 5,
    threads: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    compile: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Bench:
    """Measure a checkpoint, by turns with ``against`` where given, as plain transformers loads and runs them.

    model, against: alias, folder or Hub id, or a model in memory, which is saved to a temporary folder. prompt_length: tokens; by default 512, or as
    many as the models' positions allow. new_tokens: decoded after the first one. repeat: measured rounds, after one warm-up round (three with
    compile). threads: torch's default.
    dtype: the checkpoint's own by default. trust_remote_code: run the model code that comes with the checkpoint.
    Raises RequestError before any load when the request cannot be met, StoppedError when a model fails.
    """
    _check_counts(new_tokens=new_tokens, batch=batch, repeat=repeat, **({"prompt_length": prompt_length} if prompt_length is not None else {}))
    _check_counts(**({"threads": threads} if threads is not None else {}))
    device, dtype = str(device), str(dtype).removeprefix("torch.")
    if dtype not in DTYPE_NAMES:
        raise RequestError(f"dtype {dtype!r} is unknown", f"one of {', '.join(DTYPE_NAMES)}")
    chosen = choose_device(device)
    notes = _load_note(chosen)
    with ExitStack() as held:
        roles = {"model": model} if against is None else {"dense": against, "pruned": model}
        named = [(_stored(one, held), role) for role, one in roles.items()]
        entrants = [_entrant(name, role, dtype, chosen, trust_remote_code, revision, notes) for name, role in named]
        length = _prompt(prompt_length, new_tokens, entrants)
        task = Task("", "", str(chosen), length, new_tokens, batch, threads, compile, trust_remote_code)
        return _run(entrants, task, repeat, notes, progress)


def _stored(model: str | PathLike[str] | nn.Module, held: ExitStack) -> str:
    """Where a model is; one in memory is saved. Raises RequestError for one that is no causal language model."""
    if not isinstance(model, nn.Module):
        return os.fspath(model)
    folder = Path(held.enter_context(TemporaryDirectory())) / type(model).__name__
    check_live(model).save_pretrained(folder)
    return str(folder)


def _run(entrants: list[Entrant], task: Task, repeat: int, notes: list[str], progress: Callable[[str, int, int], None]) -> Bench:
    reason = why_not(torch.device(task.device))
    with ExitStack() as stack:
        processes = [stack.enter_context(_process()) for _ in entrants]  # they import at the same time, and load one after another
        workers = [_loaded(p, e, task) for p, e in zip(processes, entrants, strict=True)]
        last = workers[-1]
        if reason is None and last.facts["two_of_four"]:
            compressed = replace(last.entrant, role="2:4 kernels")
            try:
                workers.append(_loaded(stack.enter_context(_process()), compressed, replace(task, kernel_repeat=repeat)))
            except StoppedError as error:  # the models themselves can still be measured
                reason = f"2:4 kernels: {error.message}"
        warm_up = COMPILED_WARM_UP if task.compiled else 1
        laps = in_turns([w.lap for w in workers], repeat, warm_up, lambda done, total: progress("bench", done, total))
        peaks = [w.ask("peak") for w in workers]
    if reason is None and len(workers) == len(entrants):
        reason = f"2:4 kernels: no nn.Linear of {last.entrant.source.name} keeps 2:4"
    notes += [reason] if reason else []
    notes += [] if all(p["loading_apart"] for p in peaks) else ["peak memory includes the loading: this system does not separate them"]
    models = tuple(_measured(w, lap, peak["bytes"]) for w, lap, peak in zip(workers, laps, peaks, strict=True))
    ratios = tuple(compared(m, mine, models[0], laps[0]) for m, mine in zip(models[1:], laps[1:], strict=True))
    kernels = tuple(Kernel(**_spreads(k)) for w in workers for k in w.facts.get("kernels", []))
    return Bench(_setting(task, repeat, workers[0].facts["threads"]), models, ratios, kernels, tuple(notes))


def _load_note(device: torch.device) -> list[str]:
    """Threads that wait for each other suffer most from other processes: figures of a busy machine carry this note."""
    load = psutil.getloadavg()[0]
    busy = device.type == "cpu" and load > QUIET
    remedy = "measure again on a quiet one, or with OMP_WAIT_POLICY=passive, so that waiting threads do not spin"
    return [f"the machine was busy before the run (load average {load:.1f}): {remedy}"] if busy else []


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise RequestError(f"{name.replace('_', ' ')} {value}: less than 1", f"give --{name.replace('_', '-')} 1 or more")


def _entrant(name: str, role: str, dtype: str, device: torch.device, trust: bool, revision: str | None, notes: list[str]) -> Entrant:
    source = open_source(name, revision if role != "dense" else None)
    kind = source.config.get("model_type")
    own_code = "AutoModelForCausalLM" in (source.config.get("auto_map") or {})
    if own_code and not trust and (kind not in CONFIG_MAPPING or "per_layer_config" in source.config):
        raise RequestError(f"{source.name}: comes with its own model code, which is not run without consent", "read it, then add --trust-remote-code")
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust)
    except (*UNBUILDABLE, OSError) as error:
        raise RequestError(
            f"{source.name}: transformers cannot read the config ({first_line(error)[:160]})", "check it against the checkpoint"
        ) from None
    return Entrant(source, role, _dtype(dtype, config, source, device, notes), longest_sequence(config))


def _dtype(asked: str, config: Any, source: Source, device: torch.device, notes: list[str]) -> str:
    """The name of the dtype to run in: the one asked for, else the checkpoint's own; never float16 on CPU, where its products are very slow."""
    if asked == "float16" and device.type == "cpu":
        raise RequestError("dtype float16 on CPU: its products are 5 to 60 times slower there", "give --dtype float32 or bfloat16")
    if asked != "auto":
        return asked
    stored = (DTYPES.get(e.dtype) for e in source.tensors.values())
    own = config.dtype or next((d for d in stored if d is not None and d.is_floating_point), torch.float32)
    if own == torch.float16 and device.type == "cpu":
        notes.append(f"{source.name}: float16, computed in float32 on CPU, where float16 products are 5 to 60 times slower")
        own = torch.float32
    return str(own).removeprefix("torch.")


def _prompt(asked: int | None, new_tokens: int, entrants: list[Entrant]) -> int:
    """Tokens of the prompt; prompt and new tokens have to fit into the positions of every model."""
    least = min((e for e in entrants if e.positions is not None), key=lambda e: e.positions or 0, default=None)
    if least is None or least.positions is None:
        return asked or DEFAULT_PROMPT
    room = least.positions - new_tokens
    if room < 1:
        raise RequestError(
            f"{new_tokens} new tokens after a prompt: {least.source.name} has {least.positions} positions",
            f"--new-tokens {least.positions - 1} or less",
        )
    if asked is not None and asked > room:
        raise RequestError(
            f"a prompt of {asked} and {new_tokens} new tokens: {least.source.name} has {least.positions} positions", f"--prompt-length {room} or less"
        )
    return asked or min(DEFAULT_PROMPT, room)


@dataclass(frozen=True)
class _Worker:
    """A model's process."""

    entrant: Entrant
    task: Task
    process: subprocess.Popen[str]
    facts: dict[str, Any]

    def ask(self, word: str) -> Any:
        return _ask(self.process, word, self.entrant.source.name)

    def lap(self) -> Lap:
        return Lap(**self.ask("lap"))


@contextmanager
def _process() -> Iterator[subprocess.Popen[str]]:
    """A process that waits for its task; it ends with the ``with`` block."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    words = [sys.executable, "-P", "-m", "llmprune.benchmark.worker"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _loaded(process: subprocess.Popen[str], entrant: Entrant, task: Task) -> _Worker:
    """The process with the entrant's model in it."""
    own = replace(task, folder=str(entrant.source.folder), dtype=entrant.dtype)
    return _Worker(entrant, own, process, _ask(process, json.dumps(asdict(own)), entrant.source.name))


def _ask(process: subprocess.Popen[str], line: str, name: str) -> Any:
    """One line to a worker, one back. Raises the worker's refusal, or StoppedError when it has died."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        print(line, file=process.stdin, flush=True)
        answer = json.loads(process.stdout.readline() or "null")
    except BrokenPipeError:
        answer = None
    if answer is None:
        hint = "a code of -9 usually means that memory ran out: use a smaller --batch or a shorter --prompt-length"
        raise StoppedError(f"{name}: its process ended with code {process.wait()}", hint)
    if "error" in answer:
        kind: type[LlmpruneError] = RequestError if answer["code"] == RequestError.exit_code else StoppedError
        raise kind(f"{name}: {answer['error']}", answer["hint"])
    return answer["found"]


def _measured(worker: _Worker, laps: Sequence[Lap], peak: int | None) -> Figures:
    entrant, task = worker.entrant, worker.task
    return Figures(
        name=entrant.source.name,
        role=entrant.role,
        dtype=entrant.dtype,
        prefill=Spread.of([task.batch * task.prompt_length / lap.prefill for lap in laps]),
        decode=Spread.of([task.batch * task.new_tokens / lap.decode for lap in laps]),
        first_token=Spread.of([lap.first_token for lap in laps]),
        peak_memory=peak,
        kv_cache=laps[0].kv_cache_bytes,
        parameters=worker.facts["parameters"],
        disk=entrant.source.bytes,
    )


def _spreads(kernel: dict[str, Any]) -> dict[str, Any]:
    """A Kernel's fields, back from JSON."""
    return kernel | {side: kernel[side] and Spread(**kernel[side]) for side in ("dense", "sparse")}


def _setting(task: Task, repeat: int, threads: int) -> Setting:
    device = torch.device(task.device)
    return Setting(
        prompt_length=task.prompt_length,
        new_tokens=task.new_tokens,
        batch=task.batch,
        repeat=repeat,
        device=task.device,
        card=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        threads=threads,
        compile=task.compiled,
        llmprune=llmprune.__version__,
        torch=version("torch"),
        transformers=version("transformers"),
    )
