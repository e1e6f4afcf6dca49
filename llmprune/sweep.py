"""Many prunings of one model under one calibration: a table, and a plot of perplexity against sparsity.

Windows, loss gradients, what allocations measure and the dense perplexity are had once; every row is then pruned and measured exactly as a run of its
own would be, but nothing is saved except its figures. A killed sweep goes on from the last finished row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from llmprune import heap
from llmprune.checkpoint.files import to_json, write_whole
from llmprune.checkpoint.journal import Journal
from llmprune.engine import prune
from llmprune.evaluation.beside import Dense, pruned_pass
from llmprune.gradients import LossGradients
from llmprune.job import Job, Progress, dense_passes, describe, environment, prepare, quiet, ratios_of
from llmprune.preflight import check_matrices, check_plan
from llmprune.recipe import Recipe
from llmprune.report.frontier import SweepReport, SweepRow, draw, markdown
from llmprune.shares import Measured, dense_gradients, measure, needs_of
from llmprune.types import Divergence, Perplexity, Plan


@dataclass
class Sweep:
    """A checked sweep, ready to start."""

    job: Job  # of the first row; its model and windows are everybody's
    rows: list[tuple[Recipe, Plan]]

    def __str__(self) -> str:
        return f"{self.job.source.name}: {len(self.rows)} prunings; {self.job.describe_data()}\noutput: {self.job.output}"


def prepare_sweep(asked: list[Recipe], output: Path, overwrite: bool = False, restart: bool = False, windows: Tensor | None = None) -> Sweep:
    """Check every row against the model. Nothing is written and no forward is run. windows: as ``prepare`` takes them. Raises RequestError."""
    job = prepare(asked[0].model_copy(update={"output": str(output)}), windows, overwrite, restart, result="sweep.json")
    rows = []
    for recipe in asked:
        plan = replace(recipe.plan(), accept_damage=True)  # a destroyed block is a point of the curve too
        check_matrices(job.matrices, job.stream, plan.pattern)
        check_plan(plan, job.stream, job.matrices, job.stream.dtype)
        rows.append((recipe, plan))
    return Sweep(job, rows)


def run_sweep(sweep: Sweep, progress: Progress = quiet) -> SweepReport:
    """Every row that an interrupted sweep of the same request has not finished. The output appears whole, or not at all."""
    heap.steady()
    job = sweep.job
    job.output.parent.mkdir(parents=True, exist_ok=True)
    identity = job.identity | {"recipe": [recipe.resolved() for recipe, _ in sweep.rows]}
    journal = Journal(job.output, identity, job.restart)
    try:
        job.stream.scratch = journal.folder
        dense = dense_passes(job, journal, progress)
        shared = Shared(sweep, progress)
        rows = []
        for number, (recipe, plan) in enumerate(sweep.rows):
            record = journal.read(f"row-{number:05d}")
            if record is None:
                record = asdict(prune_row(job, recipe, plan, dense, shared))
                journal.write(f"row-{number:05d}", record)
            rows.append(row_from_json(record))
            progress("sweep", number + 1, len(sweep.rows))
        source = {"name": job.source.name, "revision": job.source.revision, "files": job.source.hashes}
        report = SweepReport(
            tuple(d.perplexity for d in dense), tuple(rows), describe(job.data.calibration), source, environment(job.stream), job.output
        )
        journal.weights.mkdir(exist_ok=True)
        for name, data in files_of(report):
            write_whole(journal.weights / name, data)
        journal.publish()
        return report
    finally:
        journal.close()


def files_of(report: SweepReport) -> Iterator[tuple[str, bytes]]:
    yield "sweep.json", to_json(report.to_json())
    yield "sweep.md", markdown(report.to_json()).encode()
    yield "sweep.svg", draw(report.to_json())


class Shared:
    """What the rows have in common, made when the first of them needs it."""

    def __init__(self, sweep: Sweep, progress: Progress) -> None:
        self._sweep, self._progress = sweep, progress
        self._gradients: LossGradients | None = None
        self._measured: dict[Any, Measured] = {}

    def gradients(self) -> LossGradients | None:
        if self._gradients is None:
            job = self._sweep.job
            needs = frozenset().union(*(needs_of(plan) for _, plan in self._sweep.rows))
            self._gradients = dense_gradients(job.stream, job.data.calibration.ids_NL, job.matrices, needs, partial(self._progress, "gradients"))
        return self._gradients

    def measured(self, plan: Plan) -> Measured:
        """Of a plan's allocation; it does not hang on the sparsity."""
        key = replace(plan, sparsity=0.0)
        if key not in self._measured:
            job = self._sweep.job
            step = partial(self._progress, "allocation")
            self._measured[key] = measure(job.stream, job.data.calibration.ids_NL, plan, job.matrices, self.gradients(), step)
        return self._measured[key]


def prune_row(job: Job, recipe: Recipe, plan: Plan, dense: list[Dense], shared: Shared) -> SweepRow:
    """Prune, measure, forget."""
    gradients, measured = shared.gradients(), shared.measured(plan)
    began = perf_counter()
    ratios = ratios_of(job, plan, measured, gradients)
    with job.stream.trial():
        blocks = prune(job.stream, job.data.calibration.ids_NL, plan, job.matrices, gradients, ratios.asked)
        seconds = perf_counter() - began
        found = [pruned_pass(one) for one in dense]
    rows = [row for block in blocks for row in block.rows]
    sparsity = sum(row.zeros for row in rows) / sum(row.rows * row.columns for row in rows)
    return SweepRow(
        method=recipe.method or recipe.quality or "",
        pattern=recipe.pattern,
        asked=plan.sparsity,
        sparsity=sparsity,
        perplexity=tuple(value for value, _ in found),
        divergence=tuple(moved for _, moved in found),
        seconds=seconds,
    )


def row_from_json(record: dict[str, Any]) -> SweepRow:
    perplexity, divergence = (tuple(kind(**v) for v in record[name]) for name, kind in (("perplexity", Perplexity), ("divergence", Divergence)))
    return SweepRow(**record | {"perplexity": perplexity, "divergence": divergence})
