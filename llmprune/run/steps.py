"""The heart of every run, of a checkpoint or a live model: gradients, ratios, the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any

from llmprune.data.windows import RunData
from llmprune.engine import prune
from llmprune.errors import RequestError
from llmprune.pruners.choice import coarse_pruner, fine_pruner
from llmprune.pruners.coarse import COARSE
from llmprune.pruners.plan import Work
from llmprune.pruners.unit_scores import graded
from llmprune.ratios.measured import dense_gradients
from llmprune.ratios.trials import Decision, decide
from llmprune.recipe.recipe import Recipe
from llmprune.report.fields import typed
from llmprune.results import BlockReport, Step
from llmprune.run.planning import with_latency
from llmprune.stream.reshaped import Reshaped
from llmprune.stream.stream import Stream
from llmprune.types import Listener, Records


class Forgetful:
    """The records of a run that no later process can resume."""

    def read(self, name: str) -> dict[str, Any] | None:
        return None

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Nothing is stored."""


def with_gradients(work: Work, listen: Listener) -> Work:
    """With the gradients of the dense model that its pruning and its allocation need; call it before anything is pruned. Raises RequestError as
    check_carried.
    """
    check_carried(work)
    plan, wanted = work.plan, graded(work.stream, work.matrices, work.plan)
    return replace(work, gradients=dense_gradients(work.stream, work.windows_NL, wanted, [plan], listen))


def check_carried(work: Work) -> None:
    """Raises RequestError where blocks hand on more than hidden states to the next one, and the plan drops or trains across blocks."""
    stream, plan = work.stream, work.plan
    if not (plan.structure or plan.polish_steps) or stream.walk.returned in (0, 1):
        return
    with stream.outer():
        _, calls = stream.walk.record(work.windows_NL[:1].to(stream.device_of(0)))
    if any(call.handed is not None for call in calls):
        what = f"pattern {plan.structure.name}" if plan.structure else "polish"
        name = type(stream.walk.model).__name__
        raise RequestError(f"{what} with {name}, whose blocks hand on more than hidden states", "use an N:M or unstructured pattern without --polish")


def decided(recipe: Recipe, work: Work, data: RunData, records: Records, listen: Listener) -> Decision:
    """What is dropped in all and of each matrix: as an earlier process found it, or measured now, before anything is pruned."""
    record = records.read("ratios")
    if record is None:
        known = records.read("frontier") or {"steps": []}

        def on_step(step: Step) -> None:
            known["steps"].append(asdict(step))
            records.write("frontier", known)

        steps = typed(tuple[Step, ...], known["steps"])
        timed = replace(work, plan=with_latency(recipe, work.plan, work.stream, work.windows_NL, listen))
        record = asdict(decide(timed, data.held, recipe.max_ppl_increase, steps, replace(listen, on_step=on_step)))
        records.write("ratios", record)
    return typed(Decision, record)


def prune_blocks(
    recipe: Recipe,
    work: Work,
    decision: Decision,
    records: Records,
    listen: Listener,
    finished: Mapping[int, BlockReport] = MappingProxyType({}),
    polished: bool = False,
) -> tuple[list[BlockReport], Stream]:
    """(a report for each block, the stream as it shows the pruned model). finished, polished: by an earlier process, so not done again."""
    work = replace(work, plan=replace(work.plan, sparsity=decision.sparsity))
    asked, structure, walked = decision.ratios.asked, work.plan.structure, work.stream
    shown = work.stream if structure is None else Reshaped(work.stream, structure)
    if isinstance(shown, Reshaped) and shown.structure.name in COARSE:
        walked = shown
        pruner = coarse_pruner(work, shown, asked, recipe.parts.criterion or "", records, listen)
    else:
        pruner = fine_pruner(work, asked)
    if len(finished) == len(pruner.places) and (polished or not work.plan.polish_steps):
        for index, report in finished.items():
            pruner.take_over(index, report)
        return list(finished.values()), shown
    return prune(walked, work.windows_NL, pruner, finished, listen), shown
