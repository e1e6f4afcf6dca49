"""The Python face: ``prune`` a checkpoint or a live model, ``evaluate`` it (``evaluate_tasks`` by lm-eval), ``load`` a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeAlias, Unpack

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from llmprune.benchmark.worker import Task
from llmprune.benchmark.worker import load as load_whole
from llmprune.checkpoint.manifest import check_source
from llmprune.checkpoint.resolve import open_source
from llmprune.data.tokenizer import load_tokenizer
from llmprune.data.windows import read_windows
from llmprune.errors import RequestError
from llmprune.evaluation.harness import find_tasks, run_tasks
from llmprune.evaluation.perplexity import perplexity
from llmprune.evaluation.replay import check_replay
from llmprune.model.kinds import check_live
from llmprune.model.wrappers import auto_class, check_text
from llmprune.publish.hub import check_destination
from llmprune.publish.hub import push as publish
from llmprune.recipe.keywords import PruneOptions, documented, of_recipe, plain, recipe_values
from llmprune.recipe.reading import read_recipe
from llmprune.report.result import Report
from llmprune.results import Perplexity, Pushed, TaskResult
from llmprune.run.live import as_for_inference, prune_live
from llmprune.run.live_result import check_place, save_live
from llmprune.run.preflight import check_ids, check_length
from llmprune.run.prepare import open_stream, scan
from llmprune.run.recovered import run_recovery
from llmprune.run.recovery import prepare_recovery
from llmprune.run.rounds import prepare_pruning, runner
from llmprune.run.windows import default_length
from llmprune.stream.devices import choose_device, choose_dtype
from llmprune.stream.live import LiveStream
from llmprune.stream.stream import Stream
from llmprune.training.request import Request
from llmprune.types import SILENT, Listener

Progress: TypeAlias = Callable[[str, int, int], None]  # (step, done, total)


@documented(PruneOptions, *of_recipe())
def prune(
    model: str | PathLike[str] | nn.Module,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    calibration: str | PathLike[str] | Tensor | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    restart: bool = False,
    public: bool = False,
    existing: bool = False,
    on_progress: Progress | None = None,
    **options: Unpack[PruneOptions],
) -> Report:
    """Prune a checkpoint into a folder, or a live model in place. Of a live model and a structured pattern the report's ``model`` is the smaller
    one; the model itself keeps its shape, with zeros (except for layers and experts; solver refit scales experts in place).

    model: alias, folder, Hub id, or a transformers causal LM in memory. calibration: data as on the command line, or token ids [N, L].
    tokenizer: for a live model that is calibrated on text, and saved with it where ``output`` is given; its processor for text with pictures.
    overwrite, restart: of the output folder. public, existing: of the repository, with ``push="me/name"``. on_progress: called with (step, done,
    total) as the command line's bars are. criterion may be a function of (weight_RC, stats), see ``llmprune.recipe.user_methods``.
    Raises RequestError before any work when the request cannot be met, StoppedError when a run has to stop.
    """
    calibration = as_text(calibration)
    if not isinstance(calibration, str | Tensor | None):
        raise RequestError(
            f"calibration: {type(calibration).__name__}", "give the name of a data set or file, or a tensor of token ids [windows, length]"
        )
    windows = calibration if isinstance(calibration, Tensor) else None
    if tokenizer is not None and (windows is not None or not isinstance(model, nn.Module)):
        raise RequestError("a tokenizer with token ids or a checkpoint", "it is for a model in memory that is calibrated on text; omit it")
    values = recipe_values(options) | {"pattern": plain("pattern", pattern), "sparsity": plain("sparsity", sparsity)}
    values |= {"calibration": calibration} if isinstance(calibration, str) else {}
    listen = listener(on_progress)
    if isinstance(model, nn.Module):
        if restart or public or existing:
            raise RequestError("restart, public or existing with a model in memory", "it is pruned at once, and pushed from its folder; omit them")
        recipe = read_recipe(None, {"model": type(model).__name__} | values)
        if overwrite and recipe.output is None:
            raise RequestError("overwrite without output, with a model in memory", "add output=..., or omit it")
        if recipe.output is not None:
            check_place(Path(recipe.output).expanduser(), check_live(model), overwrite)
        report = prune_live(model, recipe, windows, tokenizer, listen)
        return report if recipe.output is None else replace(save(report, recipe.output, tokenizer, overwrite=overwrite), model=report.model)
    recipe = read_recipe(None, {"model": named(model)} | values)
    if recipe.push:
        check_destination(recipe.push, public, existing)
    job = prepare_pruning(recipe, windows, overwrite, restart)
    report = runner(job)(job, listen)
    if recipe.push:
        report.push(recipe.push, public=public, existing=existing)
    return report


def recover(
    folder: str | PathLike[str],
    data: str | PathLike[str],
    *,
    overwrite: bool = False,
    restart: bool = False,
    on_progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Train the kept weights of a result, whose zeros stay; the report's ``recovered`` says what that did.

    folder: output of a run. data: a text, dialogues or a data set to train on. options: every other field of ``llmprune.training.request.Request``,
    the command line's options by the same names, and arguments={...} and callbacks=[...] of transformers' Trainer.
    Raises RequestError before any training when the request cannot be met, StoppedError when it has to stop.
    """
    unknown = [name for name in options if name not in Request.__dataclass_fields__]
    if unknown:
        raise RequestError(f"recover takes no {unknown[0]!r}", f"there are: {', '.join(Request.__dataclass_fields__)}")
    asked = Request(fspath(folder), as_text(data), **{name: as_text(value) for name, value in options.items()})
    return run_recovery(prepare_recovery(asked, overwrite, restart), listener(on_progress))


def named(model: Any) -> str:
    """Raises RequestError for anything else than a name or a path."""
    if not isinstance(model, str | PathLike):
        raise RequestError(f"model: {type(model).__name__}", "give a folder, a Hub id, an alias, or a transformers causal language model")
    return fspath(model)


def save(report: Report, folder: str | PathLike[str], tokenizer: Any = None, *, overwrite: bool = False) -> Report:
    """Save a model that was pruned in memory, as it is now, as a result: weights, llmprune.json, card, page. Returns the report of the folder.

    report: of ``prune`` with a live model. tokenizer: saved beside it, or a processor. Raises RequestError for another report, and where the output
    cannot be written; PromiseError where the saved model, loaded again, predicts otherwise.
    """
    return save_live(report, folder, tokenizer, overwrite)


def as_text(value: Any) -> Any:
    """Paths, also those in a list, as strings; anything else as it is."""
    if isinstance(value, list | tuple):
        return [as_text(one) for one in value]
    return fspath(value) if isinstance(value, PathLike) else value


def listener(on_progress: Progress | None) -> Listener:
    return SILENT if on_progress is None else Listener(progress=on_progress)


def evaluate(
    model: str | PathLike[str] | nn.Module,
    data: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    tokenizer: Any = None,
    window: int | None = None,
    samples: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    on_progress: Progress | None = None,
) -> list[Perplexity]:
    """Perplexity of a checkpoint, one block in memory at a time, or of a live model, on each data set.

    tokenizer: of a live model. window: tokens of a window. samples: the first so many windows instead of all. device, dtype, revision: of a
    checkpoint. on_progress: called with (step, done, total). Raises RequestError when something cannot be read.
    """
    where, kind = str(plain("device", device)), str(plain("dtype", dtype))
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise RequestError("a live model without its tokenizer", "add tokenizer=...")
        if (where, kind, revision) != ("auto", "auto", None):
            raise RequestError("device, dtype or revision with a model in memory", "it is measured as it is; omit them")
        with as_for_inference(check_live(model)) as live:
            check_text(live)
            length = window or default_length("", live.config)
            check_length(length, live.config)
            return measured(LiveStream(live), tokenizer, data, length, samples, on_progress)
    if tokenizer is not None:
        raise RequestError("a tokenizer with a checkpoint, which has its own", "omit it")
    source = open_source(named(model), revision)
    chosen = choose_device(where)
    stream = open_stream(source, choose_dtype(kind, chosen, source), chosen)
    length = window or default_length(named(model), stream.skeleton.config)
    check_length(length, stream.skeleton.config)
    scan(source, stream)
    check_source(source)
    return measured(stream, load_tokenizer(source.folder), data, length, samples, on_progress)


def measured(
    stream: Stream,
    tokenizer: Any,
    data: str | PathLike[str] | Sequence[str | PathLike[str]],
    length: int,
    samples: int | None,
    on_progress: Progress | None,
) -> list[Perplexity]:
    """Of the model as the stream holds it. Raises RequestError."""
    model = stream.walk.model
    found: list[Perplexity] = []
    for spec in [data] if isinstance(data, str | PathLike) else data:
        windows = read_windows(fspath(spec), "evaluation", tokenizer, length, samples)
        windows = windows.first(samples) if samples else windows
        check_ids(windows, model)
        if not found:
            check_replay(stream, windows.ids_NL[:1])
        found.append(perplexity(stream, windows, listener(on_progress)))
    return found


def evaluate_tasks(
    model: str | PathLike[str],
    tasks: str | list[str],
    *,
    task_dir: str | PathLike[str] | None = None,
    samples: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[TaskResult]:
    """lm-eval's results for a checkpoint, loaded whole by plain transformers. It needs the extra ``eval``.

    task_dir: a folder of task files, which are then the only ones. samples: the first so many questions of each task. Raises RequestError.
    """
    names = [tasks] if isinstance(tasks, str) else tasks
    manager = find_tasks(names, None if task_dir is None else Path(task_dir).expanduser())
    source = open_source(named(model), revision)
    chosen = choose_device(plain("device", device))
    dtype = str(choose_dtype(plain("dtype", dtype), chosen, source)).removeprefix("torch.")
    loaded = load_whole(Task(str(source.folder), dtype, str(chosen), 0, 0, 1, trust_remote_code=trust_remote_code))
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    return run_tasks(loaded, tokenizer, manager, names, samples)


def load(folder: str | PathLike[str], **options: Any) -> Any:
    """(model, tokenizer) of a result, by plain transformers. options go to ``from_pretrained``; layers of different sizes need
    ``trust_remote_code=True``, without which no code beside the weights is run. Raises RequestError for a folder without a model.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise RequestError(f"{path.name}: contains no model", "give the output folder of a run")
    trust = {"trust_remote_code": bool(options.pop("trust_remote_code", False))}  # None would ask, and take a pipe's answer
    auto = auto_class(AutoConfig.from_pretrained(path, **trust).model_type)
    return auto.from_pretrained(path, **trust, **options), AutoTokenizer.from_pretrained(path, **trust)


def push(result: Report | str | PathLike[str], repo: str, *, public: bool = False, existing: bool = False, dry_run: bool = False) -> Pushed:
    """Publish the output of a run on the Hub, private unless ``public``; see ``llmprune.publish.hub.push``.

    result: a report, or an output folder. Raises RequestError for a live model's report, which has no folder.
    """
    folder = result.output if isinstance(result, Report) else Path(result).expanduser()
    if folder is None:
        raise RequestError("a live model has no output folder to push", "prune its checkpoint instead, with output=...")
    return publish(folder, repo, public=public, existing=existing, dry_run=dry_run)
