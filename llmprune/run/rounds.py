"""Pruning in rounds: the sparsity grows, and what is kept is recovered after each pruning.

Every round is a run and a recovery of their own in ``OUT.partial/rounds``, which resume as any other; the last good one becomes the output. The
masks of a round are chosen by the pruning's own method, on the weights as recovered.

Han et al., Learning both Weights and Connections, https://arxiv.org/abs/1506.02626; rewinding: Frankle et al., Stabilizing the Lottery Ticket
Hypothesis, https://arxiv.org/abs/1903.01611
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from llmprune.checkpoint.files import REPORT, make_folder, remove, to_versioned_json, write_whole
from llmprune.checkpoint.journal import Journal
from llmprune.checkpoint.manifest import manifest_of
from llmprune.checkpoint.resolve import is_bundled, open_source
from llmprune.checkpoint.sink import Sink
from llmprune.checkpoint.source import Source, open_folder
from llmprune.data.sources import TextSource, find_source
from llmprune.data.windows import Windows
from llmprune.errors import RequestError, StoppedError
from llmprune.evaluation import sample
from llmprune.evaluation.beside import dense_pass, pruned_pass
from llmprune.evaluation.perplexity import perplexity
from llmprune.model.matrices import Matrix
from llmprune.model.skeleton import count_parameters
from llmprune.recipe.levels import levels
from llmprune.recipe.recipe import RECOVER_STEPS, Recipe
from llmprune.report.fields import typed
from llmprune.report.result import Report
from llmprune.report.stored import read_run
from llmprune.results import Evaluation, Round
from llmprune.run import job as single
from llmprune.run.phases import Phases, dense_evaluation, has_sample, phases, pruned_evaluation, pruning, writing
from llmprune.run.preflight import check_still
from llmprune.run.prepare import Job, describe, described, open_stream, prepare
from llmprune.run.recovered import run_recovery
from llmprune.run.recovery import check_trainable, prepare_recovery
from llmprune.run.windows import Given
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.live import LiveStream
from llmprune.stream.stream import Stream
from llmprune.training.masks import placed
from llmprune.training.request import BATCH, Request
from llmprune.types import SILENT, Listener

NO_ROUNDS: dict[str, None] = dict.fromkeys(("rounds", "schedule", "recover_steps", "recover_data", "rewind", "max_ppl_increase", "push"))
# windows are handed over
GIVEN: dict[str, Any] = {"calibration": None, "samples": None, "sequence_length": None, "shuffle": False, "eval": [], "eval_samples": None}
GIVEN |= dict.fromkeys(("column", "split", "bos"))


@dataclass(frozen=True)
class Rounds:
    """Checked rounds, ready to start. whole: the job of the same request in one round, which has the source, the windows and the plan."""

    whole: Job
    earlier: Source | None  # to rewind to

    @property
    def recipe(self) -> Recipe:
        return self.whole.recipe

    @property
    def steps(self) -> int:
        return RECOVER_STEPS if self.recipe.recover_steps is None else self.recipe.recover_steps

    @property
    def data(self) -> str:
        """What the recoveries train on."""
        return self.recipe.recover_data or self.recipe.calibration or ("bundled-calibration" if is_bundled(self.recipe.model) else "c4")

    @property
    def columns(self) -> dict[str, str | None]:
        """The column and the split of the calibration, where the recoveries train on it."""
        own = self.recipe.recover_data is None
        return {"column": self.recipe.column if own else None, "split": self.recipe.split if own else None}

    @property
    def matrices(self) -> dict[int, list[Matrix]]:
        return self.whole.matrices

    def __str__(self) -> str:
        steps = levels(self.recipe)
        goals = ", ".join(f"{pattern} {sparsity:.4g}" for pattern, sparsity in steps)
        recovery = f"{self.steps} steps on {Path(self.data).name} after each" if self.steps else "no recovery"
        back = f", from the values of {self.earlier.name}" if self.earlier else ""
        return f"{self.whole}\n{len(steps)} rounds: {goals}; {recovery}{back}"


def prepare_pruning(
    recipe: Recipe,
    windows: Given = None,
    overwrite: bool = False,
    restart: bool = False,
    measured: tuple[TextSource | Tensor, ...] = (),
    listen: Listener = SILENT,
) -> Job | Rounds:
    """As ``prepare``, for one round or several."""
    return (prepare_rounds if recipe.rounds else prepare)(recipe, windows, overwrite, restart, measured=measured, listen=listen)


def runner(job: Job | Rounds) -> Callable[[Any, Listener], Report]:
    """What runs it, in one round or several."""
    return run_rounds if isinstance(job, Rounds) else single.run


def phases_of(job: Job | Rounds) -> Phases:
    """As ``phases``, of one round or several: each round prunes, writes and recovers."""
    if isinstance(job, Job):
        return phases(job)
    whole, length = job.whole, job.whole.data.calibration.ids_NL.shape[1]
    training = 8.0 * job.steps * BATCH * length * count_parameters(whole.stream.skeleton)
    each = [*pruning(whole), writing(whole), *([("recover", training)] if job.steps else [])]
    return [*each * len(levels(job.recipe)), *dense_evaluation(whole), *pruned_evaluation(whole)]


def prepare_rounds(
    recipe: Recipe,
    windows: Given = None,
    overwrite: bool = False,
    restart: bool = False,
    measured: tuple[TextSource | Tensor, ...] = (),
    listen: Listener = SILENT,
) -> Rounds:
    """Check a request as ``prepare`` does, and what its rounds need. Raises RequestError."""
    if windows is not None and recipe.recover_data is None and recipe.recover_steps != 0:
        raise RequestError("rounds with a calibration in memory, and no data to recover on", "give recover_data=..., or recover_steps=0")
    rounds = Rounds(
        prepare(recipe, windows, overwrite, restart, measured=measured, listen=listen), open_source(recipe.rewind) if recipe.rewind else None
    )
    if rounds.steps:
        check_trainable(rounds.whole.stream)
        find_source(rounds.data, "calibration", **rounds.columns)
    if rounds.earlier is not None:
        check_earlier(rounds.earlier, rounds.whole.source)
        rounds.earlier.scan()
    return rounds


def check_earlier(earlier: Source, source: Source) -> None:
    """Raises RequestError for a checkpoint to rewind to that is not one of this model."""
    for key, entry in source.tensors.items():
        other = earlier.tensors.get(key)
        if other is None or (other.shape, other.dtype) != (entry.shape, entry.dtype):
            said = "has no such tensor" if other is None else f"{list(other.shape)} {other.dtype}, not {list(entry.shape)} {entry.dtype}"
            raise RequestError(f"rewind {earlier.name}: {key}: {said}", "give an earlier checkpoint of the same model")


def run_rounds(rounds: Rounds, listen: Listener = SILENT) -> Report:
    """Prune and recover by turns, or go on with what an interrupted process has left. The output appears whole, or not at all.

    Raises StoppedError where the first round already passes the limit.
    """
    whole, began = rounds.whole, perf_counter()
    journal = Journal(whole.output, rounds_identity(rounds), whole.restart)
    try:
        check_still(whole.output, whole.source.folder, whole.overwrite, journal)
        make_folder(journal.folder / "rounds")
        done = list(finished(rounds, journal, listen))
        good = [one for one in done if within(rounds, one)]
        if not good:
            first = done[0]
            raise StoppedError(
                f"round 1 at sparsity {first.sparsity:.4g}: perplexity on held-back windows rises by {first.increase:.1%}, more than the limit",
                "allow more, or take more rounds; --restart discards this one",
            )
        folder = journal.folder / "rounds" / named(good[-1].number, rounds)
        if folder.exists():  # else an earlier process has put it into its place
            report = report_of(rounds, read_run(folder), tuple(done), folder, listen)
            spent = replace(report.timings, seconds=perf_counter() - began, recovery_seconds=None)
            single.publish(folder, replace(report, timings=spent), whole)
            os.rename(folder, journal.weights)
        report = read_run(journal.weights)
        journal.publish()
        return replace(report, output=whole.output)
    finally:
        journal.close()


def rounds_identity(rounds: Rounds) -> dict[str, Any]:
    return rounds.whole.identity | {"rewind": rounds.earlier.hashes if rounds.earlier else None, "recover_data": Path(rounds.data).name}


def within(rounds: Rounds, found: Round) -> bool:
    limit = rounds.recipe.max_ppl_increase
    return limit is None or found.increase is None or found.increase <= limit


def named(number: int, rounds: Rounds) -> str:
    """The folder of a finished round."""
    return f"{number}-{'recovered' if rounds.steps else 'pruned'}"


def finished(rounds: Rounds, journal: Journal, listen: Listener) -> Iterator[Round]:
    """The rounds, one after another, up to the last one or the first that passes the limit. Folders that are not needed any more are removed."""
    place = journal.folder / "rounds"
    for number, (pattern, sparsity) in enumerate(levels(rounds.recipe), 1):
        record = journal.read(f"round-{number:05d}")
        if record is None:
            folder = place / named(number, rounds)
            if not folder.exists():
                made(rounds, place, number, pattern, sparsity, listen)
            found = measured(rounds, number, pattern, sparsity, folder, journal)
            journal.write(f"round-{number:05d}", asdict(found))
        else:
            found = typed(Round, record)
        yield found
        if not within(rounds, found):
            return
        for old in range(1, number):
            for path in place.glob(f"{old}-*"):
                remove(path)


def made(rounds: Rounds, place: Path, number: int, pattern: str, sparsity: float, listen: Listener) -> None:
    """One round: prune what the last one has left, rewind, recover."""
    before = str(place / named(number - 1, rounds)) if number > 1 else rounds.recipe.model
    pruned = place / f"{number}-pruned"
    if not pruned.exists():
        own = NO_ROUNDS | GIVEN | {"model": before, "pattern": pattern, "sparsity": sparsity, "output": str(pruned)}
        recipe = rounds.recipe.model_copy(update=own | ({"revision": None} if number > 1 else {}))
        single.run(prepare(recipe, rounds.whole.data.calibration.ids_NL), listen)
    if not rounds.steps:
        return
    start = rewound(rounds.earlier, pruned, place / f"{number}-rewound") if rounds.earlier is not None else pruned
    asked = Request(
        str(start),
        rounds.data,
        output=str(place / named(number, rounds)),
        steps=rounds.steps,
        dense=str(rounds.whole.source.folder),
        sequence_length=rounds.whole.data.calibration.ids_NL.shape[1],
        bos=rounds.recipe.bos,
        column=rounds.columns["column"],
        split=rounds.columns["split"],
        seed=rounds.recipe.seed,
        device=rounds.recipe.device,
    )
    run_recovery(prepare_recovery(asked), listen)


def rewound(earlier: Source, pruned: Path, folder: Path) -> Path:
    """The pruned result with the values of an earlier checkpoint where it is not zero, in ``folder``. Zeros outside the pruned matrices are none."""
    if folder.exists():
        return folder
    making = folder.with_name(f"{folder.name}.making")
    if making.exists():
        remove(making)
    source, report = open_folder(pruned, pruned.name), read_run(pruned)
    cut = keys_of(source, report)
    sink = Sink(making, source)
    sink.lay_out()
    for key in source.tensors:
        value = earlier.read(key)
        sink.write({key: torch.where(source.read(key) == 0, torch.zeros_like(value), value) if key in cut else value})
    sink.finish()
    manifest = manifest_of(making)
    write_whole(making / REPORT, to_versioned_json(replace(report, files=manifest.files, tensors=manifest.tensors).to_json()))
    os.rename(making, folder)
    return folder


def keys_of(source: Source, report: Report) -> set[str]:
    """The tensors that hold the matrices of a report."""
    stream = open_stream(source, torch.float32, torch.device("cpu"))
    assert isinstance(stream, CheckpointStream)  # as check_trainable has found
    found: set[str] = set()
    for block in report.blocks:
        path, matrices = placed(LiveStream(stream.skeleton), block)
        for row in block.rows:
            found.update(stream.loader.keys_of[f"{path}.{matrices[row.matrix.removeprefix(f'{block.block}.')].parameter}"])
    return found


def measured(rounds: Rounds, number: int, pattern: str, sparsity: float, folder: Path, journal: Journal) -> Round:
    """What a round has come to."""
    report, held, increase = read_run(folder), rounds.whole.data.held, None
    if held is not None and rounds.recipe.max_ppl_increase is not None:
        record = journal.read("dense") or {"held": perplexity(rounds.whole.stream, held).value}
        journal.write("dense", record)
        increase = perplexity(stream_of(rounds, folder), held).value / record["held"] - 1
    found = Round(number, pattern, sparsity, report.sparsity, increase=increase)
    if not report.recovered:
        return found
    one = report.recovered[-1]
    first = one.measured[0]
    dense = first.dense.value if first.dense else None
    return replace(found, best=one.best, before=first.before.value, after=first.after.value, dense=dense)


def stream_of(rounds: Rounds, folder: Path) -> Any:
    return open_stream(open_folder(folder, folder.name), rounds.whole.stream.dtype, rounds.whole.stream.device)


@torch.no_grad()
def report_of(rounds: Rounds, last: Report, done: tuple[Round, ...], folder: Path, listen: Listener) -> Report:
    """The report of the last good round, about the whole: its request, its source, and the result beside the dense model."""
    whole = rounds.whole
    now: Stream = stream_of(rounds, folder)
    prompt = sample.prompt_for(whole.stream, whole.source) if has_sample(whole) else sample.TOO_LONG
    text = sample.beside(prompt, sample.written(whole.stream, prompt, listen), sample.written(now, prompt, listen))
    return replace(
        last,
        recipe=whole.recipe.resolved(),
        source=described(whole.source, whole.stream),
        calibration=describe(whole.data.calibration),
        perplexity=tuple(beside(whole.stream, now, windows, listen) for windows in whole.data.evaluation),
        sample=text,
        rounds=done,
        asked=done[-1].asked if whole.recipe.max_ppl_increase is None else next(one.asked for one in reversed(done) if within(rounds, one)),
        output=folder,
    )


def beside(dense: Stream, now: Stream, windows: Windows, listen: Listener) -> Evaluation:
    """The result and the dense model on one text."""
    found = dense_pass(dense, windows, False, None, listen)
    return Evaluation(found.perplexity, *pruned_pass(found, now, listen))
