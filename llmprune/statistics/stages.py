"""What enters the matrices of a block: of all at once, or stage by stage with the dense path beside.

Shapes: C = input columns, R = output rows, T = tokens, N = windows, L = window length, D = hidden width.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import StoppedError
from llmprune.model.channels import Channels, find_channels
from llmprune.model.matrices import Matrix, block_matrices
from llmprune.statistics.dataflow import Follow, stages
from llmprune.statistics.products import Products
from llmprune.statistics.staged_forward import Passage, Repeated, Waiting, traced
from llmprune.statistics.straight import Irregular, Program, read_program, total
from llmprune.statistics.sums import Reached, Watch, accumulate_input, finish
from llmprune.stream.clock import Clock
from llmprune.stream.flow import Flow
from llmprune.stream.hidden_states import FileHidden, MemoryHidden, memory_of, place_hidden
from llmprune.types import Stat, Stats

MOST_THREADS = 256
GRAM_SHARE = 4  # Gram matrices that are held together take at most one part in so many of what is free


def part_by_part(
    flow: Flow, index: int, block: nn.Module, matrices: list[Matrix], needs: frozenset[Stat], clock: Clock
) -> Generator[tuple[list[Matrix], dict[str, Stats]], None, None]:
    """(matrices, their statistics) of the unpruned block: of all, or of as many at a time as Gram matrices fit. The last come first, so that pruning
    them does not change the inputs of the others. The outputs of the unpruned block are left in ``flow.outputs``.
    """
    for number, part in enumerate(reversed(fitting(matrices, needs, flow.stream.device_of(index)))):
        yield part, at_once(flow, index, block, part, needs, clock, keep=number == 0)


def fitting(matrices: list[Matrix], needs: frozenset[Stat], device: torch.device) -> list[list[Matrix]]:
    """The matrices in runs whose Gram matrices take no more than a quarter of the memory that is free."""
    if "gram" not in needs:
        return [matrices]
    room = memory_of(device) // GRAM_SHARE
    runs: list[list[Matrix]] = [[]]
    size = 0
    for matrix in matrices:
        own = 4 * matrix.columns**2
        if runs[-1] and size + own > room:
            runs.append([])
            size = 0
        runs[-1].append(matrix)
        size += own
    return runs


def at_once(
    flow: Flow, index: int, block: nn.Module, matrices: list[Matrix], needs: frozenset[Stat], clock: Clock, keep: bool = True
) -> dict[str, Stats]:
    """Run the unpruned block on the pruned path's inputs. keep: leave its outputs in ``flow.outputs``."""
    watching = Watch(block, matrices, needs, path=flow.stream.path_of(index))
    for batch in range(len(flow)):
        with watching:
            left_NLD = flow.run(index, block, batch)
        if keep:
            flow.outputs[batch] = left_NLD
        watching.next_batch()
    watching.close()
    clock.lap("forward", of_which={"statistics": watching.seconds})
    return watching.stats


def at_head(flow: Flow, dense: Flow | None, head: nn.Module, matrices: list[Matrix], needs: frozenset[Stat]) -> dict[str, Stats]:
    """What enters the head behind the last block, on both paths if there is a dense one."""
    walk = flow.stream.walk
    watching, beside = Watch(head, matrices, needs, path=walk.head_path), Watch(head, matrices, frozenset())
    for (ids_1L, ours_1LD), (_, theirs_1LD) in zip(flow.windows(), (dense or flow).windows(), strict=True):
        with watching:
            walk.logits(ids_1L, ours_1LD)
        if dense is not None:
            with beside:
                walk.logits(ids_1L, theirs_1LD)
            for name, value in watching.inputs.items():
                accumulate_cross(watching.stats[name], value, beside.inputs[name])
        watching.next_batch()
        beside.next_batch()
    watching.close()
    return watching.stats


def stage_by_stage(
    flow: Flow,
    dense: Flow,
    index: int,
    block: nn.Module,
    matrices: list[Matrix],
    needs: frozenset[Stat],
    clock: Clock,
    reordered: Mapping[str, Tensor] = MappingProxyType({}),
) -> Generator[tuple[list[Matrix], dict[str, Stats]], None, None]:
    """(matrices, their statistics) of every stage; the caller prunes a stage before it asks for the next, and records in ``reordered`` the
    new order of a matrix's input channels.

    The dense path runs through the block first; then the pruned path runs up to each stage in turn, so that a stage's inputs come from the pruned
    stages before it. At the end, the block's outputs are in ``dense.outputs`` and ``flow.outputs``.
    """
    straight = record_straight(dense, index, block, matrices)
    if straight:
        yield from straight_stages(flow, index, block, *straight, needs, clock, reordered)
    else:
        yield from marked_stages(flow, dense, index, block, matrices, needs, clock)


class Kept:
    """The dense path's inputs and partners in one block, in memory or a file, by (stage or matrix, batch)."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._store: MemoryHidden | FileHidden | None = None
        self._held: set[tuple[str, Any, int]] = set()
        self.size = 0  # bytes of all micro-batches

    def put(self, batch: int, inputs: dict[Any, Tensor], partners: dict[str, Tensor]) -> None:
        values: dict[tuple[str, Any, int], Tensor] = {("input", name, batch): value for name, value in inputs.items()}
        values |= {("partner", name, batch): value for name, value in partners.items()}
        if self._store is None and values:
            self.size = sum(v.nbytes for v in values.values()) * len(self._flow)
            self._store = place_hidden(self.size, next(iter(values.values())).device, self._flow.stream.scratch)
        for key, value in values.items():
            assert self._store is not None
            self._store[key] = value
            self._held.add(key)

    def get(self, kind: str, name: Any, batch: int) -> Tensor | None:
        key = (kind, name, batch)
        return self._store[key] if self._store is not None and key in self._held else None

    def drop(self, names: set[Any]) -> None:
        """Forget the inputs of stages or matrices that have been pruned."""
        for key in [k for k in self._held if k[1] in names]:
            assert self._store is not None
            del self._store[key]
            self._held.remove(key)


# Straight blocks: see statistics/straight.py. ------------------------------------------------------------------------------------------------------


def record_straight(dense: Flow, index: int, block: nn.Module, matrices: list[Matrix]) -> tuple[Program, Kept] | None:
    """Run the block on the dense path; its program, and the inputs of its stages. None if it has no program, or a micro-batch deviates from it."""
    follow = Follow()
    watching = Watch(block, matrices, frozenset(), follow)
    dense.outputs[0] = followed(dense, index, block, 0, watching, follow)
    program = read_program(watching, follow, matrices)
    if program is None:
        return None
    kept = Kept(dense)
    inputs = {number: watching.own[stage[0].name] for number, stage in enumerate(program.stages)}
    partners = {name: [t for place, t in follow.partners[name] if place in places] for name, places in program.partners.items()}
    kept.put(0, inputs, {name: total(parts) for name, parts in partners.items()})
    products = Products(block, matrices)
    for batch in range(1, len(dense)):
        inputs = {}
        added: dict[str, Tensor] = {}

        def arrive(stage: int, value: Tensor, partners: dict[str, Tensor], inputs: Any = inputs, added: Any = added) -> None:
            inputs[stage] = value
            added.update(partners)

        try:
            dense.outputs[batch] = traced(dense, index, block, batch, program, products, arrive)
        except Irregular:
            return None
        kept.put(batch, inputs, added)
    return program, kept


def straight_stages(
    flow: Flow, index: int, block: nn.Module, program: Program, kept: Kept, needs: frozenset[Stat], clock: Clock, reordered: Mapping[str, Tensor]
) -> Generator[tuple[list[Matrix], dict[str, Stats]], None, None]:
    products = Products(block, [m for stage in program.stages for m in stage])
    passages: list[Passage] = []
    try:
        for batch in range(len(flow)):
            passages.append((Waiting if all_can_wait(flow, index, kept) else Repeated)(flow, index, block, batch, program, products))
        for number, stage in enumerate(program.stages):
            stats = Stats()
            partners: dict[str, Tensor] = {}
            for batch, passage in enumerate(passages):
                value, ours = passage.to(number)
                clock.lap("forward")
                accumulate_input(stats, value, needs)
                accumulate_cross(stats, value, kept.get("input", number, batch))
                for name, partner in ours.items():
                    accumulate_partner(partners, name, value, partner, kept.get("partner", name, batch))
                clock.lap("statistics")
            finish(stats, f"{flow.stream.path_of(index)}.{stage[0].name}")
            kept.drop({number, *(m.name for m in stage)})
            yield stage, {m.name: replace(stats, partner_RC=partners.get(m.name)) for m in stage}
            for name in (m.name for m in stage if m.name in reordered):
                for passage in passages:
                    passage.reorder(reordered[name])
        for batch, passage in enumerate(passages):
            # sums over channels in another order round differently, and a resumed run has only the new order
            flow.outputs[batch] = flow.run(index, block, batch) if reordered else passage.out()
        clock.lap("forward")
    except Irregular:
        raise StoppedError(f"{flow.stream.names[index]}: takes another path once it is pruned", "use --target symmetric, and report this") from None
    finally:
        for passage in passages:
            passage.end()


def all_can_wait(flow: Flow, index: int, kept: Kept) -> bool:
    """Whether a block's micro-batches fit into memory side by side, and their threads (OpenMP makes a team for each) into the machine.

    A paused eager attention holds a few times heads x L^2 weights per window, which the sizes of inputs do not show.
    """
    config = flow.stream.walk.model.config
    windows, length = sum(len(ids_NL) for ids_NL in flow.ids), flow.ids[0].shape[1]
    attention = 0
    if getattr(config, "_attn_implementation", None) == "eager":
        attention = 4 * 4 * getattr(config.get_text_config(decoder=True), "num_attention_heads", 0) * length**2 * windows
    return len(flow) * torch.get_num_threads() <= MOST_THREADS and 4 * kept.size + attention < memory_of(flow.stream.device_of(index))


# Any other block: experts, matrices that are used several times. ----------------------------------------------------------------------------


def marked_stages(
    flow: Flow, dense: Flow, index: int, block: nn.Module, matrices: list[Matrix], needs: frozenset[Stat], clock: Clock
) -> Generator[tuple[list[Matrix], dict[str, Stats]], None, None]:
    kept, calls = record_marked(dense, index, block, matrices)
    grouped, in_order = stages(calls, matrices)
    for number, stage in enumerate(grouped):
        behind = [m for later in grouped[number + 1 :] for m in later] if in_order else []
        # matrices that share an input stay together; experts never do
        alone = [m for m in stage if m.expert is not None]
        parts = fitting(alone, needs, flow.stream.device_of(index))
        rest = [m for m in stage if m.expert is None]
        for part in [stage] if len(parts) == 1 else [*([rest] if rest else []), *parts]:
            yield part, watch_stage(flow, index, block, part, behind, needs, kept, clock)
    for batch in range(len(flow)):
        flow.outputs[batch] = flow.run(index, block, batch)


def record_marked(dense: Flow, index: int, block: nn.Module, matrices: list[Matrix]) -> tuple[Kept, list[tuple[str, int]]]:
    """Run the block on the dense path; (the inputs of its matrices there, the calls of all micro-batches with their depths)."""
    kept = Kept(dense)
    follow = Follow()
    watching = Watch(block, matrices, frozenset(), follow)
    single = {m.name for m in matrices if m.expert is None}
    calls = []
    for batch in range(len(dense)):
        dense.outputs[batch] = followed(dense, index, block, batch, watching, follow)
        inputs = {n: v for n, v in watching.inputs.items() if n in single}
        kept.put(batch, inputs, {n: total([t for _, t in ps]) for n, ps in follow.partners.items() if n in single})
        calls += follow.calls
        watching.next_batch()
    return kept, calls


def followed(flow: Flow, index: int, block: nn.Module, batch: int, watching: Watch, follow: Follow) -> Tensor:
    hidden_NLD, call = flow.entering(index, batch)
    follow.start()
    follow.enter((hidden_NLD, call.args, call.kwargs))
    with watching:
        return flow.stream.walk.replay(block, hidden_NLD, call)


def watch_stage(
    flow: Flow, index: int, block: nn.Module, stage: list[Matrix], behind: list[Matrix], needs: frozenset[Stat], kept: Kept, clock: Clock
) -> dict[str, Stats]:
    """Run the pruned path up to the matrices ``behind`` the stage; the stage's sums, including those with the dense path."""
    follow = Follow()
    watching = Watch(block, stage, needs, follow, until=behind, path=flow.stream.path_of(index))
    partners: dict[str, Tensor] = {}
    for batch in range(len(flow)):
        with suppress(Reached):
            followed(flow, index, block, batch, watching, follow)
        clock.lap("forward", of_which={"statistics": watching.seconds})
        watching.seconds = 0.0
        for name, value in watching.inputs.items():
            if name not in watching.several:
                accumulate_cross(watching.stats[name], value, kept.get("input", name, batch))
        for m in stage:
            if m.name in watching.several:
                continue
            given, found = watching.own.get(m.name), follow.partners.get(m.name)
            if given is not None and found:
                accumulate_partner(partners, m.name, given, total([t for _, t in found]), kept.get("partner", m.name, batch))
        watching.next_batch()
        clock.lap("statistics")
    watching.close()
    return {name: replace(stats, partner_RC=partners.get(name), several=name in watching.several) for name, stats in watching.stats.items()}


def inner_channels(flow: Flow, index: int, block: nn.Module, matrices: list[Matrix]) -> dict[str, Channels]:
    """The input channels that can be reordered, by the matrix that reads them; found on the first micro-batch."""
    everything = block_matrices(block)
    follow = Follow()
    try:
        followed(flow, index, block, 0, Watch(block, everything, frozenset(), follow), follow)
    except StoppedError:  # a matrix that is excluded is used in an unknown way
        return {}
    matrices = [m for m in matrices if m.first is None]  # all that reads an input is reordered, or nothing
    writers = {m.name: [w for w in everything if w.name in follow.made_of.get(m.whole, ())] for m in matrices}
    config = flow.stream.walk.model.config.get_text_config(decoder=True)
    query = getattr(config, "num_attention_heads", 0)
    heads: tuple[int, int] = query, getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or query
    call = flow.calls[0][index]
    if any(isinstance(value, MutableMapping) for value in (*call.args, *call.kwargs.values())):
        heads = 0, 0  # later blocks may read its values
    return find_channels(block, [m for m in matrices if writers[m.name]], writers, heads, lambda: flow.run(index, block, 0))


# The sums -------------------------------------------------------------------------------------------------------------------------------------


def accumulate_cross(stats: Stats, pruned: Tensor, dense: Tensor | None) -> None:
    if dense is None or dense.shape != pruned.shape:
        return
    pruned_TC, dense_TC = (v.reshape(-1, v.shape[-1]).float() for v in (pruned, dense.to(pruned.device)))
    if stats.cross_CC is None:
        stats.cross_CC = pruned_TC.new_zeros(pruned_TC.shape[1], pruned_TC.shape[1])
    stats.cross_CC.addmm_(dense_TC.T, pruned_TC)


def accumulate_partner(sums: dict[str, Tensor], name: str, value: Tensor, pruned: Tensor, dense: Tensor | None) -> None:
    """Add (p - p') x'^T of one micro-batch."""
    if dense is None or dense.shape != pruned.shape:
        return
    apart_TR = (dense.to(pruned.device) - pruned).reshape(-1, pruned.shape[-1]).float()
    value_TC = value.reshape(-1, value.shape[-1]).float()
    if len(apart_TR) != len(value_TC):  # added to a part of the product, a head or so
        return
    if name not in sums:
        sums[name] = value_TC.new_zeros(apart_TR.shape[1], value_TC.shape[1])
    sums[name].addmm_(apart_TR.T, value_TC)
