"""Distillation of the dense model into the kept weights of the pruned one: min KL(dense || pruned) of the next-token distributions on the calibration
windows, by Adam with frozen masks. Block matrices and the blocks' norm scales and biases are trained; embeddings, final norm and head are not.

Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531; Adam as in maths/masked_adam.py.

Shapes: N = windows, L = tokens of a window, D = hidden width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmprune.evaluation.divergence import kl
from llmprune.maths.masked_adam import SurvivorAdam
from llmprune.maths.mixed_precision import is_mixed, mixed_precision
from llmprune.model.matrices import Matrix
from llmprune.pruners.plan import Plan
from llmprune.pruners.reconstruction import store, trained_vectors, whole_parameters
from llmprune.results import Polished
from llmprune.stream.flow import Flow
from llmprune.stream.stream import Stream
from llmprune.types import Listener

TOKENS_PER_STEP = 1024
RATE = 0.01  # of a tensor's root mean square
BYTES_PER_WEIGHT = 29  # the weight, its gradient and the one that is added to it, two moments, the float32 copy, the value before, the mask


def polish(teacher: Flow, matrices: dict[int, list[Matrix]], plan: Plan, listen: Listener) -> None:
    """Distill the dense model into the pruned one, and store the changed tensors.

    teacher: the dense path after the last block. matrices: of each block that are trained.
    """
    stream = teacher.stream
    hashes: dict[str, str] = {}
    with stream.whole():
        blocks = {i: stream.walk.blocks[i] for i, ms in matrices.items() if whole_parameters(stream.walk.blocks[i], ms)}
        masked = {i: whole_parameters(block, matrices[i]) for i, block in blocks.items()}
        free = {i: trained_vectors(block) for i, block in blocks.items()}

        def settle() -> None:
            for i, block in blocks.items():
                store(stream, i, block, [*masked[i], *free[i]])

        polished = Polished(0, 0.0, 0.0, ())
        if masked:  # empty if only some experts of each stack are pruned: they cannot be trained without the others
            polished = distill(teacher, masked, free, plan, settle, listen)
        for index in blocks if polished.changed else ():
            hashes |= stream.keep(index, [*masked[index], *free[index]], again=True)
    listen.on_polish(polished, hashes)


def distill(
    teacher: Flow,
    masked: dict[int, dict[str, nn.Parameter]],
    free: dict[int, dict[str, nn.Parameter]],
    plan: Plan,
    settle: Callable[[], None],
    listen: Listener,
) -> Polished:
    """Train a model in place whose every block and outer part is loaded. teacher: the flow of the unpruned model, after its last block; its hidden
    states and the model's own head give its predictions. masked, free: the pruned parameters of each block, and its vectors that are trained
    too. plan: its polish_steps, seed and mixed_precision count. settle: rounds them to their stored dtype. A training without gain is undone.
    """
    stream, steps = teacher.stream, plan.polish_steps
    windows = [(ids_1L.cpu(), hidden_1LD.cpu()) for ids_1L, hidden_1LD in teacher.windows()]
    before = mean_divergence(stream, windows)
    each = min(len(windows), max(1, TOKENS_PER_STEP // windows[0][0].shape[1]))
    draw = torch.Generator().manual_seed(plan.seed)
    survivors, vectors = ([p for named in kind.values() for p in named.values()] for kind in (masked, free))
    with SurvivorAdam(survivors, vectors, steps, RATE) as adam:
        for step in range(steps):
            for n in torch.randperm(len(windows), generator=draw)[:each].tolist():
                with torch.enable_grad():
                    adam.add(divergence(stream, *windows[n], mixed=plan.mixed_precision) / each)
            adam.step()
            listen.progress("polish", step + 1, steps)
        settle()
        after = mean_divergence(stream, windows)
        adam.keep = after < before
    changed = tuple(f"{stream.path_of(i)}.{name}" for i in masked for name in (*masked[i], *free[i])) if adam.keep else ()
    return Polished(steps, before, min(before, after), changed, is_mixed(stream.device_of(0), windows[0][1].dtype, plan.mixed_precision))


def divergence(stream: Stream, ids_1L: Tensor, hidden_1LD: Tensor, *, mixed: bool = False) -> Tensor:
    """Mean over tokens of KL(dense || pruned), in nats. mixed: whether the pruned model may run in mixed precision."""
    device = stream.device_of(len(stream.names))
    ids_1L = ids_1L.to(device)
    with torch.no_grad():
        teacher_LV = stream.walk.logits(ids_1L, hidden_1LD.to(device))[0]
    with mixed_precision(device, hidden_1LD.dtype, mixed):
        logits_LV = stream.walk.model(input_ids=ids_1L, use_cache=False).logits[0]
    return kl(teacher_LV, logits_LV).mean()


def mean_divergence(stream: Stream, windows: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return sum(float(divergence(stream, *window)) for window in windows) / len(windows)
