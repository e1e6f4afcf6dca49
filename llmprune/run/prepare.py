"""A request checked against its model, its data and the disk: a job that is ready to start."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llmprune
from llmprune.checkpoint.companions import LARGEST, too_large
from llmprune.checkpoint.files import to_json
from llmprune.checkpoint.journal import partial_folder
from llmprune.checkpoint.loader import listed
from llmprune.checkpoint.manifest import check_source
from llmprune.checkpoint.resolve import open_source
from llmprune.checkpoint.source import SIZES, Source
from llmprune.data.sources import TextSource
from llmprune.data.store import load_windows
from llmprune.data.windows import RunData, Windows
from llmprune.errors import ConversionError
from llmprune.maths.linalg import enough_tokens, few_tokens
from llmprune.maths.mixed_precision import is_mixed
from llmprune.model.matrices import Matrix, Selection, unrecognised
from llmprune.model.skeleton import count_parameters
from llmprune.model.wrappers import is_wrapper
from llmprune.pruners.plan import Plan, Work
from llmprune.recipe.recipe import Recipe
from llmprune.results import Calibration, Environment, Origin, Towers
from llmprune.run.footprint import Footprint, footprint
from llmprune.run.planning import planned, with_budget
from llmprune.run.preflight import check_ids, check_output, check_plan, check_space
from llmprune.run.windows import Given, find_texts, gather_windows
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.devices import choose_device, choose_dtype
from llmprune.stream.live import LiveStream
from llmprune.stream.whole import WholeStream
from llmprune.types import SILENT, Listener


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
    def work(self) -> Work:
        return Work(self.stream, self.data.calibration.ids_NL, self.plan, self.matrices)

    @property
    def writes_again(self) -> bool:
        """Whether the pruned tensors on disk are distilled at the end, and written a second time beside the first."""
        return bool(self.plan.polish_steps) and self.stream.resumable

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that must be equal for a run to resume another."""
        return {
            "recipe": self.recipe.resolved(),
            "source": self.source.hashes,
            "text": self.data.identities,
            "calibration": self.data.calibration.sha256,
            "evaluation": [w.sha256 for w in self.data.evaluation],
            "held": self.data.held.sha256 if self.data.held else None,
        } | self.environment.to_json()

    @property
    def environment(self) -> Environment:
        decoder, stream = self.source.decoder, self.stream
        reads = ("compressed-tensors",) if decoder and decoder.method == "compressed-tensors" else ()
        return environment(stream.device, stream.dtype, stream.resumable, *reads)

    def __str__(self) -> str:
        """What the run is about to do, in four lines."""
        recipe = self.recipe.resolved()
        goal = f"{self.recipe.max_ppl_increase:.3g} more perplexity" if self.recipe.max_ppl_increase else f"{self.plan.sparsity:.6g}"
        matrices = [m for ms in self.matrices.values() for m in ms]
        structure = self.plan.structure
        weights = structure.weights if structure else sum(m.rows * m.columns for m in matrices)
        indices = range(len(self.stream.names)) if structure else self.matrices
        places = [self.stream.skeleton.get_submodule(self.stream.path_of(i)) for i in indices]
        in_places = sum(p.numel() for place in places for p in place.parameters())
        parts = " + ".join(p for p in (recipe["criterion"], recipe["solver"]) if p)
        group = f" per {recipe['group']}" if recipe["group"] else ""
        head = " and the head" if len(self.matrices) > len(self.stream.names) else ""
        dtype = str(self.stream.dtype).removeprefix("torch.")
        left, towers = too_large(self.source.folder), towers_of(self.stream)
        apart = f"; {towers}" if towers else ""
        rounded = structure.rounded(self.plan.sparsity) if structure else ""
        return (
            f"{self.source.name}: {structure.described if structure else f'{len(matrices)} matrices'} in {len(self.stream.names)} blocks{head}, "
            f"{weights:,} weights, {weights / in_places:.1%} of theirs{'' if structure else self.stays_dense()}; "
            f"{recipe['pattern']} at {goal}{f' ({rounded})' if rounded else ''} by {parts}{group}, {recipe['allocation']} ratios{apart}\n"
            f"{self.describe_data()}\n{self.few_tokens()}"
            f"{self.footprint}\n"
            f"output: {self.output} ({self.describe_size()}), {self.stream.device}, {dtype}{self.mixed()}"
            + (f"; without {', '.join(left)}, larger than {LARGEST:,} bytes" if left else "")
            + ("" if self.stream.resumable else "; the whole model in memory, not resumable: its tensors cannot be converted block by block")
        )

    def stays_dense(self) -> str:
        """The parameters of blocks that no pattern sees, because they are not recognised as matrices; those of every block once."""
        others = sorted({key for block in self.stream.walk.blocks for key in unrecognised(block)})
        return f", {listed(others)} not among them" if others else ""

    def mixed(self) -> str:
        """Whether training steps will be in mixed precision."""
        trains = bool(self.plan.polish_steps) or self.plan.reconstruct is not None
        half = trains and is_mixed(self.stream.device, self.stream.dtype, self.plan.mixed_precision)
        return ", products of training steps in bfloat16" if half else ""

    def few_tokens(self) -> str:
        """A line about matrices that will rest on few tokens, where there are any."""
        count, length = self.data.calibration.ids_NL.shape
        ours, matrices = self.plan.ours, [m for ms in self.matrices.values() for m in ms]
        few = [m.columns for m in matrices if few_tokens(m.columns, count * length, ours)]
        if not few or not self.plan.needs & {"gram", "input_sq"}:
            return ""
        enough = -(-enough_tokens(max(few), ours) // length)
        whose = f"{len(few):,} of {len(matrices):,} matrices, of up to {max(few):,} inputs"
        return f"few tokens: {count * length:,} for {whose}, whose statistics are trusted less; enough: --samples {enough:,}\n"

    def describe_size(self) -> str:
        """Of the weights that will be written."""
        dense, structure, plan = self.source.bytes, self.plan.structure, self.plan
        if structure is None:
            return f"{dense:,} bytes"
        if self.recipe.max_ppl_increase or self.recipe.target_latency_ratio or self.recipe.pad:
            return f"at most {dense:,} bytes, the source's"
        each = max(SIZES[entry.dtype] for entry in self.source.tensors.values())
        return f"about {dense - round(plan.sparsity * structure.weights) * each:,} bytes of the source's {dense:,}"

    def describe_data(self) -> str:
        calibration = self.data.calibration
        count, length = calibration.ids_NL.shape
        held = f", {len(self.data.held.ids_NL)} more held back for trials" if self.data.held else ""
        drawn = f", drawn from {calibration.drawn_from}" if calibration.drawn_from else ""
        said = describe(calibration)
        return f"calibration: {count} windows of {length}{said.seen} from {said.dataset} ({said.split}){drawn}{said.aside}{held}"


def environment(device: torch.device, dtype: torch.dtype, block_by_block: bool, *reads: str) -> Environment:
    """reads: further libraries that read the source."""
    libraries = {name: version(name) for name in ("torch", "transformers", "safetensors", *reads)}
    versions = libraries | {"llmprune": llmprune.__version__, "python": platform.python_version()}
    return Environment(versions, str(device), str(dtype).removeprefix("torch."), torch.get_num_threads(), block_by_block)


def prepare(
    recipe: Recipe,
    windows: Given = None,
    overwrite: bool = False,
    restart: bool = False,
    result: str = "config.json",
    listen: Listener = SILENT,
    measured: tuple[TextSource | Tensor, ...] = (),
) -> Job:
    """Check a request against the model, its data and the disk. No forward is run, and nothing is written; leftovers of a crash beside a
    finished output are removed.

    windows: what is in memory to calibrate on, texts or token ids [N, L]. measured: to evaluate on, besides what the recipe names. result: a file
    that an output to be replaced must contain. Raises RequestError.
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
    texts = find_texts(recipe, source.folder, windows, measured)
    stored = None if restart or not texts.stored else load_windows(partial_folder(output), asked_windows(recipe), texts.identities)
    data = stored or gather_windows(recipe, source, stream, texts)
    stream.walk.pictures = data.pictures
    for part in data.all():
        check_ids(part, stream.skeleton)
    memory = footprint(stream, plan, matrices, data)
    job = Job(recipe, plan, source, stream, matrices, data, memory, output, overwrite, restart)
    copies = 1 + recipe.structured + recipe.rotate + job.writes_again
    check_space(output, source.folder, source.bytes * copies, sum(part.ids_NL.nbytes for part in data.all()) + memory.spilled)
    memory.check()
    scan(source, stream, listen)
    check_source(source)
    return job


def asked_windows(recipe: Recipe) -> str:
    """Identifies the request that a run's windows were made for, so that those of another one are not reused."""
    return hashlib.sha256(to_json(recipe.resolved())).hexdigest()


def open_stream(source: Source, dtype: torch.dtype, device: torch.device) -> CheckpointStream | WholeStream:
    """The source block by block, or whole where transformers' conversion cannot be done and undone a block at a time."""
    try:
        stream = CheckpointStream(source, dtype, device)
        stream.loader.try_conversion()
        return stream
    except ConversionError:
        return WholeStream(source, dtype, device)


def scan(source: Source, stream: CheckpointStream | WholeStream, listen: Listener = SILENT) -> None:
    """Hashes, and damage: infinite bounds in a buffer, or in a part that this model does not have, are none."""
    total = sum(entry.end - entry.start for entry in source.tensors.values())
    source.scan(stream.loader.not_weights if isinstance(stream, CheckpointStream) else (), lambda read: listen.progress("read", read, total))


def towers_of(stream: CheckpointStream | LiveStream) -> Towers | None:
    """The parts of a vision-language model that stay as they are; None for other models."""
    found, model = stream.towers, stream.walk.model
    weights = sum(found.values())
    counted = count_parameters(model) + (0 if is_wrapper(model) else weights)
    return Towers(tuple(found), weights, weights / counted) if found else None


def described(source: Source, stream: CheckpointStream | WholeStream) -> Origin:
    """The source as in the report."""
    quantised = source.decoder.method if source.decoder else None
    return Origin(source.name, source.revision, source.hashes, source.bytes, quantised, tuple(too_large(source.folder)), towers_of(stream))


def describe(windows: Windows) -> Calibration:
    count, length = windows.ids_NL.shape
    found = Calibration(windows.dataset, windows.split, count, length, count * length, windows.sha256, windows.drawn_from, windows.pictures)
    found = replace(found, left_out=windows.left_out, bos=windows.bos, skipped=windows.skipped)
    packed = windows.documents
    if packed is None:
        return found
    begun = sum(packed.begun)
    return replace(found, template=packed.form, documents=begun, truncated=sum(packed.cut) / begun if begun else 0.0)
