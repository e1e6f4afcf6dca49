"""The Python face: ``prune`` a checkpoint or a live model, ``evaluate`` it (``evaluate_tasks`` by lm-eval), ``load`` a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
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
from llmprune.data.given import in_memory, taken
from llmprune.data.reading import windows_of
from llmprune.data.sources import TextSource, find_source
from llmprune.data.tokenizer import load_tokenizer
from llmprune.data.windows import Windows
from llmprune.errors import RequestError
from llmprune.evaluation.answers import TaskResult
from llmprune.evaluation.harness import find_tasks, run_tasks
from llmprune.evaluation.perplexity import perplexity
from llmprune.evaluation.replay import check_replay
from llmprune.model.kinds import begins_with_bos, check_live
from llmprune.model.wrappers import auto_class, check_text
from llmprune.publish.hub import check_destination
from llmprune.publish.hub import push as publish
from llmprune.recipe.keywords import PruneOptions, documented, of_recipe, plain, recipe_values
from llmprune.recipe.reading import read_recipe
from llmprune.recipe.recipe import Recipe
from llmprune.report.bars import bars
from llmprune.report.result import Report
from llmprune.results import Perplexity, Pushed
from llmprune.run.live import as_for_inference, prune_live
from llmprune.run.live_result import check_place, save_live
from llmprune.run.preflight import check_ids, check_length
from llmprune.run.prepare import open_stream, scan
from llmprune.run.recovered import run_recovery
from llmprune.run.recovery import prepare_recovery
from llmprune.run.rounds import prepare_pruning, runner
from llmprune.run.windows import DEFAULT_SAMPLES, HELD_BACK, Given, default_length
from llmprune.stream.devices import choose_device, choose_dtype
from llmprune.stream.live import LiveStream
from llmprune.stream.stream import Stream
from llmprune.training.data import HELD_BACK as DECIDING
from llmprune.training.request import Request
from llmprune.types import Listener

Progress: TypeAlias = Callable[[str, int, int], None]  # (step, done, total)


@documented(PruneOptions, *of_recipe())
def prune(
    model: str | PathLike[str] | nn.Module,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    calibration: Any = None,
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

    model: alias, folder, Hub id, or a transformers causal LM in memory. calibration: data as on the command line, or in memory: a list of texts or
    dialogues, a ``datasets`` data set, an iterator of either, token ids [N, L] as tensor or array, or a DataLoader of them; eval likewise, or a list.
    tokenizer: for a live model that reads text, and saved with it where ``output`` is given; its processor for text with pictures. overwrite,
    restart: of the output folder. public, existing: of the repository, with ``push="me/name"``. on_progress: called with (step, done, total); by
    default a terminal or a notebook shows bars, unless transformers' are switched off. criterion may be a function of (weight_RC, stats), see
    ``llmprune.recipe.user_methods``.
    Raises RequestError before any work when the request cannot be met, StoppedError when a run has to stop.
    """
    measured = in_memory(as_text(options.pop("eval", None)))
    values = recipe_values(options) | {"pattern": plain("pattern", pattern), "sparsity": plain("sparsity", sparsity)}
    calibration, live = as_text(calibration), isinstance(model, nn.Module)
    named_data = calibration is None or isinstance(calibration, str)
    values |= {"eval": [one for one in measured if isinstance(one, str)]} | ({"calibration": calibration} if named_data else {})
    others = [one for one in measured if not isinstance(one, str)]
    recipe = read_recipe(None, {"model": type(model).__name__ if live else named(model)} | values)
    windows = None if named_data else taken(calibration, "calibration", streamed(recipe), recipe.shuffle)
    seen = tuple(taken(one, "eval", streamed(recipe, recipe.eval_samples)) for one in others)
    reads = [*recipe.eval, *(one for one in (windows, *seen) if not isinstance(one, Tensor))]
    if tokenizer is not None and not (live and (reads or recipe.output)):
        raise RequestError("a tokenizer with token ids or a checkpoint", "it is for a model in memory that reads text, or is saved with it; omit it")
    if isinstance(model, nn.Module):
        if restart or public or existing:
            raise RequestError("restart, public or existing with a model in memory", "it is pruned at once, and pushed from its folder; omit them")
        with listening(on_progress) as listen:
            return in_place(model, recipe, windows, seen, tokenizer, overwrite, listen)
    if recipe.push:
        check_destination(recipe.push, public, existing)
    job = prepare_pruning(recipe, windows, overwrite, restart, seen)
    with listening(on_progress) as listen:
        report = runner(job)(job, listen)
    if recipe.push:
        report.push(recipe.push, public=public, existing=existing)
    return report


def in_place(
    model: nn.Module, recipe: Recipe, windows: Given, seen: Sequence[TextSource | Tensor], tokenizer: Any, overwrite: bool, listen: Listener
) -> Report:
    """Prune a model in memory, and save it where the recipe has an output. Raises RequestError."""
    if overwrite and recipe.output is None:
        raise RequestError("overwrite without output, with a model in memory", "add output=..., or omit it")
    if recipe.output is not None:
        check_place(Path(recipe.output).expanduser(), check_live(model), overwrite)
    report = prune_live(model, recipe, windows, tokenizer, listen, seen)
    return report if recipe.output is None else replace(save(report, recipe.output, tokenizer, overwrite=overwrite), model=report.model)


def streamed(recipe: Recipe, asked: int | str | None = None) -> int | None:
    """How many windows are taken of a stream of token ids; None: all. asked: a number, or "all", instead of as many as a calibration takes."""
    if asked is not None:
        return asked if isinstance(asked, int) else None
    return (recipe.samples or DEFAULT_SAMPLES) + (HELD_BACK if recipe.makes_trials else 0)


def recover(
    folder: str | PathLike[str],
    data: Any,
    *,
    overwrite: bool = False,
    restart: bool = False,
    on_progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Train the kept weights of a result, whose zeros stay; the report's ``recovered`` says what that did.

    folder: output of a run. data: texts, dialogues or a data set to train on, by name or in memory as ``prune`` takes them. options: every other
    field of ``llmprune.training.request.Request``, the command line's options by the same names, and arguments={...} and callbacks=[...] of
    transformers' Trainer.
    Raises RequestError before any training when the request cannot be met, StoppedError when it has to stop.
    """
    unknown = [name for name in options if name not in Request.__dataclass_fields__]
    if unknown:
        raise RequestError(f"recover takes no {unknown[0]!r}", f"there are: {', '.join(Request.__dataclass_fields__)}")
    asked = Request(fspath(folder), as_text(data), **{name: as_text(value) for name, value in options.items()})
    if not isinstance(asked.data, str):
        asked = replace(asked, data=taken(asked.data, "data", asked.steps * asked.batch + DECIDING))
    job = prepare_recovery(asked, overwrite, restart)
    with listening(on_progress) as listen:
        return run_recovery(job, listen)


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


def listening(on_progress: Progress | None) -> AbstractContextManager[Listener]:
    """Who hears of the progress: by default bars, where somebody looks."""
    return bars() if on_progress is None else nullcontext(Listener(progress=on_progress))


def evaluate(
    model: str | PathLike[str] | nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    window: int | None = None,
    samples: int | None = None,
    column: str | None = None,
    split: str | None = None,
    bos: bool | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    on_progress: Progress | None = None,
) -> list[Perplexity]:
    """Perplexity of a checkpoint, one block in memory at a time, or of a live model, on each data set.

    data: as on the command line, or in memory as ``prune`` takes them; or a list of such. tokenizer: of a live model. window: tokens of a window.
    samples: the first so many windows instead of all. column, split: of the data sets. bos: whether windows begin with BOS; by default as the model
    was trained. device, dtype, revision: of a checkpoint. on_progress: called with (step, done, total). Raises RequestError when something cannot be
    read.
    """
    where, kind = str(plain("device", device)), str(plain("dtype", dtype))
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise RequestError("a live model without its tokenizer", "add tokenizer=...")
        if (where, kind, revision) != ("auto", "auto", None):
            raise RequestError("device, dtype or revision with a model in memory", "it is measured as it is; omit them")
        with as_for_inference(check_live(model)) as live:
            check_text(live)
            with listening(on_progress) as listen:
                return measured_on(LiveStream(live), "", Measured(tokenizer, data, window, samples, column, split, bos), listen)
    if tokenizer is not None:
        raise RequestError("a tokenizer with a checkpoint, which has its own", "omit it")
    source = open_source(named(model), revision)
    chosen = choose_device(where)
    stream = open_stream(source, choose_dtype(kind, chosen, source), chosen)
    asked = Measured(load_tokenizer(source.folder), data, window, samples, column, split, bos)
    check_length(window or default_length(named(model), stream.skeleton.config), stream.skeleton.config)
    scan(source, stream)
    check_source(source)
    with listening(on_progress) as listen:
        return measured_on(stream, named(model), asked, listen)


@dataclass(frozen=True)
class Measured:
    """What a perplexity is measured on."""

    tokenizer: Any
    data: Any
    window: int | None
    samples: int | None
    column: str | None
    split: str | None
    bos: bool | None

    def windows(self, name: str, config: Any) -> Iterator[Windows]:
        """Those of each data set. name: of the model. Raises RequestError."""
        length = self.window or default_length(name, config)
        begins = begins_with_bos(config) if self.bos is None else self.bos
        for one in in_memory(as_text(self.data)):
            text = find_source(one, "evaluation", self.column, self.split) if isinstance(one, str) else taken(one, "data", self.samples)
            if isinstance(text, TextSource):
                found = windows_of(text, self.tokenizer, length, self.samples, bos=begins)
            else:
                found = Windows(text, "given token ids", "all")
            check_length(found.ids_NL.shape[1], config)
            yield found.first(self.samples) if self.samples else found


def measured_on(stream: Stream, name: str, asked: Measured, listen: Listener) -> list[Perplexity]:
    """Of the model as the stream holds it. Raises RequestError."""
    model = stream.walk.model
    found: list[Perplexity] = []
    for windows in asked.windows(name, model.config):
        check_ids(windows, model)
        if not found:
            check_replay(stream, windows.ids_NL[:1])
        found.append(perplexity(stream, windows, listen))
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
        raise RequestError("a live model has no output folder to push", "save it first: report.save(DIR, tokenizer).push(REPO)")
    return publish(folder, repo, public=public, existing=existing, dry_run=dry_run)
