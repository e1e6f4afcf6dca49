"""Masks that change while transformers' Trainer trains, by the methods of training/sparsifier.py:

    callback = SparsityCallback("gradual", pattern="2:4")
    Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    llmprune.save_trained(callback, model, "out", tokenizer)

Checkpoints of the Trainer hold the masks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmprune.errors import RequestError
from llmprune.training.asked import Asked
from llmprune.training.masks import Masks
from llmprune.training.sparsifier import Sparsifier
from llmprune.training.state import State


class SparsityCallback(TrainerCallback):
    """Masks weights while a Trainer trains: see training/sparsifier.py for the methods. Checkpoints hold the masks, and a training that is resumed
    from one goes on as if it had not stopped. ``masks`` are those in force, at the end the final ones.
    """

    def __init__(
        self,
        method: str = "gradual",
        sparsity: float | None = None,
        pattern: str = "unstructured",
        *,
        start: int | None = None,
        end: int | None = None,
        every: int | None = None,
        skip: str | None = None,
        only: str | None = None,
        regrow: float | None = None,
        masks: Masks | None = None,
    ) -> None:
        """start, end, every: in optimizer steps; masks change after step ``start``, and then every so many up to ``end`` (by default 0, half of the
        training, and a tenth of that but at most 100). masks: to start with, as ``read_masks`` has them of a result; by default the model's zeros.
        The rest as in ``training/asked.py``. Raises RequestError for what contradicts itself.
        """
        self.asked = Asked(method, sparsity, pattern, start, end, every, skip, only, regrow)
        self.masks = masks
        self.done = 0  # optimizer steps
        self._first = masks
        self._sparsifier: Sparsifier | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Raises RequestError for a schedule that is longer than the training, for a model that does not fit, and for a checkpoint without masks."""
        self._let_go()
        if state.is_hyper_param_search:
            raise RequestError("a search for hyperparameters, which keeps its checkpoints elsewhere", "train with the ones that it found")
        resumed = State.read(checkpoint_of(args, state)) if state.global_step else None
        options = {name: value for name, value in vars(self.asked).items() if name != "method"}
        self._sparsifier = Sparsifier(model, optimizer, self.asked.method, steps=state.max_steps, masks=self._first, resumed=resumed, **options)
        self.masks = self._sparsifier.masks

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self._sparsifier is not None
        self._sparsifier.step()
        self.masks, self.done = self._sparsifier.masks, self._sparsifier.done

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """The share of the chosen matrices that is masked goes where the loss goes."""
        if logs is not None and self.masks is not None:
            logs["sparsity"] = self.masks.sparsity

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self._sparsifier is not None
        held = self._sparsifier.state
        if state.is_world_process_zero:
            held.write(saved_at(args, state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        """Where the trainer has loaded its best checkpoint, the masks are that one's."""
        self._let_go()
        if args.load_best_model_at_end and state.best_model_checkpoint:
            best = State.read(Path(state.best_model_checkpoint))
            self.masks, self.done = best.masks, best.values["step"]
        assert self.masks is not None
        self.masks.check(model)

    def _let_go(self) -> None:
        if self._sparsifier is not None:
            self._sparsifier.remove()
        self._sparsifier = None


def saved_at(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint of this step."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder that a training is resumed from: the one that the arguments name, or that of its step in the output folder."""
    named = args.resume_from_checkpoint
    return Path(named) if named and Path(named).is_dir() else saved_at(args, state)
