"""One pruning run from request to folder: preflight, windows, perplexity, pruning with a journal, perplexity again, publication."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import llmprune
from llmprune import heap, shares
from llmprune.checkpoint.files import make_folder, remove, to_json, write_whole
from llmprune.checkpoint.journal import Journal, partial_folder
from llmprune.checkpoint.manifest import check_source, file_hashes, manifest_of
from llmprune.checkpoint.resolve import open_source
from llmprune.checkpoint.sink import Sink
from llmprune.checkpoint.source import Source, open_folder
from llmprune.cutting import graded
from llmprune.data.store import load_windows, save_windows
from llmprune.data.windows import RunData, Windows
from llmprune.engine import prune
from llmprune.errors import ConversionError, RequestError
from llmprune.evaluation import sample
from llmprune.evaluation.beside import dense_passes, pruned_pass
from llmprune.evaluation.memory import peak_resident
from llmprune.footprint import Footprint, footprint
from llmprune.gather import gather_windows
from llmprune.gradients import LossGradients
from llmprune.methods import COARSE
from llmprune.model.matrices import Matrix, Selection
from llmprune.model.skeleton import count_parameters
from llmprune.planning import planned, with_budget, with_latency
from llmprune.preflight import (
    check_ids,
    check_output,
    check_plan,
    check_space,
    choose_device,
    choose_dtype,
)
from llmprune.recipe import Recipe
from llmprune.report.card import write_card
from llmprune.report.page import page
from llmprune.report.result import Measured, Report, block_from_json, block_to_json
from llmprune.reshaped import Reshaped
from llmprune.rotate import rotate
from llmprune.shares import Ratios, dense_gradients, needs_of
from llmprune.smaller import Smaller, coarse_blocks, save_smaller
from llmprune.stream import CheckpointStream, Stream
from llmprune.structured.structure import Structure
from llmprune.trials import Decision, Step, choose, decide
from llmprune.types import BlockReport, Plan, Polished
from llmprune.whole import WholeStream

Progress = Callable[[str, int, int], None]


def quiet(step: str, done: int, total: int) -> None:
    """A progress callback that says nothing."""


@dataclass
class Job:
    """A checked run, ready to start: what ``--dry-run`` describes."""

    recipe: Recipe
    plan: Plan
    source: Source
    stream: CheckpointStream | WholeStream
    matrices: dict[int, list[Matrix]]
    data: RunData
    footprint: Footprint
    output: Path
    overwrite: bool
    restart: bool

    @property
    def writes_again(self) -> bool:
        """What was pruned and is on the disk is distilled at the end, and written a second time, beside it."""
        return bool(self.plan.polish_steps) and self.stream.resumable

    @property
    def identity(self) -> dict[str, Any]:
        """All that must be equal for a run to go on where another stopped."""
        return {
            "recipe": self.recipe.resolved(),
            "source": self.source.hashes,
            "calibration": self.data.calibration.sha256,
            "evaluation": [w.sha256 for w in self.data.evaluation],
            "held": self.data.held.sha256 if self.data.held else None,
        } | environment(self.stream)

    def __str__(self) -> str:
        """What the run is about to do, in four lines."""
        recipe = self.recipe.resolved()
        goal = f"{self.recipe.max_ppl_increase:.3g} more perplexity" if self.recipe.max_ppl_increase else f"{self.plan.sparsity:.6g}"
        matrices = [m for ms in self.matrices.values() for m in ms]
        structure = self.plan.pattern if isinstance(self.plan.pattern, Structure) else None
        weights = structure.weights if structure else sum(m.rows * m.columns for m in matrices)
        indices = range(len(self.stream.names)) if structure else self.matrices
        places = [self.stream.skeleton.get_submodule(self.stream.path_of(i)) for i in indices]
        in_places = sum(p.numel() for place in places for p in place.parameters())
        parts = " + ".join(p for p in (recipe["criterion"], recipe["solver"]) if p)
        group = f" per {recipe['group']}" if recipe["group"] else ""
        head = " and the head" if len(self.matrices) > len(self.stream.names) else ""
        dtype = str(self.stream.dtype).removeprefix("torch.")
        return (
            f"{self.source.name}: {structure.described if structure else f'{len(matrices)} matrices'} in {len(self.stream.names)} blocks{head}, "
            f"{weights:,} weights, {weights / in_places:.1%} of theirs; "
            f"{recipe['pattern']} at {goal} by {parts}{group}, {recipe['allocation']} ratios\n"
            f"{self.describe_data()}\n"
            f"{self.footprint}\n"
            f"output: {self.output} ({self.source.bytes:,} bytes), {self.stream.device}, {dtype}"
            + ("" if self.stream.resumable else "; the whole model in memory, not resumable: its tensors cannot be converted block by block")
        )

    def describe_data(self) -> str:
        calibration = self.data.calibration
        count, length = calibration.ids_NL.shape
        held = f", {len(self.data.held.ids_NL)} more held back for trials" if self.data.held else ""
        return f"calibration: {count} windows of {length} from {calibration.dataset} ({calibration.split}){held}"


def environment(stream: CheckpointStream | WholeStream) -> dict[str, Any]:
    decoder = stream.source.decoder
    reads = ("compressed-tensors",) if decoder and decoder.method == "compressed-tensors" else ()
    libraries = {name: version(name) for name in ("torch", "transformers", "safetensors", *reads)}
    return libraries | {
        "llmprune": llmprune.__version__,
        "python": platform.python_version(),
        "device": str(stream.device),
        "dtype": str(stream.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "block_by_block": stream.resumable,
    }


def prepare(recipe: Recipe, windows: Tensor | None = None, overwrite: bool = False, restart: bool = False, result: str = "config.json") -> Job:
    """Check a request against the model, its data and the disk. No forward is run, and nothing is written; what a crash has left beside a finished
    output goes.

    windows: calibration token ids [N, L] that stand in for a text. result: a file by which an output that may be replaced is known. Raises
    RequestError.
    """
    source = open_source(recipe.model, recipe.revision)
    output = Path(recipe.output or recipe.default_output).expanduser()
    check_output(output, source.folder, overwrite, result)
    device = choose_device(recipe.device)
    stream = open_stream(source, choose_dtype(recipe.dtype, device, source), device)
    selection = Selection(recipe.skip, recipe.only)
    plan, matrices = planned(recipe, stream, selection)
    plan = with_budget(recipe, plan, stream, matrices, source)
    check_plan(plan, stream, matrices, stream.dtype)
    stored = None if restart or windows is not None else load_windows(partial_folder(output), asked_windows(recipe))
    data = stored or gather_windows(recipe, source, stream, windows)
    for part in data.all():
        check_ids(part, stream.skeleton)
    memory = footprint(stream, plan, matrices, data)
    job = Job(recipe, plan, source, stream, matrices, data, memory, output, overwrite, restart)
    copies = 1 + recipe.structured + recipe.rotate + job.writes_again
    check_space(output, source.folder, source.bytes * copies, sum(part.ids_NL.nbytes for part in data.all()))
    memory.check()
    source.scan()
    check_source(source)
    return job


def asked_windows(recipe: Recipe) -> str:
    """The request that a run's windows were made for: those of another one are not taken for them."""
    return hashlib.sha256(to_json(recipe.resolved())).hexdigest()


def open_stream(source: Source, dtype: torch.dtype, device: torch.device) -> CheckpointStream | WholeStream:
    """The source block by block, or whole where transformers' conversion cannot be done and undone a block at a time."""
    try:
        stream = CheckpointStream(source, dtype, device)
        stream.loader.try_conversion()
        return stream
    except ConversionError:
        return WholeStream(source, dtype, device)


def run(job: Job, progress: Progress = quiet) -> Report:
    """Prune, or go on with what an interrupted run of the same request has left. The output appears whole, or not at all."""
    began = perf_counter()
    heap.steady()
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
        found = tuple(Measured(d.perplexity, *pruned_pass(d, done.now, partial(progress, "perplexity, pruned"))) for d in dense)
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
            environment=environment(job.stream),
            output=job.output,
            polish=done.polish,
            asked=done.decision.sparsity,
            reasons=done.decision.ratios.reasons,
            tried=done.decision.ratios.tried,
            frontier=tuple(asdict(step) for step in done.decision.frontier),
            smaller=smaller.to_json() if smaller else None,
            files=manifest.files,
            tensors=manifest.tensors,
            sample=sample.to_json(prompt, dense_text, pruned_text),
            timings={
                "seconds": perf_counter() - began,
                "resumed_blocks": done.resumed,
                "peak_memory": peak_resident(),
                "planned_memory": job.footprint.peak.total,
            },
        )
        write_card(folder, report, job.recipe, job.source)
        written = to_json(report.to_json())
        write_whole(folder / "llmprune.json", written)
        write_whole(folder / "report.html", page(json.loads(written)).encode())
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
    polish: dict[str, Any] | None
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
        record = {"report": block_to_json(report), "seconds": report.seconds, "hashes": hashes}
        journal.write(f"block-{index:05d}", record)
        progress("prune", index + 1, len(job.matrices))

    def on_polish(done: Polished, hashes: dict[str, str]) -> None:
        nonlocal polish
        polish = polish_to_json(done, job.stream)
        if job.stream.resumable:
            journal.write("polished", {"report": polish, "hashes": hashes})

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


def finished_parts(journal: Journal, sink: Sink, blocks: int, needed: tuple[str, ...]) -> tuple[dict[int, BlockReport], dict[str, Any] | None]:
    """(the leading blocks that an earlier process finished and whose tensors still have their hashes, what its distillation did if it came
    that far). needed: records that all blocks rest on.
    """
    if any(journal.read(name) is None for name in needed):
        return {}, None
    polished = journal.read("polished")
    if polished is not None and not sink.accept_again(polished["hashes"]):
        polished = None
    later = polished["hashes"] if polished else {}
    finished: dict[int, BlockReport] = {}
    for index in range(blocks):
        record = journal.read(f"block-{index:05d}")
        if record is None or not sink.accept({key: h for key, h in record["hashes"].items() if key not in later}):
            if polished:  # the blocks before this one are not as they were when they were finished: begin anew
                sink.forget()
                return {}, None
            break
        finished[index] = block_from_json(record["report"], record["seconds"])
    return finished, polished["report"] if polished else None


def decided(job: Job, journal: Journal, gradients: LossGradients | None, progress: Progress) -> Decision:
    """What goes in all and of each matrix: as an earlier process found it, or measured now, before anything is pruned."""
    record = journal.read("ratios")
    if record is None:
        known = journal.read("frontier") or {"steps": []}

        def on_step(step: Step) -> None:
            known["steps"].append(asdict(step))
            journal.write("frontier", known)

        steps = tuple(Step(**step) for step in known["steps"])
        data, increase = job.data, job.recipe.max_ppl_increase
        plan = with_latency(job.recipe, job.plan, job.stream, data.calibration.ids_NL, partial(progress, "latency"))
        found = decide(job.stream, data.calibration, data.held, plan, job.matrices, gradients, increase, steps, on_step, progress)
        record = asdict(found)
        journal.write("ratios", record)
    ratios = Ratios(**{**record["ratios"], "tried": tuple(record["ratios"]["tried"])})
    return Decision(record["sparsity"], ratios, tuple(Step(**step) for step in record["frontier"]))


def ratios_of(job: Job, plan: Plan, measured: shares.Measured, gradients: LossGradients | None) -> Ratios:
    """What each matrix gives up by a plan for the job's model."""
    return choose(job.stream, job.data.calibration, job.data.held, plan, job.matrices, gradients, measured)


def polish_to_json(polished: Polished, stream: Stream) -> dict[str, Any]:
    value = asdict(polished)
    value["changed"] = [f"{stream.path_of(index)}.{name}" for index, names in polished.changed.items() for name in names]
    return value


def described(source: Source) -> dict[str, Any]:
    """What a report says of the source; bytes: of its plain weights."""
    value = {"name": source.name, "revision": source.revision, "files": source.hashes, "bytes": source.bytes}
    return value | ({"quantised": source.decoder.method} if source.decoder else {})


def describe(windows: Windows) -> dict[str, Any]:
    count, length = windows.ids_NL.shape
    name = {"dataset": windows.dataset, "split": windows.split}
    return name | {"windows": count, "window": length, "tokens": count * length, "sha256": windows.sha256}
