"""Masks that change while a model is trained, for any training loop.

    sparsify = Sparsifier(model, optimizer, "gradual", sparsity=0.7, end=900, every=10)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        sparsify.step()
        optimizer.zero_grad()

gradual    masks the smallest magnitudes of each matrix, more and more by a cubic
movement   those with the smallest S = -sum lr w dL/dw, the weights that training moves towards zero: for fine-tuning on a new task, since on the text
           that a model knows already the scores are mostly noise
rigl       keeps the sparsity and exchanges small weights for masked ones of large gradient
soft       trains dense weights behind hard masks by the gradient of a soft top-k (training/soft.py)
constant   only keeps the zeros

What is masked is exactly zero at once and, except by rigl and soft, stays masked.

Shapes: R = output rows, C = input columns; a mask has the shape of its parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from llmprune.errors import RequestError
from llmprune.model.blocks import Walk
from llmprune.model.matrices import Matrix, Selection, block_matrices
from llmprune.training.asked import Asked
from llmprune.training.holding import Handle, Held, like, local
from llmprune.training.masks import Masks, matrices_by_parameter, parameters_of, whole
from llmprune.training.moves import exchanged, masked_further
from llmprune.training.schedules import cosine, cubic
from llmprune.training.soft import Soft
from llmprune.training.state import State
from llmprune.types import Mask, Pattern

Move: TypeAlias = Callable[[str, int, Matrix, Mask], Mask]  # (parameter, number of the matrix in it, the matrix, its mask) -> its new mask


class Sparsifier:
    """Call ``step`` after every step of the optimizer; ``remove`` ends it."""

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: Optimizer,
        method: str = "gradual",
        *,
        steps: int | None = None,
        masks: Masks | None = None,
        resumed: State | None = None,
        **options: Any,
    ) -> None:
        """Masks are in force when this returns: ``masks``, or else the model's zeros; for ``rigl`` and ``constant`` with a sparsity, the smallest
        magnitudes too. options: the other fields of ``Asked``. steps: of the training. resumed: ``state`` of an earlier process.

        Raises RequestError for options that contradict each other, or do not fit the model.
        """
        self.asked = Asked(method, **options)
        self.schedule = self.asked.schedule(steps)
        self.done = 0
        self._pattern: Pattern = self.asked.built
        self._matrices = chosen(model, self.asked)
        check_shapes(self._matrices, self._pattern, self.asked.pattern)
        self._keep = started(model, self._matrices, resumed.masks if resumed else no_masks(masks) if method == "soft" else masks)
        self._parameters = Masks(self._keep).fitted(model)
        self._first = {n: [int((~m.view_of(self._keep[n])).sum()) for m in ms] for n, ms in self._matrices.items()}
        self._scores = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in self._parameters.items()} if method == "movement" else {}
        self._gradients: dict[str, Tensor] = {}
        self._soft = Soft(whole_only(self._parameters), self._matrices, self._pattern, self.asked.goal or 0.0) if method == "soft" else None
        softened = self._soft is not None and resumed is not None and not self._over(resumed.values["step"])
        self.held = Held(self._parameters, all_kept(self._keep) if softened else self._keep, optimizer)
        hooks = (self.held.optimizer.register_step_pre_hook(self._before_step), self.held.optimizer.register_step_post_hook(self._after_step))
        self._hooks: tuple[Handle, ...] = hooks
        if resumed is not None:
            self._resume(resumed)
        elif method in ("rigl", "constant"):
            self._begin()
        elif self._soft is not None and self.schedule is not None and self.schedule.due(0):
            self._soften(self._soft)
        self._watch()

    @property
    def masks(self) -> Masks:
        """Those in force."""
        return Masks(dict(self._keep))

    @property
    def state(self) -> State:
        """All that a later process needs to go on. Of a sharded model, every process has to ask for it."""
        values = {"step": self.done, "first": self._first, "asked": self._resolved}
        held = self._soft.dense if self._soft is not None else self._scores
        return State(self.masks, {name: whole(score) for name, score in held.items()}, values)

    @property
    def _resolved(self) -> dict[str, Any]:
        """What was asked for, with the schedule that follows from it and the length of the training."""
        return asdict(self.asked) | (asdict(self.schedule) if self.schedule else {})

    def step(self) -> None:
        """Count a step of the optimizer, and change the masks if the schedule says so."""
        self.done += 1
        if self.schedule is not None and self.schedule.due(self.done):
            if self._soft is not None:
                self._soften(self._soft)
            elif self.asked.method != "rigl":
                self._change(self._further)
            elif self._gradients:
                self._change(self._exchange)
        self._gradients = {}
        self._watch()

    def remove(self) -> None:
        """Train on without masks."""
        self.held.remove()
        for hook in self._hooks:
            hook.remove()

    def _begin(self) -> None:
        """Masks that do not become more: all of them at once. Raises RequestError where there are none."""
        if self.asked.goal is not None:
            self._change(self._further)
        if not self.masks.masked:
            raise RequestError(f"{self.asked.method}: no weight of the model is zero", "give a sparsity, or masks, or a model that has been pruned")

    def _resume(self, state: State) -> None:
        """Raises RequestError for a state of another training."""
        state.check(self._resolved)
        self.done, self._first = state.values["step"], state.values["first"]
        for name, score in self._scores.items():
            local(score).copy_(local(like(state.scores[name], score)))
        if self._soft is not None and state.scores and self.schedule is not None:
            self._soft.dense = {name: state.scores[name].to(p.device) for name, p in self._parameters.items()}
            self._keep |= self._soft.masks_at(self.schedule.progress(self.done))

    def _over(self, step: int) -> bool:
        """Whether masks no longer change after this step."""
        return self.schedule is None or step >= self.schedule.end

    def _soften(self, soft: Soft) -> None:
        """Masks for the dense weights as they are; at the end they are all that is left."""
        assert self.schedule is not None
        if not soft.dense:
            soft.begin()
        self._keep |= soft.masks_at(self.schedule.progress(self.done))
        if self._over(self.done):
            soft.end()
            self.held.change(self._keep)

    def _change(self, move: Move) -> None:
        for name, matrices in self._matrices.items():
            keep = self._keep[name].clone()
            for number, matrix in enumerate(matrices):
                view_RC = matrix.view_of(keep)
                view_RC.copy_(move(name, number, matrix, view_RC))
            self._keep[name] = keep
        self.held.change(self._keep)

    def _further(self, name: str, number: int, matrix: Matrix, keep_RC: Mask) -> Mask:
        """More masks, by magnitude or by movement."""
        score = whole(self._scores[name]) if self._scores else whole(self._parameters[name]).abs()
        progress = self.schedule.progress(self.done) if self.asked.grows and self.schedule else 1.0
        last = self._pattern.dropped(matrix.rows, matrix.columns, self.asked.goal or 0.0)
        return masked_further(matrix.view_of(score), keep_RC, self._pattern, cubic(self._first[name][number], last, progress))

    def _exchange(self, name: str, number: int, matrix: Matrix, keep_RC: Mask) -> Mask:
        assert self.schedule is not None
        share = cosine(self.asked.exchanged, self.schedule.progress(self.done))
        weight_RC = matrix.view_of(whole(self._parameters[name]))
        return exchanged(weight_RC, matrix.view_of(summed(self._gradients[name])), keep_RC, self._pattern, share)

    def _watch(self) -> None:
        """Before a step after which masks are exchanged, the gradients of masked weights are needed."""
        wanted = self.asked.method == "rigl" and self.schedule is not None and self.schedule.due(self.done + 1)
        self.held.before = self._collect if wanted else None

    def _collect(self, name: str, parameter: nn.Parameter) -> None:
        """Add up what masked weights would have had as gradient; of the others, the gradient has added it up already."""
        assert parameter.grad is not None
        total = local(self._gradients.setdefault(name, torch.zeros_like(parameter, dtype=torch.float32)))
        total.masked_fill_(~self.held.dropped(name), 0).add_(local(parameter.grad))

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        if self._soft is not None:
            self._soft.after_step(self._keep)

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        """S = -sum over steps of lr w dL/dw, by the gradients that the optimizer sees."""
        if self._soft is not None:
            self._soft.before_step()
        if not self._scores or self.schedule is None or self.done >= self.schedule.end:
            return
        rates = {p: group["lr"] for group in self.held.optimizer.param_groups for p in group["params"]}
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                local(self._scores[name]).sub_(rates[parameter] * (local(parameter.detach()).float() * local(parameter.grad).float()))


def all_kept(keep: Mapping[str, Mask]) -> dict[str, Mask]:
    return {name: torch.ones_like(mask) for name, mask in keep.items()}


def no_masks(masks: Masks | None) -> Masks:
    """Raises RequestError for masks."""
    if masks is not None:
        raise RequestError("masks with method soft, which begins with all weights", "omit them, or use gradual")
    return Masks({})


def whole_only(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Raises RequestError for sharded ones."""
    if any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        raise RequestError("method soft with sharded parameters, whose budget is the whole matrix's", "use gradual, or train by DDP")
    return parameters


def chosen(model: PreTrainedModel, asked: Asked) -> dict[str, list[Matrix]]:
    """Full parameter name -> the matrices in it that are masked, of the blocks, and the head if ``only`` names it. Raises RequestError where skip
    or only match nothing.
    """
    if not isinstance(model, PreTrainedModel):
        raise RequestError(f"{type(model).__name__}: no model of transformers", "give the model itself, not one that wraps it")
    selection, walk = Selection(asked.skip, asked.only), Walk(model)
    found = matrices_by_parameter(model, selection)
    head = f"{walk.head_path}.weight"
    if walk.head_free and selection.names(head):
        found[head] = block_matrices(walk.head)
    if not found:
        raise RequestError(f"only {asked.only!r}, skip {asked.skip!r}: no matrix is left", "llmprune inspect lists the names")
    if asked.skip and not any(selection.skips(name) for name in matrices_by_parameter(model, Selection(only="."))):
        raise RequestError(f"skip {asked.skip!r}: matches no matrix", "llmprune inspect lists the names")
    return found


def check_shapes(found: dict[str, list[Matrix]], pattern: Pattern, said: str) -> None:
    """Raises RequestError for matrices that a pattern's units do not divide."""
    for name, matrices in found.items():
        for m in matrices:
            if m.columns % pattern.unit or m.rows % pattern.tall:
                raise RequestError(f"{name}: {m.rows} x {m.columns}, which pattern {said} does not divide", "leave it out with skip")


def started(model: PreTrainedModel, found: dict[str, list[Matrix]], masks: Masks | None) -> dict[str, Tensor]:
    """The masks that a training starts with, where the parameters are; of all that are chosen. Raises RequestError for masks of others."""
    masks = masks or Masks.of_zeros(model, found)
    other = [name for name in masks.keep if name not in found]
    if other:
        raise RequestError(f"{other[0]}: has a mask, but is not among the matrices that are chosen", "change skip or only, or omit its mask")
    masks.fitted(model)
    free = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in parameters_of(model, found).items() if name not in masks.keep}
    return {name: (free | dict(masks.keep))[name].to(parameter.device) for name, parameter in parameters_of(model, found).items()}


def summed(gradient: Tensor) -> Tensor:
    """A gradient over all processes, each of which may have seen windows of its own."""
    if isinstance(gradient, DTensor):
        return gradient.full_tensor()  # its shards are sums already
    if dist.is_initialized():
        dist.all_reduce(gradient)
    return gradient
