"""Many prunings of one model under one calibration: a table, and a plot of perplexity against sparsity.

Windows, loss gradients, measures of allocations and the dense perplexity are computed once; every row is then pruned and measured exactly as a
separate run would be, but nothing is saved except its figures. A quick sweep also computes the statistics once, on the dense model, and prunes all
rows in one pass by them; a run uses those of the pruned model, so quick rows are a little worse than runs, and aim at the matrices' own outputs. A
killed sweep resumes after the last finished row.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from llmprune.checkpoint.files import make_folder, to_versioned_json, write_whole
from llmprune.checkpoint.journal import Journal
from llmprune.engine import prune
from llmprune.errors import RequestError
from llmprune.evaluation.beside import Dense, dense_passes, pruned_pass
from llmprune.maths.linalg import few_tokens, shrink
from llmprune.pruners.choice import fine_pruner
from llmprune.pruners.matrix import prune_matrix
from llmprune.pruners.plan import Plan, Work
from llmprune.ratios.measured import Measured, Ratios, dense_gradients, is_tried, measure, needs_of, survey
from llmprune.ratios.trials import choose
from llmprune.recipe.recipe import Recipe
from llmprune.report.fields import typed
from llmprune.report.frontier import SWEEP, SweepReport, SweepRow, draw, markdown
from llmprune.results import Origin, Row
from llmprune.run.job import check_first_window
from llmprune.run.phases import Phases, dense_evaluation, pruned_evaluation, pruning
from llmprune.run.preflight import check_matrices, check_plan
from llmprune.run.prepare import Job, describe, prepare
from llmprune.run.windows import Given
from llmprune.statistics.gradient_taps import PER_WEIGHT
from llmprune.statistics.gradients import LossGradients
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.flow import Flow
from llmprune.types import SILENT, Listener, Stat


@dataclass
class Sweep:
    """A checked sweep, ready to start. quick: all rows use the dense model's statistics, which are computed once."""

    job: Job  # of the first row; its model and windows are shared by all
    rows: list[tuple[Recipe, Plan]]
    quick: bool = False

    def __str__(self) -> str:
        return f"{self.job.source.name}: {len(self.rows)} prunings; {self.job.describe_data()}\noutput: {self.job.output}"


def prepare_sweep(
    asked: list[Recipe],
    output: Path,
    overwrite: bool = False,
    restart: bool = False,
    windows: Given = None,
    quick: bool = False,
    listen: Listener = SILENT,
) -> Sweep:
    """Check every row against the model. Nothing is written and no forward is run. windows: as ``prepare`` takes them. Raises RequestError."""
    smaller = [recipe.pattern for recipe in asked if recipe.structured]
    if smaller:
        raise RequestError(f"a sweep with pattern {smaller[0]}", "prune with structured patterns one at a time")
    job = prepare(asked[0].model_copy(update={"output": str(output)}), windows, overwrite, restart, result=SWEEP, listen=listen)
    rows = []
    for recipe in asked:
        plan = replace(recipe.plan(), accept_damage=True)  # a destroyed block is a point of the curve too
        check_matrices(job.matrices, job.stream, plan)
        check_plan(plan, job.stream, job.matrices, job.stream.dtype)
        rows.append((recipe, plan))
    if quick:
        check_quick(job, rows)
        rows = [(recipe, replace(plan, asymmetric=False)) for recipe, plan in rows]  # the dense path is the only one
    return Sweep(job, rows, quick)


def check_quick(job: Job, rows: list[tuple[Recipe, Plan]]) -> None:
    """Raises RequestError for rows that need the pruned model: a quick sweep has one pass over the blocks for all rows."""
    slow = [
        recipe.quality or recipe.method for recipe, plan in rows if plan.reconstruct or plan.polish_steps or plan.permute or is_tried(plan.allocation)
    ]
    if slow:
        raise RequestError(f"quick sweep of {slow[0]}, which trains or tries out pruned models", "omit it, or --quick")
    if not isinstance(job.stream, CheckpointStream):
        raise RequestError("quick sweep of a model that cannot be loaded block by block", "leave --quick out")
    if len(job.stream.names) in job.matrices:
        raise RequestError("quick sweep with a pruned head", "exclude the head with --skip, or omit --quick")


def phases_of_sweep(sweep: Sweep) -> Phases:
    """As ``phases``; its rows are one of them."""
    each = [cost for name, cost in (*pruning(sweep.job), *pruned_evaluation(sweep.job)) if name != "gradients"]
    gradients = [(name, cost) for name, cost in pruning(sweep.job) if name == "gradients"]
    return [*dense_evaluation(sweep.job), *gradients, ("sweep", sum(each) * len(sweep.rows))]


def run_sweep(sweep: Sweep, listen: Listener = SILENT) -> SweepReport:
    """Every row that an interrupted sweep of the same request has not finished. The output appears whole, or not at all."""
    job = sweep.job
    identity = job.identity | {"recipe": [recipe.resolved() for recipe, _ in sweep.rows], "quick": sweep.quick}
    journal = Journal(job.output, identity, job.restart)
    try:
        job.stream.scratch = journal.folder
        check_first_window(job, journal)
        head = len(job.stream.names) in job.matrices
        dense = dense_passes(job.stream, job.data.evaluation, head, journal, listen)
        missing = [number for number in range(len(sweep.rows)) if journal.read(f"row-{number:05d}") is None]
        common = Common(sweep, listen)
        made = (quick_rows if sweep.quick else whole_rows)(job, [sweep.rows[number] for number in missing], dense, common)
        for number, row in zip(missing, made, strict=True):
            journal.write(f"row-{number:05d}", asdict(row))
            listen.progress("sweep", number + 1, len(sweep.rows))
        rows = [typed(SweepRow, journal.read(f"row-{number:05d}")) for number in range(len(sweep.rows))]
        source = Origin(job.source.name, job.source.revision, job.source.hashes)
        values = tuple(one.perplexity for one in dense)
        report = SweepReport(values, tuple(rows), describe(job.data.calibration), source, job.environment, job.output, sweep.quick)
        make_folder(journal.weights)
        for name, data in files_of(report):
            write_whole(journal.weights / name, data)
        journal.publish()
        return report
    finally:
        journal.close()


def files_of(report: SweepReport) -> Iterator[tuple[str, bytes]]:
    yield SWEEP, to_versioned_json(report.to_json())
    yield "sweep.md", markdown(report).encode()
    yield "sweep.svg", draw(report)


def of_weights(plan: Plan) -> bool:
    """Whether a plan needs gradients of weights, not only of outputs."""
    return bool(needs_of(plan) & PER_WEIGHT)


class Common:
    """What the rows share, computed when the first of them needs it."""

    def __init__(self, sweep: Sweep, listen: Listener) -> None:
        self._sweep, self._listen = sweep, listen
        self._gradients: dict[bool, LossGradients | None] = {}
        self._measured: dict[Any, Measured] = {}

    def gradients(self, kind: bool) -> LossGradients | None:
        """Of the rows that are ``of_weights``, or of the others: they are taken over different windows and targets."""
        if kind not in self._gradients:
            job = self._sweep.job
            plans = [plan for _, plan in self._sweep.rows if of_weights(plan) == kind]
            self._gradients[kind] = dense_gradients(job.stream, job.data.calibration.ids_NL, job.matrices, plans, self._listen)
        return self._gradients[kind]

    def work(self, plan: Plan) -> Work:
        """A row's."""
        return replace(self._sweep.job.work, plan=plan, gradients=self.gradients(of_weights(plan)))

    def ratios(self, plan: Plan) -> Ratios:
        """The ratio of each matrix by a plan."""
        return choose(self.work(plan), self._sweep.job.data.held, self.measured(plan), self._listen)

    def measured(self, plan: Plan) -> Measured:
        """Of a plan's allocation; the sparsity does not matter."""
        key = replace(plan, sparsity=0.0)
        if key not in self._measured:
            self._measured[key] = measure(self.work(plan), self._listen)
        return self._measured[key]


def whole_rows(job: Job, rows: list[tuple[Recipe, Plan]], dense: list[Dense], common: Common) -> Iterator[SweepRow]:
    """Each row as a separate run."""
    for recipe, plan in rows:
        yield prune_row(job, recipe, plan, dense, common)


def prune_row(job: Job, recipe: Recipe, plan: Plan, dense: list[Dense], common: Common) -> SweepRow:
    """Prune, measure, forget."""
    common.measured(plan)
    began = perf_counter()
    work, asked = common.work(plan), common.ratios(plan).asked
    with job.stream.trial():
        blocks = prune(work.stream, work.windows_NL, fine_pruner(work, asked), {}, SILENT)
        return row_of(recipe, plan, dense, [row for block in blocks for row in block.rows], perf_counter() - began)


def row_of(recipe: Recipe, plan: Plan, dense: list[Dense], rows: list[Row], seconds: float) -> SweepRow:
    """The figures of the model as the stream holds it now."""
    found = [pruned_pass(one, one.flow.stream) for one in dense]
    sparsity = sum(row.zeros for row in rows) / sum(row.rows * row.columns for row in rows)
    values, moved = tuple(value for value, _ in found), tuple(divergence for _, divergence in found)
    return SweepRow(recipe.method or recipe.quality or "", recipe.pattern, plan.sparsity, sparsity, values, moved, seconds)


@torch.no_grad()
def quick_rows(job: Job, rows: list[tuple[Recipe, Plan]], dense: list[Dense], common: Common) -> Iterator[SweepRow]:
    """All rows in one pass over the dense model: what enters its matrices is summed, and factored, once; every row prunes by it."""
    stream, kinds = job.stream, [of_weights(plan) for _, plan in rows]
    gradients = {kind: common.gradients(kind) for kind in set(kinds)}
    assert isinstance(stream, CheckpointStream)
    ratios = [common.ratios(plan) for _, plan in rows]
    drafts, found, seconds = [stream.draft() for _ in rows], [[] for _ in rows], [0.0] * len(rows)  # type: ignore[var-annotated]
    needs = frozenset[Stat]().union(*(plan.needs for _, plan in rows))
    flow = Flow(stream, job.data.calibration.ids_NL)
    for index, matrices in job.matrices.items() if rows else ():
        with stream.block(index) as block:
            statistics = survey(flow, index, block, matrices, needs)
            sums = dict.fromkeys({plan.ours for _, plan in rows}, statistics)  # the two kinds trust them differently where there are few tokens
            if len(sums) == 2 and any(few_tokens(m.columns, statistics[m.name].tokens, ours=True) for m in matrices):
                sums[False] = deepcopy(statistics)
            for ours, own in sums.items():
                shrink(own.values(), ours)
            graded = {(ours, kind): dict(own) for ours, own in sums.items() for kind in gradients}
            for (_, kind), own in graded.items():
                if (found_gradients := gradients[kind]) is not None:
                    found_gradients.add_to(index, own)
            weights = {p: block.get_parameter(p).clone() for p in {m.parameter for m in matrices}}
            for number, ((_, plan), draft) in enumerate(zip(rows, drafts, strict=True)):
                began = perf_counter()
                for name, value in weights.items():
                    block.get_parameter(name).copy_(value)
                asked = ratios[number].asked
                found[number] += [
                    prune_matrix(stream, index, block, m, graded[plan.ours, kinds[number]][m.name], plan, asked[f"{stream.path_of(index)}.{m.name}"])
                    for m in matrices
                ]
                with stream.trial(draft):
                    stream.keep(index, weights)
                seconds[number] += perf_counter() - began
    for number, ((recipe, plan), draft) in enumerate(zip(rows, drafts, strict=True)):
        with stream.trial(draft):
            yield row_of(recipe, plan, dense, found[number], seconds[number])
