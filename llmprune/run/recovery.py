"""A request to recover a pruned model, checked against the model, its data, the dense model and the disk: a job that is ready to start."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from llmprune.checkpoint.companions import tokenizer_files
from llmprune.checkpoint.files import REPORT, hash_file
from llmprune.checkpoint.manifest import check_source
from llmprune.checkpoint.resolve import open_source
from llmprune.checkpoint.source import Source
from llmprune.data.sources import BUNDLED_NAMES, TextSource, find_source
from llmprune.data.tokenizer import load_tokenizer
from llmprune.errors import RequestError
from llmprune.model.kinds import begins_with_bos
from llmprune.model.skeleton import count_parameters
from llmprune.report.result import Report
from llmprune.report.stored import read_run
from llmprune.results import Environment
from llmprune.run.dense import check_blocks, check_dense, find_dense, vocabulary
from llmprune.run.preflight import check_ids, check_length, check_output, check_space
from llmprune.run.prepare import environment, open_stream, scan
from llmprune.run.windows import default_length
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.devices import choose_device
from llmprune.stream.hidden_states import memory_of
from llmprune.stream.whole import WholeStream
from llmprune.training.arguments import Settings, check_machine, in_half, micro_batch, training_arguments
from llmprune.training.data import HELD_BACK, Packs, divided, packs_of
from llmprune.training.request import Request

# Bytes for each parameter of the model, in float32. all: itself, its gradient or its rounded value, two moments, the candidate, the mask; lora:
# itself, the product and the sum that a backward pass needs, the mask, the candidate and its rounded value; norms: itself, and the little beside
BYTES = {"all": 24, "lora": 20, "norms": 8}
LOGITS = 24  # bytes of a logit: the pruned model's and the dense one's, in float32, as probabilities, with a gradient


@dataclass
class RecoveryJob:
    """A checked recovery. train, deciding, evaluation: its windows; guard: the texts of ``deciding`` that are not of the data. dense: None for ce."""

    request: Request
    source: Source
    report: Report
    stream: CheckpointStream
    dense: CheckpointStream | None
    loss: str
    train: Packs
    deciding: tuple[Packs, ...]
    evaluation: tuple[Packs, ...]
    identities: dict[str, str | None]
    output: Path
    overwrite: bool
    restart: bool
    notes: tuple[str, ...]

    @property
    def settings(self) -> Settings:
        asked = self.request
        width = self.stream.skeleton.config.get_text_config(decoder=True).hidden_size
        length = self.train.windows.ids_NL.shape[1]
        return Settings(asked.steps, asked.batch, asked.rate(width), asked.evaluates_every, asked.patience, asked.seed, length, dict(asked.arguments))

    @property
    def environment(self) -> Environment:
        return environment(self.stream.device, self.stream.dtype, False, "accelerate")

    @property
    def resolved(self) -> dict[str, Any]:
        """The request as it is saved, with the values that its defaults have become."""
        found = {"loss": self.loss, "learning_rate": self.settings.learning_rate, "every": self.settings.every}
        found |= {"sequence_length": self.settings.length, "dense": self.dense.source.name if self.dense else None}
        return self.request.resolved() | found

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that must be equal for a run to resume another."""
        return {
            "request": self.resolved,
            "source": self.source.hashes,
            "dense": self.dense.source.hashes if self.dense else None,
            "text": self.identities,
            "data": self.train.sha256,
            "texts": [text.sha256 for text in (*self.deciding, *self.evaluation)],
        } | self.environment.to_json()

    def __str__(self) -> str:
        """What it is about to do, in three lines and its notes."""
        asked, settings, train = self.request, self.settings, self.train
        towards = f"towards {self.dense.source.name} ({self.loss})" if self.dense else "towards the next token (ce)"
        count, length = train.windows.ids_NL.shape
        decide = ", ".join(f"{len(t)} windows of {t.windows.dataset} ({t.windows.split})" for t in self.deciding)
        return "\n".join(
            [
                f"{self.source.name}: {asked.parameters} parameters, {asked.steps} steps of {asked.batch} windows {towards}, "
                f"learning rate {settings.learning_rate:.3g}, zeros kept",
                f"data: {count} windows of {length} from {train.windows.dataset} ({train.windows.split}), {train.learned:,} tokens to learn; "
                f"what decides: {decide}",
                f"memory: about {sum(need(self)):,} bytes; output: {self.output}, {self.stream.device}, "
                f"{str(self.stream.dtype).removeprefix('torch.')}",
                *self.notes,
            ]
        )


def prepare_recovery(request: Request, overwrite: bool = False, restart: bool = False) -> RecoveryJob:
    """Check a request; nothing is trained, and nothing is written. Raises RequestError."""
    request.check()
    source = open_source(request.folder)
    report = report_of(source)
    output = Path(request.output or f"{source.name.rpartition('/')[2]}-recovered").expanduser()
    check_output(output, source.folder, overwrite)
    stream = check_trainable(open_stream(source, torch.float32, choose_device(request.device)))
    device = stream.device
    scan(source, stream)
    check_source(source)
    texts = Texts.found(request)
    train, deciding, evaluation, notes = windows(request, report, source, stream, texts)
    dense, said = dense_of(request, report, source, stream)
    loss = request.loss or ("kd" if dense else "ce")
    files: dict[str, str | None] = {f"tokenizer {path.name}": f"sha256 {hash_file(path)}" for path in tokenizer_files(source.folder)}
    job = RecoveryJob(
        request,
        source,
        report,
        stream,
        dense,
        loss,
        train,
        deciding,
        evaluation,
        texts.identities | files,
        output,
        overwrite,
        restart,
        (*notes, *said),
    )
    training_arguments(job.settings, output, device)  # refuses what it does not take
    if in_half(job.settings, device):
        job = replace(job, notes=(*job.notes, "products of the training's steps are taken in bfloat16; arguments={'bf16': False} prevents it"))
    fitted = with_memory(job)
    parameters = count_parameters(stream.skeleton)
    check_space(output, source.folder, source.bytes * 3 + 2 * 12 * parameters)
    return fitted


def report_of(source: Source) -> Report:
    """The record of the pruning. Raises RequestError for a model that no run has made, or one that is quantised."""
    if source.decoder is not None:
        raise RequestError(f"{source.name}: quantised ({source.decoder.method}), and codes cannot be trained", "recover it before it is quantised")
    if not (source.folder / REPORT).is_file():
        raise RequestError(f"{source.name}: holds no {REPORT}, so no run has pruned it", "give the output folder of llmprune prune")
    return read_run(source.folder)


def check_trainable(stream: CheckpointStream | WholeStream) -> CheckpointStream:
    """Raises RequestError for a machine or a model that recoveries do not work on."""
    check_machine(stream.device, PartialState().num_processes)
    name = stream.source.name
    if not isinstance(stream, CheckpointStream):
        raise RequestError(f"{name}: its tensors cannot be converted back one by one", "train it with transformers and llmprune's masks")
    if stream.towers:
        raise RequestError(f"{name}: a model of several modalities ({', '.join(stream.towers)})", "recover works on text models so far")
    return stream


@dataclass(frozen=True)
class Texts:
    """The texts of a request, found but not read."""

    data: TextSource | Tensor
    held_out: TextSource | None
    eval: tuple[TextSource, ...]

    @classmethod
    def found(cls, request: Request) -> Texts:
        held = find_source(request.held_out, "evaluation") if request.held_out else None
        data = find_source(request.data, "calibration", request.column, request.split) if isinstance(request.data, str) else request.data
        return cls(data, held, tuple(find_source(text, "evaluation") for text in request.eval))

    @property
    def identities(self) -> dict[str, str | None]:
        named = {f"data {self.data.dataset}": self.data.identity} if isinstance(self.data, TextSource) else {}
        named |= {f"held out {self.held_out.dataset}": self.held_out.identity} if self.held_out else {}
        return named | {f"evaluation {n}, {text.dataset}": text.identity for n, text in enumerate(self.eval, 1)}


def windows(
    request: Request, report: Report, source: Source, stream: CheckpointStream, texts: Texts
) -> tuple[Packs, tuple[Packs, ...], tuple[Packs, ...], tuple[str, ...]]:
    """(to train on, what decides, what is measured beside, notes). Raises RequestError where there is too little of something."""
    used = report.calibration.window if report.calibration else default_length(report.source.name, stream.skeleton.config)
    length = request.sequence_length or used
    check_length(length, stream.skeleton.config)
    tokenizer = load_tokenizer(source.folder)
    bos = begins_with_bos(stream.skeleton.config) if request.bos is None else request.bos
    train = packs_of(texts.data, tokenizer, length, request.steps * request.batch + HELD_BACK, bos)
    skipped = train.windows.skipped
    notes: tuple[str, ...] = (f"{skipped:,} rows of {train.windows.dataset} without text are skipped",) if skipped else ()
    if texts.held_out is not None:
        deciding = [packs_of(texts.held_out, tokenizer, length, HELD_BACK, bos).part(0, HELD_BACK).learnable()]
    else:
        train, held = divided(train)
        guard = guard_of(report, texts.data)
        deciding = [held.learnable(), *([guard_windows(guard, tokenizer, length, bos)] if guard else [])]
        if guard is None and not of_calibration(report, texts.data):
            notes += ("only a slice of the data decides: if the data are unlike what the model is for, give --held-out a text that is",)
    evaluation = tuple(packs_of(text, tokenizer, length, None, bos).learnable() for text in texts.eval)
    train = train.learnable()
    for part in (train, *deciding, *evaluation):
        check_ids(part.windows, stream.skeleton)
    if len(train) < request.batch:
        raise RequestError(
            f"{train.windows.dataset}: {len(train)} windows of {length} to train on, a step takes {request.batch}",
            "give more data, a smaller --batch, or a smaller --sequence-length",
        )
    return train, tuple(deciding), evaluation, notes


def of_calibration(report: Report, text: TextSource | Tensor) -> bool:
    used = report.calibration
    return isinstance(text, TextSource) and used is not None and (text.dataset, text.split) == (used.dataset, used.split)


def guard_of(report: Report, data: TextSource | Tensor) -> TextSource | None:
    """The text that the model was calibrated on, if it comes with llmprune and is not the data: on it too, nothing may get worse."""
    found = (find_source(name, "calibration") for name in BUNDLED_NAMES)
    return next((text for text in found if of_calibration(report, text) and not of_calibration(report, data)), None)


def guard_windows(guard: TextSource, tokenizer: Any, length: int, bos: bool) -> Packs:
    """The last windows of the text, since a calibration takes the first ones."""
    found = packs_of(guard, tokenizer, length, None, bos)
    return found.part(max(0, len(found) - HELD_BACK), None)


def dense_of(request: Request, report: Report, source: Source, stream: CheckpointStream) -> tuple[CheckpointStream | None, tuple[str, ...]]:
    """(the dense model, a note where it was wanted and is not at hand). Raises RequestError for one that does not fit, or a loss that needs it."""
    if request.loss == "ce":
        return None, ()
    found = open_source(request.dense) if request.dense else find_dense(report, source.folder)
    if found is None:
        said = f"the dense model {report.source.name} is not at hand"
        if request.loss:
            raise RequestError(f"loss {request.loss}: {said}", "give it by --dense, or choose --loss ce")
        return None, (f"{said}: trained towards the next token (--dense gives it)",)
    if request.dense:
        found.scan()
    dtype = torch.float32 if stream.device.type == "cpu" else torch.bfloat16
    dense = open_stream(found, dtype, stream.device)
    if not isinstance(dense, CheckpointStream):
        raise RequestError(f"dense model {found.name}: its tensors cannot be converted block by block", "choose --loss ce")
    check_dense(dense, load_tokenizer(source.folder), load_tokenizer(found.folder), stream, report.smaller is None)
    if request.loss == "blocks":
        check_blocks(dense, stream)
    return dense, ()


def need(job: RecoveryJob) -> tuple[int, int]:
    """(bytes of the training, bytes that the dense model adds to them)."""
    parameters = count_parameters(job.stream.skeleton)
    batch = micro_batch(job.settings) * job.settings.length * vocabulary(job.stream) * LOGITS
    return parameters * BYTES[job.request.parameters] + batch, count_parameters(job.dense.skeleton) * job.dense.dtype.itemsize if job.dense else 0


def with_memory(job: RecoveryJob) -> RecoveryJob:
    """Without the dense model where that does not fit and was not asked for. Raises RequestError where the training itself does not."""
    (own, dense), free = need(job), memory_of(job.stream.device)
    if own > free or (own + dense > free and job.request.loss):
        raise RequestError(
            f"training takes about {own + (dense if job.request.loss else 0):,} bytes, {free:,} are free",
            "choose --parameters norms or lora, --loss ce, or a larger machine",
        )
    if own + dense > free:
        said = f"the dense model does not fit beside the training ({own + dense:,} bytes, {free:,} are free): trained towards the next token"
        return replace(job, dense=None, loss="ce", notes=(*job.notes, said))
    return job
