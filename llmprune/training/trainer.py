"""transformers' Trainer for a pruned model: it holds the masks, trains towards an ``Objective``, asks the judge, and keeps the best candidate.

What it adds: the optimizer is under the masks from its first step; an evaluation is of the model as it would be saved, on the judge's texts; a
checkpoint holds what is trained and nothing else. All that decides is computed from the history of losses, which checkpoints carry, so a training
that resumes from one decides as an uninterrupted one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from llmprune.checkpoint.files import hash_file, make_folder, sync_folder, write_whole
from llmprune.errors import StoppedError
from llmprune.training.data import Packs, collated
from llmprune.training.judge import Judge, best_of
from llmprune.training.losses import Objective
from llmprune.training.parameters import Trained
from llmprune.types import Listener, Records

CHECKPOINTS, SAVED, BEST = "checkpoints", "saved", "best"
HELD_OUT = "eval_loss_"  # of the judge's texts by number, in the history


class RecoveryTrainer(Trainer):
    """A Trainer whose steps keep the zeros. half: products of the loss are taken in bfloat16."""

    objective: Objective

    def __init__(
        self, trained: Trained, objective: Objective, judge: Judge, data: Packs, args: TrainingArguments, callbacks: list[Any], half: bool = False
    ) -> None:
        super().__init__(model=trained.model, args=args, train_dataset=data, eval_dataset=judge.texts[0], data_collator=collated, callbacks=callbacks)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of the whole step
        self.trained, self.objective, self.judge, self.half = trained, objective, judge, half

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.trained.masks.keep:
            self.trained.masks.hold(self.trained.model, optimizer)
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        ids_NL = inputs["input_ids"]
        with torch.autocast(ids_NL.device.type, torch.bfloat16, enabled=self.half):
            loss = self.objective(model, ids_NL, inputs["labels"], num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The judge's losses of the model as it would be saved."""
        with self.trained.showing(self.trained.values()):
            losses = self.judge.losses(self.trained.model)
        metrics = {"eval_loss": sum(losses) / len(losses)} | {f"{HELD_OUT}{n}": loss for n, loss in enumerate(losses)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What is trained, by the model's names for it; the rest is the pruned model's."""
        folder = Path(output_dir or str(self.args.output_dir))
        make_folder(folder)
        write_whole(folder / SAFE_WEIGHTS_NAME, save(self.trained.state()))


class Keeper(TrainerCallback):
    """Keeps the best candidate on the disk, stops a training that has not improved for ``patience`` evaluations, and seals checkpoints."""

    def __init__(self, trained: Trained, start: Sequence[float], patience: int, folder: Path, records: Records, listen: Listener) -> None:
        self.trained, self.start, self.patience = trained, start, patience
        self.folder, self.records, self.listen = folder, records, listen

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        history = judged(state.log_history)
        best = best_of(self.start, [losses for _, losses in history])
        if best == len(history) - 1:
            keep_best(self.folder, self.records, state.global_step, self.trained.values())
        if len(history) - 1 - best >= self.patience:
            control.should_training_stop = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.listen.progress("recover", state.global_step, state.max_steps)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        seal(self.folder / CHECKPOINTS, self.records)


def judged(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[float]]]:
    """(step, losses on the judge's texts) of each evaluation."""
    losses = ((entry["step"], [value for name, value in entry.items() if name.startswith(HELD_OUT)]) for entry in history)
    return [(step, found) for step, found in losses if found]


def keep_best(folder: Path, records: Records, step: int, values: Mapping[str, Tensor]) -> None:
    """Write a candidate, then the record that it is the best, then drop the one before."""
    name = f"best-{step:06d}.safetensors"
    write_whole(folder / name, save(dict(values)))
    records.write(BEST, {"step": step, "sha256": hash_file(folder / name)})
    for older in folder.glob("best-*.safetensors"):
        if older.name != name:
            os.unlink(older)


def read_best(folder: Path, records: Records, step: int) -> dict[str, Tensor]:
    """The best candidate, which is the one of this step. Raises StoppedError where it is not as it was written."""
    path, record = folder / f"best-{step:06d}.safetensors", records.read(BEST)
    if record is None or record["step"] != step or not path.is_file() or hash_file(path) != record["sha256"]:
        raise StoppedError(f"{path.name}: the best candidate's file is missing or damaged", "start over with --restart")
    return load_file(path)


def seal(checkpoints: Path, records: Records) -> None:
    """Bring every file of the checkpoints to the disk, and record their hashes: what a crash leaves half-written is not resumed from."""
    found: dict[str, dict[str, str]] = {}
    for folder in checkpoints.glob("checkpoint-*"):
        for path in folder.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(folder)
        found[folder.name] = {path.name: hash_file(path) for path in folder.iterdir()}
    sync_folder(checkpoints)
    records.write(SAVED, found)


def last_checkpoint(checkpoints: Path, records: Records) -> Path | None:
    """The latest checkpoint that is as it was when it was sealed."""
    found = records.read(SAVED) or {}
    for name in sorted(found, key=lambda name: -int(name.rpartition("-")[2])):
        folder = checkpoints / name
        if folder.is_dir() and {path.name: hash_file(path) for path in folder.iterdir()} == found[name]:
            return folder
    return None
