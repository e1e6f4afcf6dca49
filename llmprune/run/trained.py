"""The end of a training that has pruned a model: an ordinary result, all or nothing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from llmprune.checkpoint.files import REPORT, make_folder, opened, remove, sync_file, sync_folder, to_versioned_json, write_whole
from llmprune.checkpoint.journal import Journal
from llmprune.checkpoint.manifest import manifest_of
from llmprune.checkpoint.source import open_folder
from llmprune.errors import PromiseError, RequestError
from llmprune.maths.runs import runs_of
from llmprune.model.matrices import Selection, block_matrices
from llmprune.model.skeleton import count_parameters
from llmprune.publish.trained import write_trained_card
from llmprune.report.inspection import inspect
from llmprune.report.page import page
from llmprune.report.result import Report
from llmprune.results import BlockReport, Origin, Row
from llmprune.run.preflight import check_output
from llmprune.run.prepare import environment
from llmprune.stream.live import LiveStream
from llmprune.stream.selected import stored_matrices
from llmprune.training.masks import Masks

ID = re.compile(r"[\w.-]+/[\w.-]+")  # of a Hub model


class Goal(Protocol):
    """What was asked for: a dataclass. goal: the sparsity at the end; None: that of the masks."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def goal(self) -> float | None: ...


class Pruning(Protocol):
    """A Sparsifier, a SparsityCallback, or masks made before training: what was asked for, the masks, the optimizer steps that were made."""

    @property
    def asked(self) -> Goal: ...

    @property
    def masks(self) -> Masks | None: ...

    @property
    def done(self) -> int: ...


def save_trained(trained: Pruning, model: PreTrainedModel, output: str | os.PathLike[str], tokenizer: Any = None, overwrite: bool = False) -> Report:
    """Save a model that was pruned while it was trained as a result: weights, llmprune.json with the record of its masks, card, page.

    trained: the callback after its training, or the sparsifier. tokenizer: saved beside it, or a processor. Raises RequestError where the output
    cannot be written or the model is sharded, PromiseError where a masked weight is not zero; then nothing is written.
    """
    folder = Path(output).expanduser()
    if trained.masks is None:
        raise RequestError("a callback that has not trained", "save its model after trainer.train()")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise RequestError("a sharded model", "gather it by trainer.save_model, load it in one process, and save it from there")
    name, where = named(model)
    check_output(folder, where, overwrite)
    trained.masks.check(model)
    recipe = {"model": name, "quality": None, "criterion": None, "solver": None, "allocation": "uniform"} | asdict(trained.asked)
    recipe |= {"steps": trained.done}

    def made(weights: Path) -> Report:
        write_model(model.save_pretrained, tokenizer, weights)
        report = report_of(trained, model, weights, recipe, folder)
        check_written(weights, report)
        return report

    return published(folder, recipe, made, write_trained_card)


def published(folder: Path, recipe: dict[str, Any], made: Callable[[Path], Report], card: Callable[[Path, Report], None]) -> Report:
    """A result, all or nothing. made: writes the weights into a folder, and has the report; card: writes the card beside them."""
    journal = Journal(folder, {"recipe": recipe}, restart=False)
    try:
        report = made(journal.weights)
        card(journal.weights, report)
        publish(journal.weights, report)
        journal.publish()
    finally:
        journal.close()
    return report


def named(model: PreTrainedModel) -> tuple[str, Path | None]:
    """(what the model that was trained is called, its folder if it was read from one); paths are their last names."""
    said = str(model.config._name_or_path or "")
    where = Path(said).expanduser()
    if said and where.is_dir():
        return where.resolve().name, where
    return (said if ID.fullmatch(said) else where.name) or type(model).__name__, None


def write_model(save: Callable[[Path], Any], tokenizer: Any, folder: Path) -> None:
    """By transformers, durably, with the mode that the umask allows. save: a model's ``save_pretrained``."""
    if folder.exists():
        remove(folder)
    make_folder(folder)
    save(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    mode = (folder / "config.json").stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            with opened(path, os.O_RDONLY) as handle:
                sync_file(handle)
    sync_folder(folder)


def report_of(trained: Pruning, model: PreTrainedModel, folder: Path, recipe: dict[str, Any], output: Path) -> Report:
    assert trained.masks is not None
    manifest = manifest_of(folder)
    name, _ = named(model)
    return Report(
        recipe=recipe,
        source=Origin(name, None, {}),
        calibration=None,
        blocks=tuple(blocks_of(model, trained.masks, trained.asked.goal)),
        perplexity=(),
        parameters=count_parameters(model),
        asked=trained.asked.goal if trained.asked.goal is not None else trained.masks.sparsity,
        environment=environment(model.device, model.dtype, block_by_block=False),
        output=output,
        files=manifest.files,
        tensors=manifest.tensors,
    )


@torch.no_grad()
def blocks_of(model: PreTrainedModel, masks: Masks, goal: float | None) -> Iterator[BlockReport]:
    """A row for each matrix of a parameter that has a mask, by the names that checkpoints have for them."""
    stream = LiveStream(model)
    for index in range(len(stream.names) + 1):
        path, place = stream.path_of(index), model.get_submodule(stream.path_of(index))
        matrices = block_matrices(place) if index == len(stream.names) else stored_matrices(stream, index, place)
        rows = []
        for m in matrices:
            if f"{path}.{m.parameter}" in masks.keep:
                zero_RC, keep_RC = m.view(place).cpu() == 0, m.view_of(masks.keep[f"{path}.{m.parameter}"].cpu())
                asked = float((~keep_RC).sum()) / keep_RC.numel() if goal is None else goal
                row = Row(f"{path}.{m.name}", m.rows, m.columns, asked, int(zero_RC.sum()), None, 0, kept_zeros=runs_of(zero_RC & keep_RC))
                rows.append(row)
        if rows:
            yield BlockReport(path, None, tuple(rows))


def check_written(folder: Path, report: Report) -> None:
    """Raises PromiseError where the checkpoint, read block by block, does not have the zeros of the model."""
    written = {found.matrix: found.zeros for found in inspect(open_folder(folder, folder.name), Selection(only="."))}
    wrong = [row.matrix for row in report.rows if written.get(row.matrix) != row.zeros]
    if wrong:
        raise PromiseError(f"{wrong[0]}: saved with {written.get(wrong[0])} zeros, which are not the model's", "report this architecture")


def publish(folder: Path, report: Report) -> None:
    """llmprune.json and page beside the weights."""
    written = to_versioned_json(report.to_json())
    write_whole(folder / REPORT, written)
    write_whole(folder / "report.html", page(Report.from_json(json.loads(written))).encode())
