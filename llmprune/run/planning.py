"""A recipe for one model: the plan, the matrices that it goes over, and the sparsity that its budget means."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from llmprune.checkpoint.source import SIZES, Source
from llmprune.errors import RequestError
from llmprune.model.matrices import Matrix, Selection, block_matrices
from llmprune.model.skeleton import count_parameters, own_sizes
from llmprune.model.wrappers import is_wrapper
from llmprune.pruners.plan import Plan
from llmprune.pruners.rotation import check_rotation
from llmprune.ratios.latency import sparsity_for
from llmprune.recipe.recipe import Recipe
from llmprune.run.preflight import check_matrices, check_outside, check_unrecognised, share_for
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.stream.reshaped import Reshaped
from llmprune.stream.selected import check_skip, selected
from llmprune.stream.stream import Stream
from llmprune.stream.whole import WholeStream
from llmprune.structured.structure import structure_of
from llmprune.types import Listener

ZEROS_ONLY = "use a pattern that zeroes weights"


def planned(recipe: Recipe, stream: Stream, selection: Selection) -> tuple[Plan, dict[int, list[Matrix]]]:
    """The plan for a model, and the matrices that are pruned: for a structured pattern those that read the units. Raises RequestError."""
    if not recipe.structured:
        plan, matrices = recipe.plan(), selected(stream, selection)
        check_outside(stream, selection)
        check_matrices(matrices, stream, plan)
        check_unrecognised(stream, selection)
        return plan, matrices
    check_skip(stream, selection)
    if isinstance(stream, WholeStream):
        raise RequestError(f"pattern {recipe.pattern}: its tensors cannot be converted block by block", "use an unstructured or N:M pattern")
    check_towers(stream, recipe.pattern)
    structure = structure_of(
        stream.walk.model,
        stream.names,
        recipe.pattern,
        selection.takes,
        recipe.round_to,
        recipe.one_size,
        given=recipe.sparsity is not None,
        exact=recipe.exact,
        padded=recipe.pad,
        own=own_sizes(stream.source.config if isinstance(stream, CheckpointStream) else stream.walk.model.config.to_dict()),
    )
    touched = structure.repaired if structure.outer else structure.readers
    if recipe.rotate:
        check_rotation(stream.walk.model.config)
    readers = {i: touched(i, block) for i, block in enumerate(stream.walk.blocks)}
    if structure.outer:
        readers[len(stream.names)] = block_matrices(stream.walk.head) if stream.walk.head_free else []
    return recipe.plan(structure), readers


def check_towers(stream: Stream, pattern: str) -> None:
    """Raises RequestError where a smaller checkpoint could not keep the towers of a vision-language model, or where those write into what is cut."""
    name, parts = type(stream.walk.model).__name__, ", ".join(stream.towers)
    if parts and not is_wrapper(stream.walk.model):
        raise RequestError(f"pattern {pattern}: {name} leaves {parts} behind, and a smaller checkpoint would lack them", ZEROS_ONLY)
    if parts and pattern == "hidden":
        raise RequestError(f"pattern hidden: {parts} of {name} write into the residual stream", ZEROS_ONLY)


def with_budget(recipe: Recipe, plan: Plan, stream: Stream, matrices: dict[int, list[Matrix]], source: Source | None = None) -> Plan:
    """The plan with the sparsity that a budget of parameters or bytes means."""
    structure = plan.structure
    room = structure.weights if structure else sum(m.rows * m.columns for ms in matrices.values() for m in ms)
    if recipe.target_params:
        plan = replace(plan, sparsity=share_for("target_params", recipe.target_params, count_parameters(stream.walk.model), room))
    if recipe.target_size:
        if source is None:
            raise RequestError("target_size of a model in memory", "give --target-params")
        each = max(SIZES[entry.dtype] for entry in source.tensors.values())
        plan = replace(plan, sparsity=share_for("target_size", recipe.target_size, source.bytes, room * each))
    if structure and structure.name == "layers" and recipe.target_latency_ratio is None:
        structure.layers_to_drop(plan.sparsity)
    return plan


def with_latency(recipe: Recipe, plan: Plan, stream: Stream, ids_NL: Tensor, listen: Listener) -> Plan:
    """The plan with the sparsity that a budget of time means on this machine, which is measured."""
    if recipe.target_latency_ratio is None or plan.structure is None:
        return plan
    sparsity = sparsity_for(Reshaped(stream, plan.structure), ids_NL, recipe.target_latency_ratio, listen)
    return replace(plan, sparsity=sparsity)
