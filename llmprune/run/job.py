"""One pruning run from request to folder: preflight, windows, perplexity, pruning with a journal, perplexity again, publication."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

from llmprune.benchmark.memory import peak_resident
from llmprune.checkpoint.files import REPORT, make_folder, remove, to_versioned_json, write_whole
from llmprune.checkpoint.journal import Journal
from llmprune.checkpoint.manifest import Manifest, file_hashes, manifest_of
from llmprune.checkpoint.sink import Sink
from llmprune.checkpoint.source import open_folder
from llmprune.data.store import save_windows
from llmprune.errors import RequestError
from llmprune.evaluation import sample
from llmprune.evaluation.beside import dense_passes, pruned_pass
from llmprune.evaluation.replay import check_replay
from llmprune.export.check import MOST_TOKENS, check_result, fits, predictions
from llmprune.export.reload import Reloader
from llmprune.export.save import rounded_to, save_smaller
from llmprune.model.matrices import Selection
from llmprune.model.skeleton import count_parameters
from llmprune.pruners.coarse import COARSE
from llmprune.pruners.rotation import rotate
from llmprune.publish.card import write_card
from llmprune.ratios.trials import Decision
from llmprune.report.page import page
from llmprune.report.result import Report
from llmprune.results import BlockReport, Evaluation, NoSample, Polished, Reloaded, Sample, Smaller, Timings
from llmprune.run.phases import has_sample
from llmprune.run.planning import planned, with_budget
from llmprune.run.preflight import check_still
from llmprune.run.prepare import Job, asked_windows, describe, described
from llmprune.run.resume import finished_parts
from llmprune.run.steps import decided, prune_blocks, with_gradients
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.reshaped import Reshaped
from llmprune.stream.stream import Stream
from llmprune.types import SILENT, Listener

WRITES = 3  # steps of writing: the files, their hashes, the check of the result and the report
SMALL = 100_000_000  # parameters of a model whose perplexity is measured sooner than a process has imported transformers


def run(job: Job, listen: Listener = SILENT) -> Report:
    """Prune, or resume what an interrupted run of the same request has left. The output appears whole, or not at all."""
    began = perf_counter()
    data = job.data
    journal = Journal(job.output, job.identity, job.restart)
    parameters = count_parameters(job.stream.skeleton)
    loads_whole = fits(parameters, job.stream.dtype)
    with Reloader(job.source.folder, journal.folder, job.stream.dtype) as reloader:
        try:
            check_still(job.output, job.source.folder, job.overwrite, journal)
            if loads_whole and parameters < SMALL:
                reloader.start()
            save_windows(journal.folder, data, asked_windows(job.recipe))
            job.stream.scratch = journal.folder
            check_first_window(job, journal)
            turned = rotated(job, journal, listen) if job.recipe.rotate else job
            sink = Sink(journal.weights, turned.source, journal.polished if job.writes_again else None)
            sink.lay_out()
            dense = dense_passes(job.stream, data.evaluation, len(job.stream.names) in job.matrices, journal, listen)
            prompt = sample.prompt_for(job.stream, job.source) if has_sample(job) else sample.TOO_LONG
            dense_text = sample.written(job.stream, prompt, listen)
            done = prune_job(turned, journal, sink, listen)
            if loads_whole:
                reloader.start()  # it imports meanwhile
            found = tuple(Evaluation(d.perplexity, *pruned_pass(d, done.now, listen)) for d in dense)
            written = sample.beside(prompt, dense_text, sample.written(done.now, prompt, listen))
            result = saved(turned, journal, sink, done, reloader, listen)
            report = report_of(job, done, found, result, written, perf_counter() - began)
            publish(result.folder, report, job)
            journal.publish(result.folder)
            listen.progress("write", WRITES, WRITES)
            return report
        finally:
            journal.close()


def report_of(job: Job, done: Done, found: tuple[Evaluation, ...], result: Saved, written: Sample | NoSample, seconds: float) -> Report:
    """The report of the run. found: perplexities; written: how the dense and the pruned model continue a prompt."""
    return Report(
        recipe=job.recipe.resolved(),
        source=described(job.source, job.stream),
        calibration=describe(job.data.calibration),
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
        smaller=result.smaller,
        reloaded=result.reloaded,
        files=result.manifest.files,
        tensors=result.manifest.tensors,
        sample=written,
        timings=Timings(seconds, done.resumed, peak_resident(), job.footprint.peak.total),
    )


def publish(folder: Path, report: Report, job: Job) -> None:
    """Card, llmprune.json and page beside the weights."""
    write_card(folder, report, job.recipe, job.source)
    written = to_versioned_json(report.to_json())
    write_whole(folder / REPORT, written)
    write_whole(folder / "report.html", page(Report.from_json(json.loads(written))).encode())  # as llmprune report makes it again


def check_first_window(job: Job, journal: Journal) -> None:
    """Check once that the model run block by block is the model; a resumed run knows already, and a refused one leaves nothing."""
    if journal.read("replay") is not None:
        return
    try:
        journal.write("replay", {"difference": check_replay(job.stream, job.data.calibration.ids_NL[:1])})
    except RequestError:
        if not journal.resumed:
            journal.discard()
        raise


def rotated(job: Job, journal: Journal, listen: Listener) -> Job:
    """The same job for the model with its residual stream rotated, stored in the partial folder."""
    folder = journal.folder / "rotated"
    record = journal.read("rotated")
    if record is None or file_hashes(folder) != record["files"]:
        if folder.exists():
            remove(folder)
        make_folder(folder)
        assert isinstance(job.stream, CheckpointStream)
        rotate(job.stream, job.data.calibration.ids_NL, folder, listen)
        journal.write("rotated", {"files": file_hashes(folder)})
    source = open_folder(folder, job.source.name)
    stream = CheckpointStream(source, job.stream.dtype, job.stream.device)
    stream.scratch = journal.folder
    plan, matrices = planned(job.recipe, stream, Selection())
    return replace(job, source=source, stream=stream, plan=with_budget(job.recipe, plan, stream, matrices, source), matrices=matrices)


@dataclass(frozen=True)
class Done:
    """A pruned model on its way to the disk. now: the stream as it shows the model."""

    blocks: tuple[BlockReport, ...]
    polish: Polished | None
    decision: Decision
    now: Stream
    resumed: int  # blocks that an earlier process had finished


def prune_job(job: Job, journal: Journal, sink: Sink, listen: Listener) -> Done:
    """Prune what an interrupted run has not finished, with a record of every block."""
    mode = COARSE.get(job.recipe.pattern)
    needed = ("ratios", "choice") if mode is not None and mode.chooses else ("ratios",)
    finished, polish = finished_parts(journal, sink, len(job.matrices), needed)
    work = job.work if len(finished) == len(job.matrices) else with_gradients(job.work, listen)
    decision = decided(job.recipe, work, job.data, journal, listen)
    job.stream.write_to(sink)
    listen.progress("prune", len(finished), len(job.matrices))
    polished = [] if polish is None else [polish]
    recording = replace(listen, on_block=partial(record_block, job, journal, listen), on_polish=partial(record_polish, job, journal, polished))
    blocks, now = prune_blocks(job.recipe, work, decision, journal, recording, finished, polished=polish is not None)
    return Done(tuple(blocks), polished[0] if polished else None, decision, now, len(finished))


def record_block(job: Job, journal: Journal, listen: Listener, index: int, report: BlockReport, hashes: dict[str, str]) -> None:
    if job.stream.resumable:
        journal.write(f"block-{index:05d}", {"report": asdict(report), "hashes": hashes})
    listen.progress("prune", index + 1, len(job.matrices))


def record_polish(job: Job, journal: Journal, polished: list[Polished], done: Polished, hashes: dict[str, str]) -> None:
    polished.append(done)
    if job.stream.resumable:
        journal.write("polished", {"report": asdict(done), "hashes": hashes})


@dataclass(frozen=True)
class Saved:
    """The finished checkpoint. smaller: where units have been cut out."""

    folder: Path
    manifest: Manifest
    smaller: Smaller | None
    reloaded: Reloaded


def saved(job: Job, journal: Journal, sink: Sink, done: Done, reloader: Reloader, listen: Listener) -> Saved:
    """Write the checkpoint, and load it again. job: of the rotated model, if it is one; reloader: with the source as it was given."""
    ids_1L = job.data.text(MOST_TOKENS)
    listen.progress("write", 0, WRITES)
    wanted_1LV = predictions(done.now, ids_1L)
    dropped = any(row.dropped for block in done.blocks for row in block.rows)
    if dropped and isinstance(done.now, Reshaped) and isinstance(job.stream, CheckpointStream):
        about = (job.stream, done.now, done.blocks, job.recipe.pad)
        folder, smaller, dtype = journal.smaller, save_smaller(*about, journal.smaller), rounded_to(*about)
    else:
        job.stream.finish()
        sink.finish()
        folder, smaller, dtype = journal.weights, None, job.stream.dtype
    parameters = smaller.parameters if smaller else count_parameters(job.stream.skeleton)
    reloader.ask(folder, ids_1L)  # it is loaded while its bytes are hashed
    listen.progress("write", 1, WRITES)
    manifest = manifest_of(folder)
    listen.progress("write", 2, WRITES)
    reloaded = check_result(job.stream, folder, wanted_1LV, ids_1L, parameters, dtype, smaller is not None, reloader)
    return Saved(folder, manifest, smaller, reloaded)
