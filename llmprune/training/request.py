"""What can be asked of a recovery, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from llmprune.data.specs import last_name, shown
from llmprune.errors import RequestError
from llmprune.methods import check_name
from llmprune.training.arguments import check_arguments
from llmprune.training.lora import ALPHA, RANK
from llmprune.training.losses import LOSSES
from llmprune.training.parameters import PARAMETERS

STEPS, BATCH, PATIENCE, EVALUATIONS = 300, 8, 4, 12
TEMPERATURE = 2.0  # better than 1 where the same windows come back often, a little worse where they do not (docs/training.md)
# Divided by the model's width. Measured at widths of 64 and 128; for a model of 8 billion parameters, whose width is 4,096, 5e-5 to 2.5e-4
RATES = {"all": 0.2, "norms": 1.0, "lora": 1.0}


@dataclass(frozen=True)
class Request:
    """folder: a result. data: to train on, by name or in memory; column, split: of it. bos: whether windows begin with BOS. held_out: a text that
    decides, instead of a slice of the data. dense: the model that it was pruned from. every: steps between evaluations. None: as the defaults say.
    arguments, callbacks: of transformers' Trainer.
    """

    folder: str
    data: Any  # a name, a TextSource, or token ids
    output: str | None = None
    steps: int = STEPS
    parameters: str = "all"
    loss: str | None = None
    dense: str | None = None
    held_out: str | None = None
    eval: Sequence[str] = ()
    batch: int = BATCH
    sequence_length: int | None = None
    learning_rate: float | None = None
    temperature: float = TEMPERATURE
    mix: float = 1.0
    rank: int = RANK
    alpha: float = ALPHA
    every: int | None = None
    patience: int = PATIENCE
    seed: int = 0
    device: str = "auto"
    column: str | None = None
    split: str | None = None
    bos: bool | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Sequence[Any] = ()

    def check(self) -> None:
        """Raises RequestError for a value that is out of range, or an option without the one that it is about."""
        check_name("parameters", self.parameters, list(PARAMETERS))
        if self.loss is not None:
            check_name("loss", self.loss, list(LOSSES))
        if isinstance(self.data, str) and not self.data:
            raise RequestError("no data to train on", "add --data, a text file or a data set")
        for name in ("steps", "batch", "rank", "patience"):
            self._at_least_one(name)
        if not (isinstance(self.mix, int | float) and 0 <= self.mix <= 1):
            raise RequestError(f"mix {self.mix}: not between 0 and 1", "it is the dense model's share of the loss")
        for name in ("temperature", "alpha", *(("learning_rate",) if self.learning_rate is not None else ())):
            if not getattr(self, name) > 0:
                raise RequestError(f"{name} {getattr(self, name)}: not above 0", "give a positive number")
        for name in ("every", "sequence_length"):
            if getattr(self, name) is not None:
                self._at_least_one(name)
        self._check_pairs()
        check_arguments(self.arguments)

    def _at_least_one(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or value < 1:
            raise RequestError(f"{name} {value}: not a whole number above 0", f"give {name} 1 or more")

    def _check_pairs(self) -> None:
        if self.loss == "ce" and self.dense is not None:
            raise RequestError("a dense model with loss ce, which does not use it", "omit dense, or choose loss kd")
        if self.parameters != "lora" and (self.rank, self.alpha) != (RANK, ALPHA):
            raise RequestError(f"rank or alpha with parameters {self.parameters}", "they are of parameters lora")
        if self.loss in ("ce", "blocks") and self.temperature != TEMPERATURE:
            raise RequestError(f"temperature with loss {self.loss}", "it is of loss kd")
        if self.loss == "ce" and self.mix != 1:
            raise RequestError("mix with loss ce", "it is the dense model's share of the losses kd and blocks")

    @property
    def evaluates_every(self) -> int:
        return self.every or max(1, self.steps // EVALUATIONS)

    def rate(self, width: int) -> float:
        """The learning rate; by default it falls with the width of the model."""
        return RATES[self.parameters] / width if self.learning_rate is None else self.learning_rate

    def resolved(self) -> dict[str, Any]:
        """As it is saved: paths as their last names, without the output and what cannot be written down."""
        value = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("output", "callbacks", "folder")}
        value["data"] = shown(self.data) if isinstance(self.data, str) else getattr(self.data, "dataset", "given token ids")
        value |= {"held_out": self.held_out and shown(self.held_out), "dense": self.dense and last_name(self.dense)}
        return value | {"eval": [shown(text) for text in self.eval], "arguments": {name: str(each) for name, each in self.arguments.items()}}
