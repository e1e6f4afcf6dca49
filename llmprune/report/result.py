"""What a run found: the Report, and how it is written to llmprune.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llmprune
from llmprune.report import summary
from llmprune.results import BlockReport, Divergence, Perplexity, Pushed, Row

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Measured:
    """A perplexity before and after, by the same definition, and how far the predictions behind it have moved."""

    dense: Perplexity
    pruned: Perplexity
    divergence: Divergence


@dataclass(frozen=True, repr=False)
class Report:
    """The outcome of a run. A notebook shows it as a small table, and so does rich; ``to_json`` has everything.

    ``parameters`` counts the whole model. ``output`` is None for a live model.
    """

    recipe: dict[str, Any]
    source: dict[str, Any]
    calibration: dict[str, Any]
    blocks: tuple[BlockReport, ...]
    perplexity: tuple[Measured, ...]
    parameters: int
    asked: float  # share of the weights of the pruned matrices
    environment: dict[str, Any]
    output: Path | None = None
    polish: dict[str, Any] | None = None  # what distillation has done
    reasons: dict[str, float] = field(default_factory=dict)  # the number that a matrix's ratio rests on, where the allocation measured one
    tried: tuple[dict[str, Any], ...] = ()  # allocations that were tried out, with their divergence from the dense model
    frontier: tuple[dict[str, Any], ...] = ()  # sparsities that were tried out for a budget, with their perplexity
    files: dict[str, str] = field(default_factory=dict)  # sha256 of each file of the output, but for the card and the reports
    tensors: dict[str, str] = field(default_factory=dict)  # sha256 of each tensor's bytes
    sample: dict[str, Any] | None = None  # what the dense and the pruned model go on to write, or why there is none
    smaller: dict[str, Any] | None = None  # of a structured pattern: what was saved, and how it was loaded again
    model: Any = field(default=None, compare=False)  # of a live model and a structured pattern: the smaller model
    timings: dict[str, Any] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        return summary.line(self)

    def __rich__(self) -> Table:
        return summary.table(self)

    def _repr_html_(self) -> str:
        return summary.html(self)

    @property
    def rows(self) -> list[Row]:
        return [row for block in self.blocks for row in block.rows]

    @property
    def zeros(self) -> int:
        """Weights that have gone: exact zeros, or what a structured pattern has cut out."""
        return sum(row.gone for row in self.rows)

    @property
    def weights(self) -> int:
        """Weights in the pruned matrices; of a structured pattern, all that its units hold."""
        return sum(row.size for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Share of them that has gone."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def notes(self) -> list[str]:
        said = [f"{row.matrix}: {note}" for row in self.rows for note in row.notes]
        return [*(self.smaller["notes"] if self.smaller else ()), *said]

    def push(self, repo: str, *, public: bool = False, existing: bool = False, dry_run: bool = False) -> Pushed:
        """``llmprune.push`` of this report."""
        return llmprune.push(self, repo, public=public, existing=existing, dry_run=dry_run)

    def to_json(self) -> dict[str, Any]:
        """The content of llmprune.json. ``timings`` is the one field that differs between equal runs."""
        return {
            "recipe": self.recipe,
            "source": self.source,
            "calibration": self.calibration,
            "sparsity": {
                "asked": self.asked,
                "pruned_matrices": self.sparsity,
                "zeros": self.zeros,
                "weights": self.weights,
                "parameters": self.parameters,
            },
            "perplexity": [asdict(m) for m in self.perplexity],
            "blocks": [block_to_json(b) for b in self.blocks],
            "smaller": self.smaller,
            "polish": self.polish,
            "reasons": self.reasons,
            "tried": self.tried,
            "frontier": self.frontier,
            "files": self.files,
            "tensors": self.tensors,
            "sample": self.sample,
            "notes": self.notes,
            "environment": self.environment,
            "timings": self.timings | {"blocks": [b.seconds for b in self.blocks]},
        }


def block_to_json(block: BlockReport) -> dict[str, Any]:
    value = asdict(block)
    del value["seconds"]
    return value


def block_from_json(value: dict[str, Any], seconds: dict[str, float]) -> BlockReport:
    rows = tuple(
        Row(**{**row, "notes": tuple(row["notes"]), "saliency": row["saliency"] and tuple(row["saliency"]), "kept": _tuple(row["kept"])})
        for row in value["rows"]
    )
    return BlockReport(value["block"], value["output_error"], rows, tuple(value["changed"]), seconds)


def _tuple(value: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value)
