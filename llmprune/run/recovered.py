"""One recovery from a checked job to a folder: train, write what has changed, measure what was written, publish."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TypeAlias

import torch
from torch import Tensor

from llmprune.checkpoint.files import REPORT, to_versioned_json, write_whole
from llmprune.checkpoint.journal import Journal
from llmprune.checkpoint.manifest import manifest_of
from llmprune.checkpoint.sink import Sink
from llmprune.checkpoint.source import open_folder
from llmprune.evaluation import sample
from llmprune.export.check import MOST_TOKENS, check_result, from_disk
from llmprune.export.reload import Reloader
from llmprune.model.skeleton import count_parameters, own_sizes
from llmprune.publish.recovery import write_recovered_card
from llmprune.report.fields import typed
from llmprune.report.page import page
from llmprune.report.recovered import Measured, Recovered
from llmprune.report.result import Report
from llmprune.results import NoSample, Perplexity, Reloaded, Sample
from llmprune.run.preflight import check_still
from llmprune.run.prepare import describe
from llmprune.run.recovery import RecoveryJob
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.training.judge import Judge, perplexity_on
from llmprune.training.losses import Objective
from llmprune.training.masks import Masks, read_masks
from llmprune.training.parameters import Trained
from llmprune.training.recover import Curve, recover
from llmprune.types import SILENT, Listener

Written: TypeAlias = tuple[list[Perplexity], Sample | NoSample | None]  # perplexities of a written model, and its text


@dataclass(frozen=True)
class Outcome:
    """A trained model on its way to the disk. values: of the parameters that were trained; logits: of the model on a few tokens."""

    curve: Curve
    values: dict[str, Tensor]
    trained: int
    before: list[Perplexity]
    dense: list[Perplexity] | None
    ids_1L: Tensor
    logits_1LV: Tensor


def run_recovery(job: RecoveryJob, listen: Listener = SILENT) -> Report:
    """Train, or resume what an interrupted run of the same request has left. The output appears whole, or not at all."""
    began = perf_counter()
    with ExitStack() as held:
        held.enter_context(job.stream.whole())
        masks = read_masks(job.source.folder, job.stream.skeleton)  # refuses before anything is written
        trained = trained_of(job, masks)
        held.callback(trained.release)
        journal = Journal(job.output, job.identity, job.restart)
        held.callback(journal.close)
        check_still(job.output, job.source.folder, job.overwrite, journal)
        outcome = trained_model(job, trained, masks, journal, listen)
        sink = Sink(journal.weights, job.source)
        sink.lay_out()
        changed = write_changed(job, outcome, sink)
        sink.finish()
        reloaded = loaded_again(job, outcome, journal)
        after = measured_after(job, journal.weights, listen)
        report = report_of(job, outcome, changed, reloaded, journal.weights, after, perf_counter() - began)
        publish(journal.weights, report, job)
        journal.publish()
        return report


def trained_of(job: RecoveryJob, masks: Masks) -> Trained:
    asked = job.request
    model, tied = job.stream.skeleton, job.stream.loader.tied
    return Trained(
        model,
        masks,
        asked.parameters,
        lambda name: job.stream.loader.stored_dtype(tied.get(name, name)),
        asked.rank,
        asked.alpha,
        asked.seed,
    )


def trained_model(job: RecoveryJob, trained: Trained, masks: Masks, journal: Journal, listen: Listener) -> Outcome:
    """Measure, train with the dense model beside it, and check the zeros."""
    count, model = trained.count, job.stream.skeleton
    with ExitStack() as beside:
        if job.dense is not None:
            beside.enter_context(job.dense.whole())
        before, dense = measured_before(job, journal, listen)
        objective = Objective(job.loss, job.dense.skeleton if job.dense else None, job.request.temperature, job.request.mix)
        about = (job.train, job.settings, journal.folder, journal, listen, job.request.callbacks)
        curve, values = recover(trained, objective, Judge(job.deciding), *about)
    masks.check(model)
    ids_1L = job.deciding[0].windows.ids_NL[:1, :MOST_TOKENS]
    model.eval()
    with torch.no_grad():
        logits_1LV = model(input_ids=ids_1L.to(job.stream.device), use_cache=False).logits.float().cpu()
    return Outcome(curve, values, count, before, dense, ids_1L, logits_1LV)


def phases(job: RecoveryJob) -> list[tuple[str, float]]:
    """In order, each with an estimate of its work: the tokens of a forward, of which a step takes three, and one of the dense model."""
    tokens = [float(text.windows.ids_NL.numel()) for text in (*job.deciding, *job.evaluation)]
    names = ["pruned evaluation", *(["dense evaluation"] if job.dense else [])]
    settings = job.settings
    step = settings.batch * settings.length * (4 if job.dense else 3)
    decided = (settings.steps // settings.every + 1) * sum(tokens[: len(job.deciding)])
    measured = [(name, count) for name in names for count in tokens]
    return [*measured, ("recover", settings.steps * step + decided), *(("recovered evaluation", count) for count in tokens)]


def measured_before(job: RecoveryJob, journal: Journal, listen: Listener) -> tuple[list[Perplexity], list[Perplexity] | None]:
    """(of the pruned model, of the dense one where it is at hand) on every text, as an earlier process found them or measured now."""
    texts = (*job.deciding, *job.evaluation)
    record = journal.read("measured")
    if record is None:
        models = {"before": ("pruned evaluation", job.stream.skeleton)} | ({"dense": ("dense evaluation", job.dense.skeleton)} if job.dense else {})
        record = {
            name: [asdict(perplexity_on(model, text, partial(listen.progress, phase))) for text in texts] for name, (phase, model) in models.items()
        }
        journal.write("measured", record)
    before, dense = (typed(list[Perplexity] | None, record.get(name)) for name in ("before", "dense"))
    return before, dense


def write_changed(job: RecoveryJob, outcome: Outcome, sink: Sink) -> tuple[str, ...]:
    """Write the tensors that differ from the source's; their names."""
    loader, changed = job.stream.loader, set[str]()
    for name in outcome.values if outcome.curve.best else ():
        now = loader.checkpoint_tensors([loader.tied.get(name, name)])
        before = job.source.read_many(list(now))
        different = {key: tensor for key, tensor in now.items() if not torch.equal(tensor, before[key])}
        sink.write(different)
        changed |= different.keys()
    return tuple(sorted(changed))


def loaded_again(job: RecoveryJob, outcome: Outcome, journal: Journal) -> Reloaded:
    """Check that the written model is the trained one. Code that lies beside the weights is not run: such a model is read block by block."""
    about = (job.stream, journal.weights, outcome.logits_1LV, outcome.ids_1L)
    if own_sizes(job.source.config):
        return from_disk(*about, job.stream.dtype, "the code beside the weights is not run")
    parameters = count_parameters(job.stream.skeleton)
    with Reloader(job.source.folder, journal.folder, job.stream.dtype) as reloader:
        return check_result(*about, parameters, job.stream.dtype, False, reloader)


def measured_after(job: RecoveryJob, folder: Path, listen: Listener) -> Written:
    """(of the model as it was written, its continuation of the prompt that the pruning had)."""
    source = open_folder(folder, job.source.name)
    written = CheckpointStream(source, job.stream.dtype, job.stream.device)
    with written.whole():
        heard = partial(listen.progress, "recovered evaluation")
        found = [perplexity_on(written.skeleton, text, heard) for text in (*job.deciding, *job.evaluation)]
    before = job.report.sample
    if isinstance(before, Sample):
        before = replace(before, pruned=sample.written(written, sample.prompt_for(written, source, before.chat)))
    return found, before


def report_of(
    job: RecoveryJob, outcome: Outcome, changed: tuple[str, ...], reloaded: Reloaded, folder: Path, written: Written, seconds: float
) -> Report:
    """The pruning's record with the recovery's, which takes over what was measured before; results of tasks are no longer true.

    folder: of the result; written: what ``measured_after`` found in it.
    """
    after, text = written
    dense: Sequence[Perplexity | None] = outcome.dense or [None] * len(after)
    pairs = zip(outcome.before, after, dense, strict=True)
    measured = tuple(Measured(was, now, beside, n < len(job.deciding)) for n, (was, now, beside) in enumerate(pairs))
    recovered = Recovered(
        request=job.resolved,
        source=job.source.hashes,
        dense=job.dense.source.name if job.dense else None,
        data=describe(job.train.windows),
        learned=job.train.learned,
        trained=outcome.trained,
        best=outcome.curve.best,
        done=outcome.curve.steps,
        measured=measured,
        losses=outcome.curve.losses,
        held_out=outcome.curve.held_out,
        changed=changed,
        earlier=job.report.perplexity,
        notes=(*job.notes, *kept_back(job, outcome.curve)),
    )
    manifest = manifest_of(folder)
    return replace(
        job.report,
        output=job.output,
        files=manifest.files,
        tensors=manifest.tensors,
        reloaded=reloaded,
        recovered=(*job.report.recovered, recovered),
        perplexity=(),
        tasks=(),
        sample=text,
        timings=replace(job.report.timings, recovery_seconds=seconds),
    )


def kept_back(job: RecoveryJob, curve: Curve) -> tuple[str, ...]:
    """Why the start was kept, where one text became better and another one worse."""
    (_, start), *later = curve.held_out
    if curve.best or not any(now < then for _, losses in later for now, then in zip(losses, start, strict=True)):
        return ()
    worse = [text.windows for k, text in enumerate(job.deciding) if all(losses[k] > start[k] for _, losses in later)]
    named = ", ".join(f"{text.dataset} ({text.split})" for text in worse) or "one text or another"
    return (f"every step was worse than the start on {named}, if better on the rest; --held-out names another text to decide",)


def publish(folder: Path, report: Report, job: RecoveryJob) -> None:
    """Card, llmprune.json and page beside the weights."""
    write_recovered_card(folder, report, job.source.folder, job.source.name)
    written = to_versioned_json(report.to_json())
    write_whole(folder / REPORT, written)
    write_whole(folder / "report.html", page(Report.from_json(json.loads(written))).encode())
