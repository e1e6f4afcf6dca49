"""The Python face: ``prune`` a checkpoint or a live model, ``evaluate`` it (``evaluate_tasks`` by lm-eval), ``load`` a result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune.benchmark.worker import Task
from llmprune.benchmark.worker import load as load_whole
from llmprune.checkpoint.manifest import check_source
from llmprune.checkpoint.resolve import open_source
from llmprune.data.tokenizer import load_tokenizer
from llmprune.data.windows import RunData, read_windows
from llmprune.engine import prune as prune_stream
from llmprune.errors import RequestError
from llmprune.evaluation.harness import find_tasks, run_tasks
from llmprune.evaluation.perplexity import perplexity
from llmprune.export.live import slice_model
from llmprune.export.save import cuts, kept_layers
from llmprune.model.matrices import Selection
from llmprune.model.skeleton import count_parameters
from llmprune.pruners.coarse import coarse_blocks
from llmprune.pruners.units import graded
from llmprune.publish.hub import check_destination
from llmprune.publish.hub import push as publish
from llmprune.ratios.measured import dense_gradients, needs_of
from llmprune.ratios.trials import decide
from llmprune.recipe.named import COARSE
from llmprune.recipe.reading import read_recipe
from llmprune.recipe.recipe import Recipe
from llmprune.report.result import Report
from llmprune.results import Origin, Perplexity, Polished, Pushed, TaskResult
from llmprune.run.job import Progress, quiet, run
from llmprune.run.planning import planned, with_budget, with_latency
from llmprune.run.preflight import check_ids, check_length, check_plan
from llmprune.run.prepare import describe, environment, open_stream, prepare
from llmprune.run.windows import DEFAULT_SAMPLES, default_length, given_windows
from llmprune.stream.devices import choose_device, choose_dtype
from llmprune.stream.live import LiveStream
from llmprune.stream.reshaped import Reshaped
from llmprune.structured.structure import Structure


def prune(
    model: str | PathLike[str] | nn.Module,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    calibration: str | Tensor | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    restart: bool = False,
    public: bool = False,
    existing: bool = False,
    on_progress: Progress = quiet,
    **options: Any,
) -> Report:
    """Prune a checkpoint into a folder, or a live model in place. Of a live model and a structured pattern the report's ``model`` is the smaller
    one; the model itself keeps its shape, with zeros (but not for layers and experts).

    model: alias, folder, Hub id, or a transformers causal LM in memory. calibration: data as on the command line, or token ids [N, L].
    tokenizer: for a live model that is calibrated on text. public, existing: of the repository, with ``push="me/name"``. on_progress: called with
    (step, done, total) as the command line's bars are. options: every other field of a recipe (``llmprune.recipe.recipe.Recipe``); criterion may be a
    function of (weight_RC, stats), see ``llmprune.recipe.user_criterion``.
    Raises RequestError before any work when the request cannot be met, StoppedError when a run has to stop.
    """
    windows = calibration if isinstance(calibration, Tensor) else None
    values = options | {"pattern": pattern, "sparsity": sparsity}
    values |= {"calibration": calibration} if isinstance(calibration, str) else {}
    if isinstance(model, nn.Module):
        recipe = read_recipe(None, {"model": type(model).__name__} | values)
        return _prune_live(model, recipe, windows, tokenizer, on_progress)
    recipe = read_recipe(None, {"model": str(model)} | values)
    if recipe.push:
        check_destination(recipe.push, public, existing)
    report = run(prepare(recipe, windows, overwrite, restart), on_progress)
    if recipe.push:
        report.push(recipe.push, public=public, existing=existing)
    return report


def _prune_live(model: Any, recipe: Recipe, given: Tensor | None, tokenizer: Any, on_progress: Progress) -> Report:
    if recipe.push:
        raise RequestError("a live model has no output folder to push", "prune its checkpoint instead, with output=...")
    if recipe.rotate:
        raise RequestError("a rotated residual stream of a live model", "prune its checkpoint instead, with output=...")
    with _as_for_inference(model):
        stream = LiveStream(model)
        plan, matrices = planned(recipe, stream, Selection(recipe.skip, recipe.only))
        plan = with_budget(recipe, plan, stream, matrices)
        check_plan(plan, stream, matrices, model.dtype)
        data = _live_windows(model, recipe, given, tokenizer)
        ids_NL = data.calibration.ids_NL
        plan = with_latency(recipe, plan, stream, ids_NL, partial(on_progress, "latency"))
        gradients = dense_gradients(stream, ids_NL, graded(stream, matrices, plan), needs_of(plan), partial(on_progress, "gradients"))
        decision = decide(stream, data.calibration, data.held, plan, matrices, gradients, recipe.max_ppl_increase, progress=on_progress)
        plan = replace(plan, sparsity=decision.sparsity)
        polished: list[Polished] = []
        on_polish = lambda done, hashes: polished.append(done)  # noqa: E731
        on_block = lambda index, done, hashes: on_progress("prune", index + 1, len(matrices))  # noqa: E731
        structure = plan.pattern if isinstance(plan.pattern, Structure) else None
        shown = Reshaped(stream, structure) if structure else None
        if shown is not None and structure is not None and structure.name in COARSE:
            criterion, steps, asked = recipe.parts.criterion, partial(on_progress, structure.name), decision.ratios.asked
            blocks = coarse_blocks(shown, structure, plan, matrices, ids_NL, criterion, asked, gradients, on_block=on_block, progress=steps)
        else:
            asked, steps = decision.ratios.asked, partial(on_progress, "polish")
            blocks = prune_stream(stream, ids_NL, plan, matrices, gradients, asked, None, {}, on_block, on_polish, steps)
    smaller = None
    if shown is not None and structure is not None:
        smaller = slice_model(model, cuts(structure, blocks, recipe.pad), kept_layers(shown))
    return Report(
        recipe=recipe.resolved(),
        source=Origin(type(model).__name__, None, {}),
        calibration=describe(data.calibration),
        blocks=tuple(blocks),
        perplexity=(),
        parameters=count_parameters(model),
        model=smaller,
        polish=polished[0] if polished else None,
        asked=decision.sparsity,
        reasons=decision.ratios.reasons,
        tried=decision.ratios.tried,
        frontier=decision.frontier,
        environment=environment(model.device, model.dtype, block_by_block=False),
    )


def _live_windows(model: Any, recipe: Recipe, given: Tensor | None, tokenizer: Any) -> RunData:
    length = given.shape[1] if given is not None else recipe.sequence_length or default_length("", model.config)
    check_length(length, model.config)
    if given is None:
        if tokenizer is None or recipe.calibration is None:
            raise RequestError(
                "a live model needs calibration token ids, or a text and its tokenizer", "calibration=ids, or calibration=..., tokenizer=..."
            )
        samples = recipe.samples or DEFAULT_SAMPLES
        draw = recipe.seed if recipe.shuffle else None
        given = read_windows(recipe.calibration, "calibration", tokenizer, length, samples, draw=draw).first(samples).ids_NL
    data = given_windows(recipe, given)
    check_ids(data.calibration, model)
    return data


@contextmanager
def _as_for_inference(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients, with one product an expert so that each can be watched; all as before afterwards."""
    experts, modes = model.config._experts_implementation, {module: module.training for module in model.modules()}
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.set_experts_implementation(experts)
        model.train(modes[model])
        for module, training in modes.items():  # some may be frozen in evaluation mode
            module.training = training


def evaluate(
    model: str | PathLike[str],
    data: str | list[str],
    *,
    window: int | None = None,
    samples: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    on_progress: Progress = quiet,
) -> list[Perplexity]:
    """Perplexity of a checkpoint on each data set, one block in memory at a time.

    window: tokens of a window. samples: the first so many windows instead of all. on_progress: called with (step, done, total).
    Raises RequestError when something cannot be read.
    """
    source = open_source(str(model), revision)
    chosen = choose_device(device)
    stream = open_stream(source, choose_dtype(dtype, chosen, source), chosen)
    length = window or default_length(str(model), stream.skeleton.config)
    check_length(length, stream.skeleton.config)
    tokenizer = load_tokenizer(source.folder)
    source.scan()
    check_source(source)
    found = []
    for spec in [data] if isinstance(data, str) else data:
        windows = read_windows(spec, "evaluation", tokenizer, length, samples)
        windows = windows.first(samples) if samples else windows
        check_ids(windows, stream.skeleton)
        found.append(perplexity(stream, windows, lambda d, t: on_progress("perplexity", d, t)))
    return found


def evaluate_tasks(
    model: str | PathLike[str],
    tasks: str | list[str],
    *,
    task_dir: str | PathLike[str] | None = None,
    samples: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[TaskResult]:
    """What lm-eval says of a checkpoint, loaded whole by plain transformers. It needs the extra ``eval``.

    task_dir: a folder of task files, which are then the only ones. samples: the first so many questions of each task. Raises RequestError.
    """
    names = [tasks] if isinstance(tasks, str) else tasks
    manager = find_tasks(names, None if task_dir is None else Path(task_dir).expanduser())
    source = open_source(str(model), revision)
    chosen = choose_device(device)
    dtype = str(choose_dtype(dtype, chosen, source)).removeprefix("torch.")
    loaded = load_whole(Task(str(source.folder), dtype, str(chosen), 0, 0, 1, trust_remote_code=trust_remote_code))
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    return run_tasks(loaded, tokenizer, manager, names, samples)


def load(folder: str | PathLike[str], **options: Any) -> Any:
    """(model, tokenizer) of a result, by plain transformers. options go to ``from_pretrained``."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise RequestError(f"{path.name}: holds no model", "give the output folder of a run")
    return AutoModelForCausalLM.from_pretrained(path, **options), AutoTokenizer.from_pretrained(path)


def push(result: Report | str | PathLike[str], repo: str, *, public: bool = False, existing: bool = False, dry_run: bool = False) -> Pushed:
    """Publish the output of a run on the Hub, private unless ``public``; see ``llmprune.publish.hub.push``.

    result: a report, or an output folder. Raises RequestError for a live model's report, which has no folder.
    """
    folder = result.output if isinstance(result, Report) else Path(result)
    if folder is None:
        raise RequestError("a live model has no output folder to push", "prune its checkpoint instead, with output=...")
    return publish(folder, repo, public=public, existing=existing, dry_run=dry_run)
