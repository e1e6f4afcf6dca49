"""The token windows of a run: which text, how many, how long, and which of them are held back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from llmprune.checkpoint.resolve import is_bundled
from llmprune.checkpoint.source import Source
from llmprune.data.tokenizer import load_tokenizer
from llmprune.data.windows import RunData, Windows, read_windows
from llmprune.errors import RequestError
from llmprune.recipe.recipe import Recipe
from llmprune.run.preflight import check_length
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.whole import WholeStream

DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 2048
BUNDLED_LENGTH = 256
HELD_BACK = 32  # windows of the calibration source kept for evaluation when nothing else is asked for


def gather_windows(recipe: Recipe, source: Source, stream: CheckpointStream | WholeStream, given: Tensor | None) -> RunData:
    """The windows of a run, as the recipe and its defaults say."""
    length = given.shape[1] if given is not None else recipe.sequence_length or default_length(recipe.model, stream.skeleton.config)
    check_length(length, stream.skeleton.config)
    if given is not None and not recipe.eval:
        return given_windows(recipe, given)
    tokenizer = load_tokenizer(source.folder)
    evaluation = tuple(read_windows(spec, "evaluation", tokenizer, length, None, recipe.seed) for spec in evaluation_sets(recipe))
    if given is not None:
        return replace(given_windows(recipe, given), evaluation=evaluation)
    samples = recipe.samples or DEFAULT_SAMPLES
    spec = recipe.calibration or ("bundled-calibration" if is_bundled(recipe.model) else "c4")
    windows = read_windows(spec, "calibration", tokenizer, length, samples + 2 * HELD_BACK, recipe.seed)
    if recipe.shuffle:
        windows = windows.shuffled(recipe.seed)
    have = len(windows.ids_NL)
    if recipe.samples and have < recipe.samples:
        raise RequestError(f"{windows.dataset}: {have} windows of {length}, {recipe.samples} asked for", "give more text, or smaller --samples")
    held = None
    if recipe.makes_trials:
        windows, held = windows.held_back(HELD_BACK)
        have = len(windows.ids_NL)
    if not evaluation:
        spare = have - recipe.samples if recipe.samples and have >= recipe.samples else max(have - samples, have // 8)
        samples = min(samples, have - min(spare, HELD_BACK))
        evaluation = (windows.after(samples).first(HELD_BACK),) if have > samples else ()
    return RunData(windows.first(samples), evaluation, held)


def given_windows(recipe: Recipe, ids_NL: Tensor) -> RunData:
    windows, held = Windows(ids_NL.cpu(), "given token ids", "all"), None
    if recipe.makes_trials:
        windows, held = windows.held_back(HELD_BACK)
    return RunData(windows, (), held)


def evaluation_sets(recipe: Recipe) -> list[str]:
    return recipe.eval or (["bundled-evaluation"] if is_bundled(recipe.model) else [])


def default_length(model: str, config: Any) -> int:
    if is_bundled(model):
        return BUNDLED_LENGTH
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or DEFAULT_LENGTH
    return min(DEFAULT_LENGTH, positions)
