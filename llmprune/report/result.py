"""What a run found: the Report, and how it is written to llmprune.json and read again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

import llmprune
from llmprune.checkpoint.files import FORMAT, REPORT
from llmprune.evaluation.answers import TaskResult
from llmprune.report import summary
from llmprune.report.cells import count, number, percent, seconds, size
from llmprune.report.fields import Fields
from llmprune.report.recovered import Recovered
from llmprune.results import (
    BlockReport,
    Calibration,
    Environment,
    Evaluation,
    NoSample,
    Origin,
    Polished,
    Pushed,
    Reloaded,
    Round,
    Row,
    Sample,
    Smaller,
    Step,
    Timings,
    Trial,
)

if TYPE_CHECKING:
    from rich.table import Table

MACHINE = {"device": (str, ""), "dtype": (str, ""), "threads": (int, 0), "block_by_block": (bool, True)}  # by type and default
NUMBERS = re.compile(r"\d[\d.,]*")
SAID = ("pattern", "method", "quality", "criterion", "solver", "allocation")  # of a recipe: what a report names


@dataclass(frozen=True, repr=False)
class Report:
    """The outcome of a run. A notebook shows it as a small table, and so does rich; ``to_json`` has everything.

    ``parameters`` counts the whole model. ``output`` is None for a live model. Two reports of the same result are equal, wherever it is and
    however long it took.
    """

    recipe: dict[str, Any]
    source: Origin
    calibration: Calibration | None  # None: pruned in training
    blocks: tuple[BlockReport, ...]
    perplexity: tuple[Evaluation, ...]
    parameters: int
    asked: float  # share of the weights of the pruned matrices
    environment: Environment
    output: Path | None = field(default=None, compare=False)
    polish: Polished | None = None
    reasons: dict[str, float] = field(default_factory=dict)  # the number that a matrix's ratio is based on, where the allocation measured one
    tried: tuple[Trial, ...] = ()
    frontier: tuple[Step, ...] = ()
    files: dict[str, str] = field(default_factory=dict)  # sha256 of each file of the output, except the card and the reports
    tensors: dict[str, str] = field(default_factory=dict)  # sha256 of each tensor's bytes
    sample: Sample | NoSample | None = None
    smaller: Smaller | None = None  # of a structured pattern: what was saved
    reloaded: Reloaded | None = None  # None for a live model
    recovered: tuple[Recovered, ...] = ()  # the trainings after the pruning, in order
    rounds: tuple[Round, ...] = ()  # that led to this one, and it
    tasks: tuple[TaskResult, ...] = ()  # what ``llmprune eval`` has added
    model: Any = field(default=None, compare=False)  # of a live model and a structured pattern: the smaller model
    live: Any = field(default=None, compare=False)  # of a live model: what ``save`` needs (llmprune.run.live_result.Unsaved)
    timings: Timings = field(default=Timings(), compare=False)

    def _facts(self) -> Iterator[tuple[str, str]]:
        """(label, text) of the main facts; what was not measured is left out."""
        recipe, smaller = self.recipe, self.smaller
        yield "pattern", f"{recipe['pattern']}, by {summary.named(recipe)}"
        yield "sparsity", f"{percent(self.sparsity, 4).text} of the pruned matrices, asked {percent(self.asked, 4).text}"
        for pair in self.perplexity:
            yield f"perplexity, {pair.pruned.dataset}", f"{number(pair.dense.value).text} dense, {number(pair.pruned.value).text} pruned"
        for one in self.recovered[-1:]:
            for found in one.measured:
                yield f"recovered, {found.after.dataset}", f"{number(found.before.value).text} before, {number(found.after.value).text} after"
        what = "parameters" if smaller or self.model is not None else "non-zero parameters"
        yield what, f"{count(self.left).text} of {count(self.parameters).text}"
        if self.source.bytes is not None:
            dense = self.source.bytes
            yield "size", f"{size(smaller.bytes if smaller else dense).text} of {size(dense).text}"
        if self.timings.seconds is not None:
            yield "time", seconds(self.timings.seconds).text
        if self.output is not None:
            yield "output", self.output.name

    def __repr__(self) -> str:
        return summary.line(self.source.name, self._facts())

    def __rich__(self) -> Table:
        return summary.table(self.source.name, self._facts())

    def _repr_html_(self) -> str:
        return summary.html(self.source.name, self._facts())

    @property
    def rows(self) -> list[Row]:
        return [row for block in self.blocks for row in block.rows]

    @property
    def zeros(self) -> int:
        """Weights that were dropped: exact zeros, or what a structured pattern has cut out."""
        return sum(row.dropped for row in self.rows)

    @property
    def own_zeros(self) -> int:
        """Of ``zeros``, those that no mask has dropped."""
        return sum(row.own_zeros for row in self.rows)

    @property
    def weights(self) -> int:
        """Weights in the pruned matrices; of a structured pattern, all that its units hold."""
        return sum(row.size for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Share of them that was dropped."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def left(self) -> int:
        """Parameters of the whole model that are neither zero nor cut out."""
        return self.smaller.parameters if self.smaller else self.parameters - self.zeros

    @property
    def notes(self) -> list[str]:
        said = [f"{row.matrix}: {note}" for row in self.rows for note in row.notes]
        return [*(self.smaller.notes if self.smaller else ()), *said]

    @property
    def joined_notes(self) -> list[str]:
        """``notes``, with those of several matrices that differ in numbers alone in one line."""
        alike: dict[str, list[tuple[str, str]]] = {}
        for row in self.rows:
            for note in row.notes:
                alike.setdefault(NUMBERS.sub("0", note), []).append((row.matrix, note))
        many = (f"{len(found):,} matrices, first " if len(found) > 1 else "" for found in alike.values())
        said = [f"{how}{matrix}: {note}" for how, ((matrix, note), *_) in zip(many, alike.values(), strict=True)]
        return [*(self.smaller.notes if self.smaller else ()), *said]

    def push(self, repo: str, *, public: bool = False, existing: bool = False, dry_run: bool = False) -> Pushed:
        """``llmprune.push`` of this report."""
        return llmprune.push(self, repo, public=public, existing=existing, dry_run=dry_run)

    def save(self, folder: str | PathLike[str], tokenizer: Any = None, *, overwrite: bool = False) -> Report:
        """``llmprune.save`` of this report."""
        return llmprune.save(self, folder, tokenizer, overwrite=overwrite)

    def to_json(self) -> dict[str, Any]:
        """The content of llmprune.json. ``timings`` is the one field that differs between equal runs."""
        plain = asdict(replace(self, output=None, model=None, live=None))
        for block in plain["blocks"]:
            del block["seconds"]  # they are with the other timings
        for name in ("output", "model", "live", *(name for name in ("tasks", "recovered", "rounds") if not plain[name])):
            del plain[name]
        counted = {"asked": plain.pop("asked"), "parameters": plain.pop("parameters")}
        counted |= {"pruned_matrices": self.sparsity, "zeros": self.zeros, "weights": self.weights}
        parts: dict[str, Any] = {name: getattr(self, name).to_json() for name in ("source", "environment")}
        parts["calibration"] = self.calibration.to_json() if self.calibration else None
        derived = {"sparsity": counted, "notes": self.notes}
        return {"format": FORMAT} | plain | parts | derived | {"timings": plain["timings"] | {"blocks": [block.seconds for block in self.blocks]}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], name: str = REPORT, output: Path | None = None) -> Report:
        """Reads the result of ``to_json``. name: of the file, for messages; output: its folder. Raises RequestError for anything else."""
        fields = Fields(content, name, "a run's llmprune.json")
        get = fields.get
        for word in SAID:
            get(f"recipe.{word}", str | None)
        return cls(
            recipe=get("recipe", dict[str, Any]),
            source=get("source", Origin),
            calibration=get("calibration", Calibration | None),
            blocks=blocks_of(fields),
            perplexity=get("perplexity", tuple[Evaluation, ...]),
            parameters=get("sparsity.parameters", PositiveInt),
            asked=get("sparsity.asked", float),
            environment=environment_of(fields),
            output=output,
            polish=get("polish", Polished | None, None),
            reasons=get("reasons", dict[str, float], {}),
            tried=get("tried", tuple[Trial, ...], ()),
            frontier=get("frontier", tuple[Step, ...], ()),
            files=get("files", dict[str, str], {}),
            tensors=get("tensors", dict[str, str], {}),
            sample=get("sample", Sample | NoSample | None),
            smaller=get("smaller", Smaller | None),
            reloaded=get("reloaded", Reloaded | None, None),
            recovered=get("recovered", tuple[Recovered, ...], ()),
            rounds=get("rounds", tuple[Round, ...], ()),
            tasks=get("tasks", tuple[TaskResult, ...], ()),
            timings=get("timings", Timings),
        )


def blocks_of(fields: Fields) -> tuple[BlockReport, ...]:
    """With the seconds that each of them took."""
    blocks, spent = fields.get("blocks", tuple[BlockReport, ...]), fields.get("timings.blocks", tuple[dict[str, float], ...])
    if len(blocks) != len(spent):
        raise fields.refusal(f"timings of {len(spent)} blocks, but there are {len(blocks)}")
    return tuple(replace(block, seconds=seconds) for block, seconds in zip(blocks, spent, strict=True))


def environment_of(fields: Fields) -> Environment:
    """Flattened there: the versions beside the rest."""
    machine = {key: fields.get(f"environment.{key}", kind, default) for key, (kind, default) in MACHINE.items()}
    versions = fields.get("environment", dict[str, str | int | bool])
    return Environment({key: str(value) for key, value in versions.items() if key not in MACHINE}, **machine)
