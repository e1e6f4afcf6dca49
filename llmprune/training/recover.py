"""Train what is left of a pruned model, in place, by transformers' Trainer: the best candidate stays, the start is one.

A training that was interrupted goes on from its last sealed checkpoint, with the same result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PrinterCallback
from transformers.utils import logging

from llmprune.training.arguments import Settings, in_half, training_arguments
from llmprune.training.data import Packs
from llmprune.training.judge import Judge, best_of
from llmprune.training.losses import Objective
from llmprune.training.parameters import Trained
from llmprune.training.trainer import CHECKPOINTS, Keeper, RecoveryTrainer, judged, keep_best, last_checkpoint, read_best
from llmprune.types import SILENT, Listener, Records

START, TRAINED = "start", "trained"


@dataclass(frozen=True)
class Curve:
    """What a training showed. losses: (step, training loss); held_out: (step, mean negative log-likelihood on each of the judge's texts), from step
    0 on. best: the step that was kept, 0 for the start.
    """

    losses: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, tuple[float, ...]], ...]
    best: int

    @property
    def steps(self) -> int:
        """Steps that were done."""
        return self.held_out[-1][0]


def recover(
    trained: Trained,
    objective: Objective,
    judge: Judge,
    data: Packs,
    settings: Settings,
    folder: Path,
    records: Records,
    listen: Listener = SILENT,
    callbacks: Sequence[Any] = (),
) -> tuple[Curve, dict[str, Tensor]]:
    """(what it showed, the parameters of the best candidate as they are saved). The model has these values afterwards; adapters are merged.

    folder: for checkpoints and the best candidate; records: of the run, which a later process resumes by.
    """
    start = started(trained, judge, folder, records)
    done = records.read(TRAINED)
    if done is None:
        history = train(trained, objective, judge, start, data, settings, folder, records, listen, callbacks)
        done = {"history": history}
        records.write(TRAINED, done)
    curve = curve_of(done["history"], start)
    values = read_best(folder, records, curve.best)
    trained.settle(values)
    return curve, values


def started(trained: Trained, judge: Judge, folder: Path, records: Records) -> list[float]:
    """The judge's losses before the first step, which is the first candidate."""
    record = records.read(START)
    if record is None:
        values = trained.values()
        with trained.showing(values):
            record = {"losses": judge.losses(trained.model)}
        keep_best(folder, records, 0, values)
        records.write(START, record)
    return list(record["losses"])


def train(
    trained: Trained,
    objective: Objective,
    judge: Judge,
    start: Sequence[float],
    data: Packs,
    settings: Settings,
    folder: Path,
    records: Records,
    listen: Listener,
    callbacks: Sequence[Any],
) -> list[dict[str, Any]]:
    """The history of losses, of this process and of those that it resumes."""
    checkpoints = folder / CHECKPOINTS
    last = last_checkpoint(checkpoints, records)
    if last is not None and finished(history := history_of(last), start, settings):
        return history
    device = next(trained.model.parameters()).device
    keeper = Keeper(trained, start, settings.patience, folder, records, listen)
    args = training_arguments(settings, checkpoints, device)
    with same_verbosity():
        trainer = RecoveryTrainer(trained, objective, judge, data, args, [keeper, *callbacks], in_half(settings, device))
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    return numbers(trainer.state.log_history)


@contextmanager
def same_verbosity() -> Iterator[None]:
    """A Trainer sets transformers' verbosity for the whole process; afterwards it is what it was."""
    before = logging.get_verbosity()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def history_of(checkpoint: Path) -> list[dict[str, Any]]:
    return numbers(json.loads((checkpoint / "trainer_state.json").read_bytes())["log_history"])


def numbers(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the summary at a training's end, which has seconds in it."""
    return [entry for entry in history if "loss" in entry or "eval_loss" in entry]


def finished(history: Sequence[dict[str, Any]], start: Sequence[float], settings: Settings) -> bool:
    """Whether all steps were done, or it had stopped for want of improvement."""
    found = judged(history)
    if not found:
        return False
    since = len(found) - 1 - best_of(start, [losses for _, losses in found])
    return found[-1][0] >= settings.steps or since >= settings.patience


def curve_of(history: Sequence[dict[str, Any]], start: Sequence[float]) -> Curve:
    found = judged(history)
    best = best_of(start, [losses for _, losses in found])
    losses = tuple((entry["step"], entry["loss"]) for entry in history if "loss" in entry)
    held_out = ((0, tuple(start)), *((step, tuple(losses)) for step, losses in found))
    return Curve(losses, held_out, found[best][0] if best >= 0 else 0)
