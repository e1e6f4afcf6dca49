"""What enters the matrices of a block: of all at once, or stage by stage with the dense path beside.

Shapes: C = input columns, R = output rows, T = tokens, N = windows, L = window length, D = hidden width.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmprune.clock import Clock
from llmprune.model.follow import Follow, stages
from llmprune.model.matrices import Matrix
from llmprune.model.watch import Reached, Watch
from llmprune.stream import FileHidden, Flow, MemoryHidden, place_hidden
from llmprune.types import Plan, Stats


def at_once(flow: Flow, index: int, block: nn.Module, matrices: list[Matrix], plan: Plan, clock: Clock) -> dict[str, Stats]:
    """Run the unpruned block on the pruned path's inputs. Its outputs wait in ``flow.outputs``."""
    watching = Watch(block, matrices, plan.needs)
    for batch in range(len(flow)):
        with watching:
            flow.outputs[batch] = flow.run(index, block, batch)
        watching.next_batch()
    watching.close()
    clock.lap("forward", of_which={"statistics": watching.seconds})
    return watching.stats


def at_head(flow: Flow, dense: Flow | None, head: nn.Module, matrices: list[Matrix], plan: Plan) -> dict[str, Stats]:
    """What enters the head behind the last block, on both paths if there is a dense one."""
    watching, beside = Watch(head, matrices, plan.needs), Watch(head, matrices, frozenset())
    walk = flow.stream.walk
    for (ids_1L, ours_1LD), (_, theirs_1LD) in zip(flow.windows(), (dense or flow).windows(), strict=True):
        with watching:
            walk.logits(ids_1L, ours_1LD)
        if dense is not None:
            with beside:
                walk.logits(ids_1L, theirs_1LD)
            for name, value in watching.inputs.items():
                add_cross(watching.stats[name], value, beside.inputs[name])
        watching.next_batch()
        beside.next_batch()
    watching.close()
    return watching.stats


def stage_by_stage(
    flow: Flow, dense: Flow, index: int, block: nn.Module, matrices: list[Matrix], plan: Plan, clock: Clock
) -> Iterator[tuple[list[Matrix], dict[str, Stats]]]:
    """(matrices, their statistics) of every stage; the caller prunes a stage before it asks for the next.

    The dense path runs through the block first, its outputs wait in ``dense.outputs``; then the pruned path runs up to each stage in turn,
    so that a stage's inputs come from the pruned stages before it.
    """
    kept, calls = record_dense(dense, index, block, matrices)
    grouped, in_order = stages(calls, matrices)
    for number, stage in enumerate(grouped):
        behind = [m for later in grouped[number + 1 :] for m in later] if in_order else []
        yield stage, watch_stage(flow, index, block, stage, behind, plan, kept, clock)


class Kept:
    """The dense path's inputs and partners in one block, in memory or a file, by (matrix, batch)."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._store: MemoryHidden | FileHidden | None = None
        self._held: set[Hashable] = set()

    def put(self, batch: int, inputs: dict[str, Tensor], partners: dict[str, list[Tensor]]) -> None:
        values: dict[Hashable, Tensor] = {("input", name, batch): value for name, value in inputs.items()}
        values |= {("partner", name, batch): torch.stack(ps).sum(0) if len(ps) > 1 else ps[0] for name, ps in partners.items()}
        if self._store is None:
            size = sum(v.nbytes for v in values.values()) * len(self._flow)
            self._store = place_hidden(size, next(iter(values.values())).device, self._flow.stream.scratch)
        for key, value in values.items():
            self._store[key] = value
            self._held.add(key)

    def get(self, kind: str, name: str, batch: int) -> Tensor | None:
        key = (kind, name, batch)
        return self._store[key] if self._store is not None and key in self._held else None


def record_dense(dense: Flow, index: int, block: nn.Module, matrices: list[Matrix]) -> tuple[Kept, list[tuple[str, int]]]:
    """Run the block on the dense path; (what its matrices were given there, the calls of all micro-batches with their depths)."""
    kept = Kept(dense)
    follow = Follow()
    watching = Watch(block, matrices, frozenset(), follow)
    single = {m.name for m in matrices if m.expert is None}
    calls = []
    for batch in range(len(dense)):
        dense.outputs[batch] = followed(dense, index, block, batch, watching, follow)
        inputs = {n: v for n, v in watching.inputs.items() if n in single}
        kept.put(batch, inputs, {n: ps for n, ps in follow.partners.items() if n in single})
        calls += follow.calls
        watching.next_batch()
    return kept, calls


def followed(flow: Flow, index: int, block: nn.Module, batch: int, watching: Watch, follow: Follow) -> Tensor:
    call = flow.calls[batch][index]
    follow.start()
    follow.enter((flow.hidden[batch], call.args, call.kwargs))
    with watching:
        return flow.run(index, block, batch)


def watch_stage(
    flow: Flow, index: int, block: nn.Module, stage: list[Matrix], behind: list[Matrix], plan: Plan, kept: Kept, clock: Clock
) -> dict[str, Stats]:
    """Run the pruned path up to the matrices ``behind`` the stage; the stage's sums, those with the dense path among them."""
    follow = Follow()
    watching = Watch(block, stage, plan.needs, follow, until=behind)
    partners: dict[str, Tensor] = {}
    for batch in range(len(flow)):
        with suppress(Reached):
            followed(flow, index, block, batch, watching, follow)
        clock.lap("forward", of_which={"statistics": watching.seconds})
        watching.seconds = 0.0
        for name, value in watching.inputs.items():
            add_cross(watching.stats[name], value, kept.get("input", name, batch))
        for m in stage:
            add_partner(partners, m.name, watching.input_of(m.name), follow.partners.get(m.name), kept.get("partner", m.name, batch))
        watching.next_batch()
        clock.lap("statistics")
    watching.close()
    return {name: replace(stats, partner_RC=partners.get(name)) for name, stats in watching.stats.items()}


def add_cross(stats: Stats, pruned: Tensor, dense: Tensor | None) -> None:
    if dense is None or dense.shape != pruned.shape:
        return
    pruned_TC, dense_TC = (v.reshape(-1, v.shape[-1]).float() for v in (pruned, dense.to(pruned.device)))
    if stats.cross_CC is None:
        stats.cross_CC = pruned_TC.new_zeros(pruned_TC.shape[1], pruned_TC.shape[1])
    stats.cross_CC.addmm_(dense_TC.T, pruned_TC)


def add_partner(sums: dict[str, Tensor], name: str, value: Tensor | None, pruned: list[Tensor] | None, dense: Tensor | None) -> None:
    """Add (p - p') x'^T of one micro-batch."""
    if value is None or not pruned or dense is None:
        return
    ours = torch.stack(pruned).sum(0) if len(pruned) > 1 else pruned[0]
    if dense.shape != ours.shape:
        return
    apart_TR = (dense.to(ours.device) - ours).reshape(-1, ours.shape[-1]).float()
    value_TC = value.reshape(-1, value.shape[-1]).float()
    if name not in sums:
        sums[name] = value_TC.new_zeros(apart_TR.shape[1], value_TC.shape[1])
    sums[name].addmm_(apart_TR.T, value_TC)
