"""The token windows of a run: which text, how many, how long, and which of them are held back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.checkpoint.companions import processor_files, tokenizer_files
from llmprune.checkpoint.files import hash_file
from llmprune.checkpoint.resolve import is_bundled
from llmprune.checkpoint.source import Source
from llmprune.data.pictures import has_pictures, load_processor, picture_windows
from llmprune.data.sources import TextSource, find_source
from llmprune.data.tokenizer import load_tokenizer
from llmprune.data.windows import RunData, Windows, windows_of
from llmprune.errors import RequestError
from llmprune.model.kinds import longest_sequence
from llmprune.model.wrappers import is_wrapper
from llmprune.recipe.recipe import Recipe
from llmprune.run.preflight import check_length
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.stream import Stream
from llmprune.stream.whole import WholeStream

DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 2048
BUNDLED_LENGTH = 256
HELD_BACK = 32  # windows of the calibration source kept for evaluation when nothing else is asked for


@dataclass(frozen=True)
class Texts:
    """The texts that a run asks for, found but not read. calibration: None where token ids are given. identities: of everything that windows are
    made from, the texts and the tokenizer's files, by name; None where it is unknown.
    """

    calibration: TextSource | None
    evaluation: tuple[TextSource, ...]
    identities: dict[str, str | None]


def find_texts(recipe: Recipe, folder: Path, given: Tensor | None) -> Texts:
    """folder: of the model. Raises RequestError for a missing text."""
    spec = recipe.calibration or ("bundled-calibration" if is_bundled(recipe.model) else "c4")
    calibration = None if given is not None else find_source(spec, "calibration")
    evaluation = tuple(find_source(spec, "evaluation") for spec in (recipe.eval if given is not None else evaluation_sets(recipe)))
    identities = {f"calibration {calibration.dataset}": calibration.identity} if calibration else {}
    identities |= {f"evaluation {n}, {text.dataset}": text.identity for n, text in enumerate(evaluation, 1)}
    readers = (*tokenizer_files(folder), *processor_files(folder)) if identities else ()
    identities |= {f"tokenizer {path.name}": f"sha256 {hash_file(path)}" for path in readers}
    return Texts(calibration, evaluation, identities)


def gather_windows(recipe: Recipe, source: Source, stream: CheckpointStream | WholeStream, texts: Texts, given: Tensor | None) -> RunData:
    """The windows of a run, as the recipe and its defaults say."""
    if given is not None:
        check_given(recipe, given)
    length = given.shape[1] if given is not None else recipe.sequence_length or default_length(recipe.model, stream.skeleton.config)
    check_length(length, stream.skeleton.config)
    if given is not None and not texts.evaluation:
        return given_windows(recipe, given)
    tokenizer = load_tokenizer(source.folder)
    evaluation = tuple(windows_of(text, tokenizer, length, None) for text in texts.evaluation)
    if texts.calibration is None:
        assert given is not None
        return replace(given_windows(recipe, given), evaluation=evaluation, identities=texts.identities)
    samples = recipe.samples or DEFAULT_SAMPLES
    wanted, draw = samples + 2 * HELD_BACK, recipe.seed if recipe.shuffle else None
    if shows_pictures(texts.calibration, stream):
        windows = picture_windows(texts.calibration, load_processor(source.folder), length, wanted, draw)
    else:
        windows = windows_of(texts.calibration, tokenizer, length, wanted, draw=draw)
    have = len(windows.ids_NL)
    if recipe.samples and have < recipe.samples:
        raise RequestError(f"{windows.dataset}: {have} windows of {length}, {recipe.samples} asked for", "give more text, or smaller --samples")
    windows, held = divided(recipe, windows)
    have = len(windows.ids_NL)
    if not evaluation:
        spare = have - recipe.samples if recipe.samples and have >= recipe.samples else max(have - samples, have // 8)
        samples = min(samples, have - min(spare, HELD_BACK))
        evaluation = (windows.after(samples).first(HELD_BACK),) if have > samples else ()
    return RunData(windows.first(samples), evaluation, held, texts.identities)


def shows_pictures(source: TextSource, stream: Stream) -> bool:
    """Whether a data set has pictures, for a model that sees them. Raises RequestError where only its text decoder is at hand."""
    model = stream.walk.model
    if not stream.towers or not has_pictures(source):
        return False
    if not is_wrapper(model):
        raise RequestError(
            f"{source.dataset}: has pictures, and {type(model).__name__} leaves {', '.join(stream.towers)} behind", "give a data set of text alone"
        )
    return True


def divided(recipe: Recipe, windows: Windows) -> tuple[Windows, Windows | None]:
    """(what is calibrated on, what is held back for trials if the recipe makes any)."""
    return windows.held_back(HELD_BACK) if recipe.makes_trials else (windows, None)


def given_windows(recipe: Recipe, ids_NL: Tensor) -> RunData:
    """Token ids as they are given; ``shuffle`` and ``samples`` choose among them. Raises RequestError for fewer than ``samples``."""
    windows = Windows(ids_NL.cpu(), "given token ids", "all")
    windows, held = divided(recipe, windows.shuffled(recipe.seed) if recipe.shuffle else windows)
    have = len(windows.ids_NL)
    if recipe.samples and have < recipe.samples:
        raise RequestError(f"given token ids: {have} windows to calibrate on, {recipe.samples} asked for", "give more, or smaller samples")
    return RunData(windows.first(recipe.samples or have), (), held)


def check_given(recipe: Recipe, ids_NL: Tensor) -> None:
    """Raises RequestError for token ids that are not [windows, length] of whole numbers, or not of the length asked for."""
    if ids_NL.dim() != 2 or ids_NL.is_floating_point() or not ids_NL.numel():
        kind = f"{str(ids_NL.dtype).removeprefix('torch.')} of shape {list(ids_NL.shape)}"
        raise RequestError(f"calibration token ids: {kind}", "give whole numbers of shape [windows, length]")
    if recipe.sequence_length not in (None, ids_NL.shape[1]):
        raise RequestError(
            f"sequence_length {recipe.sequence_length} with token ids in windows of {ids_NL.shape[1]}", "cut them to that length, or omit it"
        )


def evaluation_sets(recipe: Recipe) -> list[str]:
    return recipe.eval or (["bundled-evaluation"] if is_bundled(recipe.model) else [])


def default_length(model: str, config: Any) -> int:
    if is_bundled(model):
        return BUNDLED_LENGTH
    return min(DEFAULT_LENGTH, longest_sequence(config) or DEFAULT_LENGTH)
