"""Ratios and sparsities tried on the whole model: it is pruned on calibration windows, measured on others, and forgotten again.

Shapes: N = windows, L = tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune.data.windows import Windows
from llmprune.engine import prune
from llmprune.errors import RequestError
from llmprune.evaluation.divergence import after_blocks, divergences
from llmprune.evaluation.perplexity import perplexity
from llmprune.pruners.choice import fine_pruner
from llmprune.pruners.plan import Work
from llmprune.pruners.weights import Variants
from llmprune.ratios.measured import Measured, Ratios, is_tried, measure, share
from llmprune.results import Step, Trial
from llmprune.stream.flow import Flow
from llmprune.stream.hidden_states import place_hidden
from llmprune.types import SILENT, Listener, TriedAllocation

TRIAL_WINDOWS = 64  # calibration windows of the trials that choose ratios, at most
STEPS = 3  # up and down from the best start
STEP = 0.04  # of the median matrix: the weights of one step
FARTHEST = 0.2  # of a matrix, from its ratio at the start
MOST_TRIALS = 12  # of a search for a sparsity
NEAR = 0.85  # of the allowed increase: close enough


@dataclass(frozen=True)
class Trials:
    """What all trials of a run share. held_NL: windows for measuring; those of ``work`` are for pruning."""

    work: Work
    held_NL: Tensor

    def prune(self, asked: dict[str, float], variants: Variants | None = None) -> None:
        """Call it in a trial of the stream."""
        prune(self.work.stream, self.work.windows_NL, fine_pruner(self.work, asked, variants), {}, SILENT)

    def divergence(self, dense: Flow, asked: dict[str, float]) -> float:
        """From the dense model on the held windows."""
        with self.work.stream.trial():
            self.prune(asked)
            return divergences(dense, [after_blocks(self.work.stream, self.held_NL)])[0]


@torch.no_grad()
def choose(work: Work, held: Windows | None, measured: Measured, listen: Listener) -> Ratios:
    """The ratios that a plan's allocation gives, after trials if it makes some; trials do not train."""
    if not is_tried(work.plan.allocation):
        return share(work, measured)
    if held is None:
        raise RequestError("trials of ratios with a single calibration window", "calibrate on more")
    cheap = replace(work.plan, polish_steps=0, reconstruct=None, accept_damage=True)
    trials = Trials(replace(work, plan=cheap, windows_NL=work.windows_NL[:TRIAL_WINDOWS]), held.ids_NL)
    return best_of(trials, work.plan.allocation, measured, listen)


def best_of(trials: Trials, allocation: TriedAllocation, measured: Measured, listen: Listener) -> Ratios:
    names = allocation.starts
    dense = after_blocks(trials.work.stream, trials.held_NL)
    found = []
    for done, name in enumerate(names):
        ratios = share(trials.work, measured, name)
        found.append((trials.divergence(dense, ratios.asked), name, ratios))
        listen.progress("trials", done + 1, len(names) + 1)
    least, best, ratios = min(found, key=lambda entry: entry[0])
    tried = {name: value for value, name, _ in found}
    better = improved(trials, allocation, ratios.asked) if allocation.evolves else None
    if better is not None:
        name = f"from {best}"
        tried[name] = trials.divergence(dense, better)
        if tried[name] < least:
            ratios, best = replace(ratios, asked=better), name
    listen.progress("trials", len(names) + 1, len(names) + 1)
    return replace(ratios, tried=tuple(Trial(name, value, name == best) for name, value in tried.items()))


def improved(trials: Trials, allocation: TriedAllocation, asked: dict[str, float]) -> dict[str, float] | None:
    """The allocation's improvement of the best ratios; None where it keeps them."""
    work, sizes = trials.work, trials.work.sizes
    step = max(1, round(STEP * float(torch.tensor(list(sizes.values()), dtype=torch.float64).median())))
    ratios = {name: reachable(asked[name], size, step) for name, size in sizes.items()}
    room = {name: (min(steps), max(steps)) for name, steps in ratios.items() if len(steps) > 1}

    def fitness(candidates: list[dict[str, int]], windows: int) -> list[float]:
        return assembled(work, variants, dense, candidates, windows)

    with work.stream.trial():
        dense = after_blocks(work.stream, work.windows_NL)  # nothing is pruned yet
        weights = sum(sizes[name] * len(steps) for name, steps in ratios.items())
        variants = Variants(ratios, place_hidden(4 * weights, torch.device("cpu"), work.stream.scratch))
        trials.prune(asked, variants)
        steps = allocation.improve(room, fitness)
    return None if steps is None else asked | {name: ratios[name][k] for name, k in steps.items()}


def reachable(ratio: float, size: int, step: int) -> dict[int, float]:
    """Step -> ratio of a matrix, for all steps of that many weights within reach."""
    near = {k: ratio + k * step / size for k in range(-STEPS, STEPS + 1)}
    return {k: r for k, r in near.items() if k == 0 or (0 <= r < 1 and abs(r - ratio) <= FARTHEST)}


def assembled(work: Work, variants: Variants, dense: Flow, candidates: list[dict[str, int]], windows: int) -> list[float]:
    """Divergence of models assembled from variants of their matrices, on the first windows. Each block is loaded once for all of them."""
    first = Flow(work.stream, work.windows_NL[:windows])
    flows = [first, *(first.twin() for _ in candidates[1:])]
    for index in range(len(work.stream.names)):
        with work.stream.block(index) as block:
            for flow, candidate in zip(flows, candidates, strict=True):
                for m in work.matrices.get(index, []):
                    name = work.name_of(index, m)
                    m.view(block).copy_(variants.found[name, candidate.get(name, 0)])
                flow.through(index, block)
    return divergences(dense, flows)


@dataclass(frozen=True)
class Decision:
    """The sparsity of a run, and the ratio of each matrix."""

    sparsity: float
    ratios: Ratios
    frontier: tuple[Step, ...] = ()


def decide(
    work: Work, held: Windows | None, most_increase: float | None = None, frontier: tuple[Step, ...] = (), listen: Listener = SILENT
) -> Decision:
    """The plan's ratios; with ``most_increase``, the largest sparsity whose perplexity on the held windows is no more than this above the dense one.

    frontier: known steps. Raises RequestError when not even a small sparsity stays within the increase.
    """
    measured = measure(work, listen)
    if most_increase is None:
        return Decision(work.plan.sparsity, choose(work, held, measured, listen))
    if held is None:
        raise RequestError("a budget of perplexity with a single calibration window", "calibrate on more")
    steps = list(frontier)
    dense = perplexity(work.stream, held).value

    def increase_at(sparsity: float) -> float:
        known = [step for step in steps if step.sparsity == sparsity]
        if not known:
            value = perplexity_at(work, held, measured, sparsity)
            known = [Step(sparsity, value, value / dense - 1)]
            steps.extend(known)
            listen.on_step(known[0])
        listen.progress("budget", len(steps), max(len(steps), MOST_TRIALS))
        return known[0].increase

    sparsity = sparsest(increase_at, most_increase, work.plan.sparsity)
    if not sparsity:
        raise RequestError(
            f"max-ppl-increase {most_increase:.1%}: {min(step.increase for step in steps):.1%} is the least that was reached", "allow more"
        )
    ratios = share(replace(work, plan=replace(work.plan, sparsity=sparsity)), measured)
    return Decision(sparsity, ratios, tuple(sorted(steps, key=lambda step: step.sparsity)))


def perplexity_at(work: Work, held: Windows, measured: Measured, sparsity: float) -> float:
    """Of the model pruned to a sparsity, and forgotten again. A destroyed block shows in the perplexity."""
    at = replace(work, plan=replace(work.plan, sparsity=sparsity, accept_damage=True))
    with at.stream.trial():
        prune(at.stream, at.windows_NL, fine_pruner(at, share(at, measured).asked), {}, SILENT)
        return perplexity(at.stream, held).value


def sparsest(increase_at: Callable[[float], float], limit: float, most: float) -> float:
    """The largest sparsity up to ``most`` found whose increase is within the limit, by bisection until one is close to it. 0: none was found."""
    low, high = 0.0, most
    guess = min(0.5, most)
    for _ in range(MOST_TRIALS):
        increase = increase_at(guess)
        low, high = (guess, high) if increase <= limit else (low, guess)
        if limit * NEAR <= increase <= limit or high - low < 1e-3:
            break
        guess = (low + high) / 2
    return low
