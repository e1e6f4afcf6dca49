"""Everything that can be refused from metadata, before the first forward: folders, devices, shapes, lengths, disk space."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from llmprune.checkpoint.companions import companions
from llmprune.checkpoint.journal import Journal, drop_leftover, laid_out, partial_folder
from llmprune.checkpoint.source import INDEX
from llmprune.data.windows import Windows
from llmprune.errors import RequestError
from llmprune.model.kinds import longest_sequence
from llmprune.model.matrices import Matrix, Selection, block_matrices, unrecognised
from llmprune.model.skeleton import count_parameters
from llmprune.pruners.distillation import BYTES_PER_WEIGHT
from llmprune.pruners.plan import Plan, Work
from llmprune.ratios.measured import allocations, is_tried, share
from llmprune.stream.hidden_states import memory_of
from llmprune.stream.stream import Stream

MOST_UNRECOGNISED = 0.1  # of the blocks' weights: parameters that are not recognised as matrices
EXACT = 1e-9  # of a share: what rounding leaves
PAGES = 1 << 20  # approximate bytes of the reports, the card and a run's records of its blocks


def check_output(output: Path, source: Path | None, overwrite: bool, result: str = "config.json") -> None:
    """Check that the output may be written: not the source (None: of no folder), not a file, not existing unless it may be replaced, in a writable
    folder. result: the file that an output to be replaced must contain. Leftovers of a finished output are removed.
    """
    other = "choose another --output"
    if output.name in ("", ".."):
        raise RequestError(f"output {str(output)!r}: is not a name for a new folder", other)
    if source is not None:
        check_apart(output, source)
    partial = partial_folder(output)
    for path in (output, partial):
        if os.path.lexists(path) and not path.is_dir():
            raise RequestError(f"output {output.name}: {'' if path == output else path.name + ' '}is a file, or a link to nothing", other)
    if output.exists() and not overwrite:
        drop_leftover(output)
        raise RequestError(f"output {output.name}: exists already", f"add --overwrite to replace it at the end, or {other}")
    if output.exists() and not ((output / result).exists() or not any(output.iterdir())):
        raise RequestError(f"output {output.name}: contains no {result}, so it is not replaced", other)
    parent = _disk_of(output)
    for place in (parent, partial):  # where the names are created
        if place.exists() and not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            raise RequestError(f"output {output.name}: {place.name or place} cannot be written to", other)


def check_still(output: Path, source: Path, overwrite: bool, journal: Journal) -> None:
    """Check again that the output may be written, now that no other process can: another run may have finished it since. One that has done nothing
    yet leaves nothing.
    """
    try:
        check_output(output, source, overwrite)
    except RequestError:
        if not journal.resumed:
            journal.discard()
        raise


def check_apart(output: Path, source: Path) -> None:
    """Check that neither the output nor its partial folder is the source, is inside it, or contains it; and that neither is in the Hub's cache."""
    for folder in (output, partial_folder(output)):
        if folder.exists() and folder.samefile(source):
            raise RequestError(
                f"output {output.name}: {'is' if folder == output else folder.name + ' is'} the source model", "choose another --output"
            )
        if _inside(folder, source) or _inside(source, folder):
            raise RequestError(f"output {output.name}: one of it and the source model's folder is inside the other", "choose another --output")
    if _inside(output, Path(constants.HF_HUB_CACHE).expanduser()):
        raise RequestError(f"output {output.name}: is in the Hub's cache, whose files are shared", "choose another --output")


def _inside(path: Path, folder: Path) -> bool:
    """Whether two paths are the same, by whatever names; neither has to exist."""
    true = folder.resolve()
    return any(above == true or (true.exists() and above.exists() and above.samefile(true)) for above in (path.resolve(), *path.resolve().parents))


def _disk_of(output: Path) -> Path:
    """The nearest existing folder above an output."""
    return next(path for path in output.absolute().parents if path.exists())


def check_space(output: Path, source: Path, weights: int, scratch: int = 0) -> None:
    """Check that what a run writes fits on the output's disk; space that an interrupted run has reserved counts as available.

    source: its folder. weights: bytes of all tensors to be written, at most. scratch: bytes of token ids, and of what does not fit in
    memory.
    """
    status = os.statvfs(_disk_of(output))
    free = status.f_bavail * status.f_frsize
    beside = sum(path.stat().st_size for path in [*companions(source), *source.glob(INDEX)])
    need = weights + scratch + beside + PAGES - laid_out(output)
    if need > free:
        raise RequestError(f"output {output.name}: needs {need:,} bytes, the disk has {free:,} free", "free some space, or choose another --output")


def check_matrices(matrices: dict[int, list[Matrix]], stream: Stream, plan: Plan) -> None:
    """Check that something is pruned, and the pattern fits every matrix; all that do not fit are counted, the first are named."""
    if not any(matrices.values()):
        raise RequestError("no matrix is selected", "check --skip and --only; llmprune inspect lists the names")
    pattern = plan.pattern
    assert pattern is not None
    unfit = [(i, m) for i, ms in matrices.items() for m in ms if m.columns % pattern.unit or m.rows % pattern.tall]
    bad = [f"{stream.path_of(i)}.{m.name} [{m.rows}, {m.columns}]" for i, m in unfit]
    if bad:
        wanted = (
            f"a width that {pattern.unit} does not divide" if pattern.tall == 1 else f"a shape that {pattern.tall} x {pattern.unit} do not divide"
        )
        raise RequestError(
            f"{len(bad)} matrices have {wanted}: {', '.join(bad[:2])}",
            "choose another pattern, or exclude them with --skip",
        )


def check_unrecognised(stream: Stream, selection: Selection) -> None:
    """Check that hardly anything stays dense only because it is not recognised as a matrix; what --skip names stays so on purpose."""
    if selection.only:
        return
    blocks = list(zip(stream.names, stream.walk.blocks, strict=True))
    bare = {f"{name}.{key}": size for name, block in blocks for key, size in unrecognised(block).items() if not selection.skips(f"{name}.{key}")}
    dense = sum(bare.values())
    seen = sum(m.rows * m.columns for _, block in blocks for m in block_matrices(block))
    if dense > MOST_UNRECOGNISED * (dense + seen):
        raise RequestError(
            f"{len(bare)} parameters with {dense / (dense + seen):.0%} of the blocks' weights are not recognised as matrices and would stay dense: "
            f"{', '.join(list(bare)[:2])}",
            "name them in --skip if they may",
        )


def check_outside(stream: Stream, selection: Selection) -> None:
    """Check what --only names outside the blocks: only the head can be pruned, and only if it is not tied to the embeddings."""
    walk = stream.walk
    embeddings, head = f"{walk.embeddings_path}.weight", f"{walk.head_path}.weight"
    if selection.names(embeddings):
        raise RequestError(f"{embeddings}: embeddings are looked up, not multiplied, so no input ranks their weights", "exclude them with --skip")
    if selection.names(head) and not walk.head_free:
        raise RequestError(f"{head}: is tied to the embeddings, which would lose its weights too", "exclude it with --skip")


def check_plan(plan: Plan, stream: Stream, matrices: dict[int, list[Matrix]], dtype: torch.dtype) -> None:
    """Check that everything the parts of a plan need exists."""
    check_polish(plan, stream, matrices)
    check_permute(plan, dtype)
    check_trials(plan, matrices, stream)
    check_biases(plan, stream, matrices)
    check_reach(plan)
    check_ratios(plan, stream, matrices)


def check_biases(plan: Plan, stream: Stream, matrices: dict[int, list[Matrix]]) -> None:
    """Check that there are biases that can compensate for means."""
    for index, ms in matrices.items() if plan.mean_bias else ():
        held = dict(stream.walk.model.get_submodule(stream.path_of(index)).named_parameters())
        missing = [m.name for m in ms if m.bias not in held]
        if missing:
            raise RequestError(
                f"{stream.path_of(index)}.{missing[0]}: has no bias to compensate for the means of dropped units",
                "store the model with biases of zero first (Llama: attention_bias, mlp_bias), or use --criterion fluctuation --solver refit",
            )


def check_ratios(plan: Plan, stream: Stream, matrices: dict[int, list[Matrix]]) -> None:
    """An allocation that looks at nothing can be checked at once."""
    for name, allocation in allocations(plan).items():
        if allocation.looks_at == "nothing":
            share(Work(stream, torch.empty(0), plan, matrices), {}, name)  # no window is read


def check_reach(plan: Plan) -> None:
    """Check that an exact share can be met: by equal numbers only where layers have equally many units, by unequal ones within what they can lose."""
    structure = plan.structure
    if structure is None or not structure.given or not structure.cut:
        return
    cuts, name = structure.cut.values(), structure.name
    if structure.uniform:
        counts = sorted({cut.space.units for cut in cuts})
        if name == "experts" and len(counts) > 1:
            raise RequestError(f"experts in equal numbers: layers have {', '.join(map(str, counts))}", "add --allocation sensitivity")
        return
    most = sum(cut.size * cut.levels[-1] for cut in cuts) / structure.weights
    least = min((cut.size * cut.levels[1] for cut in cuts if len(cut.levels) > 1), default=0) / structure.weights
    if plan.sparsity > most + EXACT or 0 < plan.sparsity < least - EXACT:
        raise RequestError(
            f"{name} at sparsity {plan.sparsity:.4g}: {least:.4g} is the least that can be dropped, {most:.4g} the most",
            "ask for a share between them",
        )


def share_for(name: str, target: int, total: int, room: int) -> float:
    """The sparsity that leaves ``target`` of ``total`` (non-zero parameters of the whole model, or bytes), where only ``room`` of them can be pruned.

    Raises RequestError where that is impossible.
    """
    if not total - room < target <= total:
        raise RequestError(
            f"{name} {target:,}: the model has {total:,}, of which {room:,} can be pruned",
            f"ask for more than {total - room:,} and at most {total:,}",
        )
    return (total - target) / room


def check_trials(plan: Plan, matrices: dict[int, list[Matrix]], stream: Stream) -> None:
    """Trials compare predictions under one head."""
    if is_tried(plan.allocation) and len(stream.names) in matrices:
        raise RequestError("trials of ratios with a pruned head: they need the unpruned one", "exclude the head with --skip, or use fisher")


def check_permute(plan: Plan, dtype: torch.dtype) -> None:
    """Whether channels can be reordered is tested on each block, which needs the precision of float32."""
    if plan.permute and dtype != torch.float32:
        raise RequestError(f"permute with {str(dtype).removeprefix('torch.')} computing", "add --dtype float32, or omit --permute")


def check_polish(plan: Plan, stream: Stream, matrices: dict[int, list[Matrix]]) -> None:
    """Check that the whole model can be trained in memory, and that its head is not pruned: the teacher uses it too."""
    if not plan.polish_steps:
        return
    if len(stream.names) in matrices:
        raise RequestError("polish kd with a pruned head: the teacher needs the unpruned one", "exclude the head with --skip, or add --polish none")
    need, free = count_parameters(stream.walk.model) * BYTES_PER_WEIGHT, memory_of(stream.device_of(0))
    if need > free:
        raise RequestError(f"polish kd: training the whole model takes about {need:,} bytes, {free:,} are free", "add --polish none")


def check_length(length: int, config: Any) -> None:
    positions = longest_sequence(config)
    if positions is not None and length > positions:
        raise RequestError(f"windows of {length} tokens: the model has {positions} positions", f"--sequence-length {positions} or less")


def check_ids(windows: Windows, model: Any) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    lowest, highest = (int(v) for v in windows.ids_NL.aminmax())
    if lowest < 0 or highest >= vocabulary:
        odd = lowest if lowest < 0 else highest
        raise RequestError(f"{windows.dataset}: token id {odd}, the model's vocabulary is 0 to {vocabulary - 1}", "the tokenizer is not this model's")
