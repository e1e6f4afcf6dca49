"""Masks before training, as a result: the model at initialisation, or before it is fine-tuned, with the masked weights zero."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune.checkpoint.companions import WEIGHTS, matches, tokenizer_files
from llmprune.checkpoint.resolve import open_source
from llmprune.checkpoint.source import Source
from llmprune.data.reading import read_windows
from llmprune.data.tokenizer import load_tokenizer
from llmprune.data.windows import Windows
from llmprune.errors import RequestError
from llmprune.methods import check_name
from llmprune.model.skeleton import build_skeleton
from llmprune.model.wrappers import auto_class
from llmprune.report.result import Report
from llmprune.run.preflight import check_ids, check_length, check_output
from llmprune.run.trained import save_trained
from llmprune.training.asked import Asked
from llmprune.training.initial import ALLOCATIONS, CRITERIA, ON_DATA, USUAL, initial_masks
from llmprune.training.masks import Masks
from llmprune.training.sparsifier import check_shapes, chosen

SAMPLES, LENGTH = 32, 256  # windows of a loss, and their tokens


@dataclass(frozen=True)
class InitialAsked:
    """What was asked for. data, samples, sequence_length: of the loss, where the criterion has one. initialised: whether the weights are random.

    Raises RequestError for what contradicts itself.
    """

    criterion: str
    sparsity: float | None
    pattern: str
    allocation: str
    data: str | None
    samples: int | None
    sequence_length: int | None
    seed: int
    skip: str | None
    only: str | None
    initialised: bool = True
    method: str = "init-mask"

    def __post_init__(self) -> None:
        check_name("criterion", self.criterion, list(CRITERIA))
        check_name("allocation", self.allocation, list(ALLOCATIONS))
        if self.weights.goal is None:
            raise RequestError("init-mask without a sparsity", "give the share of the weights to mask, such as 0.8, or pattern 2:4")
        if (self.criterion in ON_DATA) != (self.data is not None):
            what = "needs data" if self.criterion in ON_DATA else "looks at no data"
            raise RequestError(f"criterion {self.criterion} {what}", "add --data FILE" if self.criterion in ON_DATA else "omit --data")
        if self.weights.built.local and self.allocation != "uniform":
            raise RequestError(f"allocation {self.allocation} with pattern {self.pattern}, which fixes the ratio of every matrix", "omit it")

    @property
    def weights(self) -> Asked:
        """How much of which weights."""
        return Asked("constant", self.sparsity, self.pattern, skip=self.skip, only=self.only)

    @property
    def goal(self) -> float | None:
        return self.weights.goal


@dataclass(frozen=True)
class Initial:
    """Masks that were made before any training."""

    asked: InitialAsked
    masks: Masks
    done: int = 0


def init_mask(
    model: str | os.PathLike[str],
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    criterion: str = "snip",
    allocation: str | None = None,
    data: str | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    skip: str | None = None,
    only: str | None = None,
    output: str | os.PathLike[str],
    overwrite: bool = False,
) -> Report:
    """Mask a model before it is trained, and save it as a result folder, for ``SparsityCallback("constant")`` or ``Masks.hold``.

    model: a config.json, a folder with one but without weights (both are initialised by ``seed``), or a model with weights, which it keeps.
    criterion: magnitude, random, snip, grasp or synflow. allocation: "threshold" (one for all scores), "uniform" or "erk"; by default the criterion's
    usual one. data: text for the loss of snip and grasp, of which the first ``samples`` windows of ``sequence_length`` tokens are taken.
    Raises RequestError before any work when the request cannot be met.
    """
    built = Asked("constant", sparsity, pattern).built
    usual = "uniform" if built.local else USUAL.get(criterion, "erk")
    if data is None and (samples or sequence_length):
        raise RequestError("samples or sequence_length without data", "omit them, or add data")
    count, length = (samples or SAMPLES, sequence_length or LENGTH) if data is not None else (None, None)
    said = Path(data).name if data is not None and Path(data).expanduser().exists() else data  # no path goes into a result
    open_model, folder, initialised = named_model(os.fspath(model), seed)
    asked = InitialAsked(criterion, sparsity, pattern, allocation or usual, said, count, length, seed, skip, only, initialised)
    check_output(Path(output).expanduser(), folder, overwrite)
    tokenizer = load_tokenizer(folder) if tokenizer_files(folder) else None
    windows = windows_of(asked, data, tokenizer, folder) if data is not None else None
    opened = open_model()
    matrices = chosen(opened, asked.weights)
    check_shapes(matrices, built, pattern)
    if windows is not None:
        check_length(windows.ids_NL.shape[1], opened.config)
        check_ids(windows, opened)
    about = (criterion, built, asked.goal or 0.0, asked.allocation, None if windows is None else windows.ids_NL, seed)
    masks = initial_masks(opened, matrices, *about)
    masks.apply(opened)
    return save_trained(Initial(asked, masks), opened, output, tokenizer, overwrite)


def windows_of(asked: InitialAsked, data: str, tokenizer: Any, folder: Path) -> Windows:
    """The windows of the loss. Raises RequestError where there are too few, or no tokenizer."""
    assert asked.sequence_length is not None
    if tokenizer is None:
        raise RequestError(f"{folder.name}: has no tokenizer to read data with", "add its files beside config.json")
    assert asked.samples is not None
    found = read_windows(data, "calibration", tokenizer, asked.sequence_length, asked.samples).first(asked.samples)
    have = len(found.ids_NL)
    if have < asked.samples:
        raise RequestError(
            f"{asked.data}: {have} windows of {asked.sequence_length}, {asked.samples} asked for", "give more text, or smaller --samples"
        )
    return found


def named_model(model: str, seed: int) -> tuple[Callable[[], PreTrainedModel], Path, bool]:
    """(how it is opened, its folder, whether its weights are made at random)."""
    path = Path(model).expanduser()
    config = path if path.is_file() else path / "config.json"
    asked_for = path.is_file() and path.suffix == ".json"
    if asked_for or (config.is_file() and not any(matches(file.name, ("*.safetensors", *WEIGHTS)) for file in path.iterdir())):
        return lambda: initialised(config, seed), config.parent, True
    source = open_source(model)
    if source.decoder is not None:
        raise RequestError(f"{source.name}: quantised ({source.decoder.method}), and codes are not trained", "give its original weights")
    return lambda: as_stored(source), source.folder, False


def as_stored(source: Source) -> PreTrainedModel:
    """The model of a checkpoint, in float32."""
    kind = auto_class(str(source.config.get("model_type")))
    opened: PreTrainedModel = kind.from_pretrained(source.folder, dtype=torch.float32, trust_remote_code=False)
    return opened


def initialised(config: Path, seed: int) -> PreTrainedModel:
    """The model of a config with the random weights that transformers gives it, in float32."""
    try:
        values = json.loads(config.read_text())
    except ValueError as error:
        raise RequestError(f"{config.name}: is not JSON ({str(error)[:80]})", "give a config.json") from None
    parsed = build_skeleton(values, torch.float32).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: PreTrainedModel = auto_class(parsed.model_type).from_config(parsed, dtype=torch.float32, trust_remote_code=False)
    made.config._name_or_path = str(config.parent)
    return made
