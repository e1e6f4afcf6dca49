"""One pruning run from request to folder: preflight, windows, perplexity, pruning with a journal, perplexity again, publication."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

from llmprune.benchmark.memory import peak_resident
from llmprune.checkpoint.files import REPORT, make_folder, remove, to_versioned_json, write_whole
from llmprune.checkpoint.journal import Journal
from llmprune.checkpoint.manifest import file_hashes, manifest_of
from llmprune.checkpoint.sink import Sink
from llmprune.checkpoint.source import open_folder
from llmprune.data.store import save_windows
from llmprune.engine import prune
from llmprune.errors import RequestError
from llmprune.evaluation import sample
from llmprune.evaluation.beside import dense_passes, pruned_pass
from llmprune.export.save import save_smaller
from llmprune.model.matrices import Selection
from llmprune.model.skeleton import count_parameters
from llmprune.pruners.coarse import coarse_blocks
from llmprune.pruners.rotation import rotate
from llmprune.pruners.units import graded
from llmprune.publish.card import write_card
from llmprune.ratios import measured as shares
from llmprune.ratios.measured import Ratios, dense_gradients, needs_of
from llmprune.ratios.trials import Decision, choose, decide
from llmprune.recipe.named import COARSE
from llmprune.report.fields import typed
from llmprune.report.page import page
from llmprune.report.result import Report
from llmprune.results import BlockReport, Evaluation, Polished, Smaller, Step, Timings
from llmprune.run.planning import planned, with_budget, with_latency
from llmprune.run.preflight import check_output
from llmprune.run.prepare import Job, asked_windows, describe, described
from llmprune.run.resume import finished_parts
from llmprune.statistics.gradients import LossGradients
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.reshaped import Reshaped
from llmprune.stream.stream import Stream
from llmprune.structured.structure import Structure
from llmprune.types import Plan

Progress = Callable[[str, int, int], None]


def quiet(step: str, done: int, total: int) -> None:
    """A progress callback that says nothing."""


def run(job: Job, progress: Progress = quiet) -> Report:
    """Prune, or go on with what an interrupted run of the same request has left. The output appears whole, or not at all."""
    began = perf_counter()
    data = job.data
    journal = Journal(job.output, job.identity, job.restart)
    try:
        check_still(job, journal)
        save_windows(journal.folder, data, asked_windows(job.recipe))
        turned = rotated(job, journal, progress) if job.recipe.rotate else job
        sink = Sink(journal.weights, turned.source, journal.polished if job.writes_again else None)
        sink.lay_out()
        job.stream.scratch = journal.folder
        dense = dense_passes(job.stream, data.evaluation, len(job.stream.names) in job.matrices, journal, partial(progress, "perplexity, dense"))
        prompt = sample.prompt_for(job.stream, job.source)
        dense_text = sample.written(job.stream, prompt)
        done = prune_job(turned, journal, sink, progress)
        found = tuple(Evaluation(d.perplexity, *pruned_pass(d, done.now, partial(progress, "perplexity, pruned"))) for d in dense)
        pruned_text = sample.written(done.now, prompt)
        folder, smaller = saved(turned, journal, sink, done)
        manifest = manifest_of(folder)
        report = Report(
            recipe=job.recipe.resolved(),
            source=described(job.source),
            calibration=describe(data.calibration),
            blocks=done.blocks,
            perplexity=found,
            parameters=count_parameters(job.stream.skeleton),
            environment=job.environment,
            output=job.output,
            polish=done.polish,
            asked=done.decision.sparsity,
            reasons=done.decision.ratios.reasons,
            tried=done.decision.ratios.tried,
            frontier=done.decision.frontier,
            smaller=smaller,
            files=manifest.files,
            tensors=manifest.tensors,
            sample=sample.beside(prompt, dense_text, pruned_text),
            timings=Timings(perf_counter() - began, done.resumed, peak_resident(), job.footprint.peak.total),
        )
        write_card(folder, report, job.recipe, job.source)
        written = to_versioned_json(report.to_json())
        write_whole(folder / REPORT, written)
        write_whole(folder / "report.html", page(Report.from_json(json.loads(written))).encode())  # as llmprune report makes it again
        journal.publish(folder)
        return report
    finally:
        journal.close()


def check_still(job: Job, journal: Journal) -> None:
    """The output may be written now that nobody else can: another run may have finished it since ``prepare``."""
    try:
        check_output(job.output, job.source.folder, job.overwrite)
    except RequestError:
        if not journal.resumed:
            journal.discard()
        raise


def rotated(job: Job, journal: Journal, progress: Progress) -> Job:
    """The same job for the model with its residual stream turned, which lies in the partial folder."""
    folder = journal.folder / "rotated"
    record = journal.read("rotated")
    if record is None or file_hashes(folder) != record["files"]:
        if folder.exists():
            remove(folder)
        make_folder(folder)
        assert isinstance(job.stream, CheckpointStream)
        rotate(job.stream, job.data.calibration.ids_NL, folder, partial(progress, "rotate"))
        journal.write("rotated", {"files": file_hashes(folder)})
    source = open_folder(folder, job.source.name)
    stream = CheckpointStream(source, job.stream.dtype, job.stream.device)
    stream.scratch = journal.folder
    plan, matrices = planned(job.recipe, stream, Selection())
    return replace(job, source=source, stream=stream, plan=with_budget(job.recipe, plan, stream, matrices, source), matrices=matrices)


@dataclass(frozen=True)
class Done:
    """A pruned model on its way to the disk. now: the stream as it shows the model; structure: what was cut, if a structured pattern did it."""

    blocks: tuple[BlockReport, ...]
    polish: Polished | None
    decision: Decision
    now: Stream
    structure: Structure | None
    resumed: int  # blocks that an earlier process had finished


def prune_job(job: Job, journal: Journal, sink: Sink, progress: Progress) -> Done:
    """Prune what an interrupted run has not finished, with a record of every block."""
    ids_NL = job.data.calibration.ids_NL
    needed = ("ratios", "choice") if job.recipe.pattern in ("layers", "hidden") else ("ratios",)
    finished, polish = finished_parts(journal, sink, len(job.matrices), needed)
    gradients = None
    if len(finished) < len(job.matrices):
        wanted = graded(job.stream, job.matrices, job.plan)
        gradients = dense_gradients(job.stream, ids_NL, wanted, needs_of(job.plan), partial(progress, "gradients"))
    decision = decided(job, journal, gradients, progress)
    plan = replace(job.plan, sparsity=decision.sparsity)
    job.stream.write_to(sink)
    progress("prune", len(finished), len(job.matrices))

    def on_block(index: int, report: BlockReport, hashes: dict[str, str]) -> None:
        if not job.stream.resumable:
            return progress("prune", index + 1, len(job.matrices))
        record = {"report": asdict(report), "hashes": hashes}
        journal.write(f"block-{index:05d}", record)
        progress("prune", index + 1, len(job.matrices))

    def on_polish(done: Polished, hashes: dict[str, str]) -> None:
        nonlocal polish
        polish = done
        if job.stream.resumable:
            journal.write("polished", {"report": asdict(done), "hashes": hashes})

    blocks = list(finished.values())
    structure = plan.pattern if isinstance(plan.pattern, Structure) else None
    shown = Reshaped(job.stream, structure) if structure else None
    if shown is not None and structure is not None and structure.name in COARSE:
        criterion, asked = job.recipe.parts.criterion, decision.ratios.asked
        choice, steps = (journal.read("choice"), partial(journal.write, "choice")), partial(progress, structure.name)
        blocks = coarse_blocks(shown, structure, plan, job.matrices, ids_NL, criterion, asked, gradients, finished, on_block, choice, steps)
    elif len(finished) < len(job.matrices) or (plan.polish_steps and not polish):
        steps = partial(progress, "polish")
        blocks = prune(job.stream, ids_NL, plan, job.matrices, gradients, decision.ratios.asked, None, finished, on_block, on_polish, steps)
    return Done(tuple(blocks), polish, decision, shown or job.stream, structure, len(finished))


def saved(job: Job, journal: Journal, sink: Sink, done: Done) -> tuple[Path, Smaller | None]:
    """(the folder of the finished checkpoint, what has become of it if units have been cut out)."""
    gone = any(row.gone for block in done.blocks for row in block.rows)
    if gone and done.structure is not None and isinstance(done.now, Reshaped) and isinstance(job.stream, CheckpointStream):
        ids_NL = job.data.calibration.ids_NL
        smaller = save_smaller(job.stream, done.now, done.structure, done.blocks, ids_NL, job.recipe.pad, journal.smaller, journal.folder)
        return journal.smaller, smaller
    job.stream.finish()
    sink.finish()
    return journal.weights, None


def decided(job: Job, journal: Journal, gradients: LossGradients | None, progress: Progress) -> Decision:
    """What goes in all and of each matrix: as an earlier process found it, or measured now, before anything is pruned."""
    record = journal.read("ratios")
    if record is None:
        known = journal.read("frontier") or {"steps": []}

        def on_step(step: Step) -> None:
            known["steps"].append(asdict(step))
            journal.write("frontier", known)

        steps = typed(tuple[Step, ...], known["steps"])
        data, increase = job.data, job.recipe.max_ppl_increase
        plan = with_latency(job.recipe, job.plan, job.stream, data.calibration.ids_NL, partial(progress, "latency"))
        found = decide(job.stream, data.calibration, data.held, plan, job.matrices, gradients, increase, steps, on_step, progress)
        record = asdict(found)
        journal.write("ratios", record)
    return typed(Decision, record)


def ratios_of(job: Job, plan: Plan, measured: shares.Measured, gradients: LossGradients | None) -> Ratios:
    """What each matrix gives up by a plan for the job's model."""
    return choose(job.stream, job.data.calibration, job.data.held, plan, job.matrices, gradients, measured)
