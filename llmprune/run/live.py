"""A run on a model in memory: pruned in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.data.pictures import is_processor, picture_windows
from llmprune.data.reading import windows_of
from llmprune.data.sources import TextSource, find_source
from llmprune.data.windows import RunData, Windows
from llmprune.errors import RequestError
from llmprune.evaluation.beside import dense_passes, pruned_pass
from llmprune.evaluation.replay import check_replay
from llmprune.export.check import MOST_TOKENS
from llmprune.export.live import sliced_with_export
from llmprune.export.save import cuts, kept_layers
from llmprune.model.kinds import check_live
from llmprune.model.matrices import Selection
from llmprune.model.skeleton import count_parameters
from llmprune.model.wrappers import check_text
from llmprune.pruners.plan import Work
from llmprune.recipe.recipe import Recipe
from llmprune.report.result import Report
from llmprune.results import BlockReport, Evaluation, Origin, Polished
from llmprune.run.live_result import Unsaved
from llmprune.run.planning import planned, with_budget
from llmprune.run.preflight import check_ids, check_length, check_plan
from llmprune.run.prepare import describe, environment, towers_of
from llmprune.run.steps import Forgetful, decided, prune_blocks, with_gradients
from llmprune.run.windows import (
    DEFAULT_SAMPLES,
    HELD_BACK,
    Given,
    Texts,
    calibration_source,
    check_given,
    default_length,
    evaluated,
    given_windows,
    measured_windows,
    refuse_columns,
    shared_out,
    shows_pictures,
    starts_with_bos,
)
from llmprune.stream.live import LiveStream
from llmprune.stream.reshaped import Reshaped
from llmprune.stream.stream import Stream
from llmprune.types import Listener

# options that a model in memory cannot obey
OF_A_CHECKPOINT = ("push", "write_sample", "rotate", "device", "dtype", "revision", "rounds")


def prune_live(
    model: nn.Module, recipe: Recipe, given: Given, tokenizer: Any, listen: Listener, measured: Sequence[TextSource | Tensor] = ()
) -> Report:
    """Prune a transformers model in place. given: texts in memory, or token ids [N, L]; tokenizer: of a model that reads text; measured: to evaluate
    on, besides what the recipe names.

    Raises RequestError for options that a model in memory cannot obey, and as the run of a checkpoint does.
    """
    check_options(recipe)
    model = check_live(model)
    check_text(model)
    with as_for_inference(model):
        stream = LiveStream(model)
        plan, matrices = planned(recipe, stream, Selection(recipe.skip, recipe.only))
        plan = with_budget(recipe, plan, stream, matrices)
        check_plan(plan, stream, matrices, model.dtype)
        data, records = live_windows(stream, recipe, given, tokenizer, measured), Forgetful()
        stream.walk.pictures = data.pictures
        check_replay(stream, data.calibration.ids_NL[:1])
        dense = dense_passes(stream, data.evaluation, len(stream.names) in matrices, records, listen)
        work = with_gradients(Work(stream, data.calibration.ids_NL, plan, matrices), listen)
        decision = decided(recipe, work, data, records, listen)
        polished: list[Polished] = []
        hearing = replace(
            listen,
            on_block=lambda index, report, hashes: listen.progress("prune", index + 1, len(matrices)),
            on_polish=lambda done, hashes: polished.append(done),
        )
        blocks, shown = prune_blocks(recipe, work, decision, records, hearing)
        found = tuple(Evaluation(d.perplexity, *pruned_pass(d, shown, listen)) for d in dense)
    unsaved = as_pruned(model, recipe, data.text(MOST_TOKENS), shown, blocks)
    return Report(
        recipe=recipe.resolved(),
        source=Origin(type(model).__name__, None, {}, towers=towers_of(stream)),
        calibration=describe(data.calibration),
        blocks=tuple(blocks),
        perplexity=found,
        parameters=count_parameters(model),
        model=unsaved.model if unsaved.exported else None,
        live=unsaved,
        polish=polished[0] if polished else None,
        asked=decision.sparsity,
        reasons=decision.ratios.reasons,
        tried=decision.ratios.tried,
        frontier=decision.frontier,
        environment=environment(model.device, model.dtype, block_by_block=False),
    )


def as_pruned(model: PreTrainedModel, recipe: Recipe, ids_1L: Tensor, shown: Stream, blocks: Sequence[BlockReport]) -> Unsaved:
    """The model in memory, or the smaller one that a structured pattern makes of it. shown: the stream of the model as pruned."""
    if not isinstance(shown, Reshaped):
        return Unsaved(model, recipe, ids_1L)
    kept, structure = kept_layers(shown), shown.structure
    smaller, exported = sliced_with_export(model, cuts(structure, blocks, recipe.pad), kept)
    return Unsaved(smaller, recipe, ids_1L, exported, structure.patterns, tuple(kept))


def check_options(recipe: Recipe) -> None:
    """Raises RequestError for options that are about a checkpoint."""
    asked = [name for name in OF_A_CHECKPOINT if getattr(recipe, name) != type(recipe).model_fields[name].get_default(call_default_factory=True)]
    if asked:
        raise RequestError(f"{asked[0]} with a model in memory", f"omit {asked[0]}, or prune the model's checkpoint, with output=...")


def live_windows(stream: LiveStream, recipe: Recipe, given: Given, tokenizer: Any, measured: Sequence[TextSource | Tensor]) -> RunData:
    """The windows of a run: token ids as given, or cut from texts. tokenizer: or the processor of a model that sees pictures."""
    model = stream.model
    evaluation = (*(find_source(spec, "evaluation") for spec in recipe.eval), *measured)
    texts = Texts(given if isinstance(given, Tensor) else live_source(recipe, given), evaluation, {})
    if texts.read and tokenizer is None:
        raise RequestError("a live model that is to read text, without its tokenizer", "add tokenizer=..., or give token ids")
    if isinstance(texts.calibration, Tensor):
        refuse_columns(recipe, "token ids")
        if recipe.bos is not None and not texts.read:
            raise RequestError("bos with token ids", "put it into the token ids, or omit it")
        check_given(recipe, texts.calibration)
    length = texts.calibration.shape[1] if isinstance(texts.calibration, Tensor) else recipe.sequence_length or default_length("", model.config)
    check_length(length, model.config)
    bos = starts_with_bos(recipe, model.config)
    if isinstance(texts.calibration, Tensor):
        data = given_windows(recipe, texts.calibration)
    else:
        wanted, draw = (recipe.samples or DEFAULT_SAMPLES) + 2 * HELD_BACK, recipe.seed if recipe.shuffle else None
        windows = text_or_pictures(texts.calibration, stream, tokenizer, length, wanted, draw, bos)
        data = shared_out(recipe, windows, bool(evaluation))
    limit, reader = evaluated(recipe, len(data.calibration), texts), tokenizer.tokenizer if is_processor(tokenizer) else tokenizer
    found = tuple(measured_windows(text, reader, length, limit, bos, recipe.eval_samples) for text in evaluation)
    for part in (data.calibration, *found):
        check_ids(part, model)
    return replace(data, evaluation=found or data.evaluation)


def live_source(recipe: Recipe, given: TextSource | None) -> TextSource:
    """The texts to calibrate on, which have no default here."""
    if given is None and recipe.calibration is None:
        raise RequestError(
            "a live model needs calibration token ids, or a text and its tokenizer", "calibration=ids, or calibration=..., tokenizer=..."
        )
    return calibration_source(recipe, given)


def text_or_pictures(source: TextSource, stream: LiveStream, reader: Any, length: int, samples: int, draw: int | None, bos: bool) -> Windows:
    """A source read by a tokenizer or, with its pictures, by a processor."""
    if not shows_pictures(source, stream):
        return windows_of(source, reader.tokenizer if is_processor(reader) else reader, length, samples, draw=draw, bos=bos)
    if not is_processor(reader):
        raise RequestError(
            f"{source.dataset}: has pictures, and tokenizer is a {type(reader).__name__}", "give the model's processor as tokenizer=..."
        )
    return picture_windows(source, reader, length, samples, draw)


@contextmanager
def as_for_inference(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Evaluation mode without gradients, with one product an expert so that each can be watched; all as before afterwards."""
    experts, modes = model.config._experts_implementation, {module: module.training for module in model.modules()}
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    model.set_experts_implementation("eager")
    try:
        yield model
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.set_experts_implementation(experts)
        model.train(modes[model])
        for module, training in modes.items():  # some may be frozen in evaluation mode
            module.training = training
