"""The token windows of a run: which text, how many, how long, and which of them are held back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from llmprune.checkpoint.companions import processor_files, tokenizer_files
from llmprune.checkpoint.files import hash_file
from llmprune.checkpoint.resolve import is_bundled
from llmprune.checkpoint.source import Source
from llmprune.data.given import check_token_ids
from llmprune.data.pictures import has_pictures, load_processor, picture_windows
from llmprune.data.reading import windows_of
from llmprune.data.sources import BUNDLED, BUNDLED_NAMES, GIVEN, TextSource, find_source
from llmprune.data.tokenizer import load_tokenizer
from llmprune.data.windows import RunData, Windows
from llmprune.errors import RequestError
from llmprune.model.kinds import begins_with_bos, longest_sequence
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


Given: TypeAlias = TextSource | Tensor | None  # texts or dialogues in memory, token ids [N, L], or nothing


@dataclass(frozen=True)
class Texts:
    """The texts that a run asks for, found but not read; token ids as they are. identities: of everything that windows are made from, the texts and
    the tokenizer's files, by name; None where it is unknown.
    """

    calibration: TextSource | Tensor
    evaluation: tuple[TextSource | Tensor, ...]
    identities: dict[str, str | None]

    @property
    def stored(self) -> bool:
        """Whether windows that an earlier process has cut from the same texts may be taken: nothing is in memory alone."""
        return all(isinstance(text, TextSource) and text.builder != GIVEN for text in (self.calibration, *self.evaluation))

    @property
    def read(self) -> bool:
        """Whether a tokenizer is needed."""
        return any(isinstance(text, TextSource) for text in (self.calibration, *self.evaluation))


def find_texts(recipe: Recipe, folder: Path, given: Given, measured: tuple[TextSource | Tensor, ...] = ()) -> Texts:
    """folder: of the model. measured: to evaluate on, besides what the recipe names. Raises RequestError for a missing text."""
    calibration = given if isinstance(given, Tensor) else calibration_source(recipe, given)
    if isinstance(given, Tensor):
        refuse_columns(recipe, "token ids")
    named = recipe.eval if given is not None or measured else evaluation_sets(recipe)
    evaluation = (*(find_source(spec, "evaluation") for spec in named), *measured)
    identities = {f"calibration {calibration.dataset}": calibration.identity} if isinstance(calibration, TextSource) else {}
    texts = [(n, text) for n, text in enumerate(evaluation, 1) if isinstance(text, TextSource)]
    identities |= {f"evaluation {n}, {text.dataset}": text.identity for n, text in texts}
    readers = (*tokenizer_files(folder), *processor_files(folder)) if identities else ()
    identities |= {f"tokenizer {path.name}": f"sha256 {hash_file(path)}" for path in readers}
    return Texts(calibration, evaluation, identities)


def calibration_source(recipe: Recipe, given: TextSource | None) -> TextSource:
    """The texts to calibrate on: those in memory, or those that the recipe names."""
    if given is None:
        spec = recipe.calibration or ("bundled-calibration" if is_bundled(recipe.model) else "c4")
        return find_source(spec, "calibration", recipe.column, recipe.split)
    if recipe.split is not None:
        raise RequestError(f"split {recipe.split!r} of {given.dataset}", "give that split itself")
    return replace(given, column=recipe.column)


def starts_with_bos(recipe: Recipe, config: Any) -> bool:
    """Whether every window of a text begins with BOS: as the recipe says, or as the model was trained."""
    return begins_with_bos(config) if recipe.bos is None else recipe.bos


def refuse_columns(recipe: Recipe, what: str) -> None:
    """Raises RequestError for a column or a split of something that has none."""
    for name in ("column", "split"):
        if getattr(recipe, name) is not None:
            raise RequestError(f"{name} {getattr(recipe, name)!r} with {what}", f"omit the {name}")


def gather_windows(recipe: Recipe, source: Source, stream: CheckpointStream | WholeStream, texts: Texts) -> RunData:
    """The windows of a run, as the recipe and its defaults say."""
    given = texts.calibration if isinstance(texts.calibration, Tensor) else None
    config = stream.skeleton.config
    if given is not None:
        check_given(recipe, given)
    length = given.shape[1] if given is not None else recipe.sequence_length or default_length(recipe.model, config)
    check_length(length, config)
    bos = starts_with_bos(recipe, config)
    if given is not None and recipe.bos is not None and not texts.read:
        raise RequestError("bos with token ids", "put it into the token ids, or omit it")
    tokenizer = load_tokenizer(source.folder) if texts.read else None
    if isinstance(texts.calibration, Tensor):
        data = given_windows(recipe, texts.calibration)
    else:
        data = read_calibration(recipe, source, stream, texts.calibration, tokenizer, length, bos, bool(texts.evaluation))
    limit = evaluated(recipe, len(data.calibration), texts)
    evaluation = tuple(measured_windows(text, tokenizer, length, limit, bos, recipe.eval_samples) for text in texts.evaluation)
    return replace(data, evaluation=evaluation or data.evaluation, identities=texts.identities)


def read_calibration(
    recipe: Recipe,
    source: Source,
    stream: CheckpointStream | WholeStream,
    text: TextSource,
    tokenizer: Any,
    length: int,
    bos: bool,
    measured: bool,
) -> RunData:
    """The windows of a text to calibrate on. measured: whether there is something else to evaluate on; else a slice is held back for it."""
    samples = recipe.samples or DEFAULT_SAMPLES
    wanted, draw = samples + 2 * HELD_BACK, recipe.seed if recipe.shuffle else None
    if shows_pictures(text, stream):
        windows = picture_windows(text, load_processor(source.folder), length, wanted, draw)
    else:
        windows = windows_of(text, tokenizer, length, wanted, draw=draw, bos=bos)
    return shared_out(recipe, windows, measured)


def shared_out(recipe: Recipe, windows: Windows, measured: bool) -> RunData:
    """The windows of a text for the calibration, for trials, and, unless there is something else to evaluate on (``measured``), for the evaluation.

    Raises RequestError for fewer than were asked for.
    """
    have, samples, length = len(windows), recipe.samples or DEFAULT_SAMPLES, windows.ids_NL.shape[1]
    if recipe.samples and have < recipe.samples:
        raise RequestError(f"{windows.dataset}: {have} windows of {length}, {recipe.samples} asked for", "give more text, or smaller --samples")
    windows, held = divided(recipe, windows)
    if measured:
        return RunData(windows.first(samples), (), held)
    have = len(windows)
    most = min(HELD_BACK, samples)  # an evaluation is no longer than the calibration
    spare = have - recipe.samples if recipe.samples and have >= recipe.samples else max(have - samples, have // 8)
    samples = min(samples, have - min(spare, most))
    return RunData(windows.first(samples), (windows.after(samples).first(most),) if have > samples else (), held)


def evaluated(recipe: Recipe, calibrated: int, texts: Texts) -> int | None:
    """How many windows of each evaluation set are measured, at most; None: all. Raises RequestError for a number without a set."""
    asked = recipe.eval_samples
    if asked is not None and not texts.evaluation:
        raise RequestError(f"eval_samples {asked} without data to evaluate on", "add --eval")
    if asked == "all" or (asked is None and not recipe.eval and all(_is_bundled(text) for text in texts.evaluation)):
        return None  # the bundled text, which nobody has asked for, is short
    return calibrated if asked is None else int(asked)


def _is_bundled(text: TextSource | Tensor) -> bool:
    return isinstance(text, TextSource) and text.files[:1] == (BUNDLED / BUNDLED_NAMES["bundled-evaluation"],)


def measured_windows(text: TextSource | Tensor, tokenizer: Any, length: int, limit: int | None, bos: bool, asked: int | str | None) -> Windows:
    """The first windows of an evaluation set. asked: how many have to be there. Raises RequestError where they are not."""
    if isinstance(text, Tensor):
        windows = Windows(text, "given token ids", "all")
    else:
        windows = windows_of(text, tokenizer, length, None if limit is None else limit + 1, bos=bos)
    have = len(windows)
    if isinstance(asked, int) and have < asked:
        raise RequestError(f"{windows.dataset}: {have} windows of {length}, {asked} asked for", "give a smaller --eval-samples, or all")
    return windows if limit is None or have <= limit else replace(windows.first(limit), split=f"{windows.split}, the first windows")


def shows_pictures(source: TextSource, stream: Stream) -> bool:
    """Whether a data set has pictures, for a model that sees them. Raises RequestError where only its text decoder is at hand, or in a mixture."""
    model = stream.walk.model
    if not stream.towers or not has_pictures(source):
        return False
    if source.parts:
        raise RequestError(f"{source.dataset}: a mixture with pictures", "give one data set")
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
    check_token_ids(ids_NL, "calibration")
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
