"""The phases of a run in order, each with an estimate of its work, so that the time left can be estimated from the time spent.

The unit is the product of one weight with one value of one token; only ratios count. What is measured on the way (allocations, trials) is not
planned: it appears when it begins.
"""

from __future__ import annotations

from typing import TypeAlias

from llmprune.evaluation import sample
from llmprune.maths.coupled_rows import rows_together
from llmprune.model.skeleton import count_parameters
from llmprune.pruners.distillation import TOKENS_PER_STEP
from llmprune.ratios.measured import needs_of, windows_graded
from llmprune.run.prepare import Job
from llmprune.statistics.gradients import GRADIENTS

Phases: TypeAlias = list[tuple[str, float]]

SOLVER = 20  # products with the Gram matrix of the inputs, or of the gradients, that a solver makes of a matrix, about
SCORES = 200  # operations on a weight that is only scored and dropped
PROMPT_TOKENS = 12
SMALL_PART = 0.05
WRITTEN = 100  # operations in whose time a weight is written, hashed and loaded again


def phases(job: Job) -> Phases:
    """Of a run in one round."""
    texts = [("sample", _sample(job))] if has_sample(job) else []
    return [*dense_evaluation(job), *texts, *pruning(job), *pruned_evaluation(job), *texts, writing(job)]


def has_sample(job: Job) -> bool:
    """Whether both models continue a prompt: where that was asked for, or is a small part of the run. A resumed run decides equally."""
    rest = [*dense_evaluation(job), *pruning(job), *pruned_evaluation(job), writing(job)]
    return job.recipe.write_sample or 2 * _sample(job) <= SMALL_PART * sum(cost for _, cost in rest)


def dense_evaluation(job: Job) -> Phases:
    inside, head = _sizes(job)
    return [("dense evaluation", float(windows.ids_NL.numel() * (inside + head))) for windows in job.data.evaluation]


def pruning(job: Job) -> Phases:
    inside, head = _sizes(job)
    plan, tokens = job.plan, job.data.calibration.ids_NL.numel()
    found = []
    if needs := needs_of(plan) & GRADIENTS:
        windows_NL = job.data.calibration.ids_NL
        found.append(("gradients", 4.0 * windows_graded(windows_NL, needs) * windows_NL.shape[1] * (inside + head)))
    found.append(("prune", (4.0 if plan.asymmetric else 2.0) * tokens * inside + _solving(job, tokens)))
    if plan.polish_steps:
        length = job.data.calibration.ids_NL.shape[1]
        found.append(("polish", 4.0 * plan.polish_steps * max(TOKENS_PER_STEP, length) * (inside + head)))
    return found


def pruned_evaluation(job: Job) -> Phases:
    inside, head = _sizes(job)
    return [("pruned evaluation", float(windows.ids_NL.numel() * (inside + 2 * head))) for windows in job.data.evaluation]


def writing(job: Job) -> tuple[str, float]:
    return "write", float(WRITTEN * count_parameters(job.stream.skeleton))


def _sample(job: Job) -> float:
    """Of one model: the prompt and the tokens so far pass through it for each further token."""
    return float(sample.TOKENS * (PROMPT_TOKENS + sample.TOKENS // 2) * sum(_sizes(job)))


def _solving(job: Job, tokens: int) -> float:
    """Scores and repairs of all matrices, and the Gram matrices of their inputs."""
    matrices = [m for ms in job.matrices.values() for m in ms]
    if "gram" not in job.plan.needs:
        return float(SCORES * sum(m.rows * m.columns for m in matrices))
    coupled = sum(m.columns * m.rows * rows_together(m.rows) for m in matrices) if "grad_out_gram" in job.plan.needs else 0
    return float(sum(m.columns**2 * (tokens + SOLVER * m.rows) for m in matrices) + SOLVER * coupled)


def _sizes(job: Job) -> tuple[int, int]:
    """Weights of the blocks, and of the head."""
    head = sum(p.numel() for p in job.stream.walk.head.parameters())
    return sum(p.numel() for p in job.stream.walk.blocks.parameters()), head
