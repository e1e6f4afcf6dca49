"""Masks before training: what is kept of a model at initialisation, or before it is fine-tuned.

- magnitude: |w|
- random: drawn uniformly
- snip: |w g|, g = dL/dw (Lee et al., https://arxiv.org/abs/1810.02340)
- grasp: w (H g): what removal would take from the gradient's flow (Wang et al., https://arxiv.org/abs/2002.07376, eq. 8, whose score is its
  negative: the highest are removed there)
- synflow: |w dR/dw| of R = the sum of the outputs of a network of absolute weights, again after each of 100 steps of an exponential schedule
  (Tanaka et al., https://arxiv.org/abs/2006.05467). Its input of ones would give every token the same value, and queries and keys no score, so it is
  the absolute embeddings of tokens drawn at random; norms and attention stay as they are.

L is the summed next-token loss. Shapes: N = windows, L = tokens of a window, R, C = rows and columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from llmprune.allocation.erk import by_shape, shared
from llmprune.errors import RequestError
from llmprune.maths.linalg import drop_smallest
from llmprune.model.matrices import Matrix
from llmprune.training.masks import Masks
from llmprune.types import Mask, Pattern

CRITERIA = ("magnitude", "random", "snip", "grasp", "synflow")
ON_DATA = ("snip", "grasp")  # criteria of a loss
THRESHOLD = "threshold"
ALLOCATIONS = (THRESHOLD, "uniform", "erk")  # the first: one threshold for all scores of the model
# snip, grasp and synflow have one threshold in their papers. In a transformer that leaves queries and keys without weights, since little of the loss
# depends on them before training: their ratios are by shape here, unless a threshold is asked for
USUAL = {"magnitude": "uniform"}
ROUNDS = 100  # of synflow
PROBE = (1, 32)  # windows and tokens of synflow's input

Place: TypeAlias = tuple[str, int]  # a parameter, and the number of a matrix in it
Scores: TypeAlias = dict[str, list[Tensor]]  # parameter name -> scores [R, C] of each matrix in it; the smallest are masked
Chosen: TypeAlias = dict[str, list[Matrix]]


def initial_masks(
    model: PreTrainedModel,
    chosen: Chosen,
    criterion: str,
    pattern: Pattern,
    sparsity: float,
    allocation: str,
    ids_NL: Tensor | None = None,
    seed: int = 0,
) -> Masks:
    """Masks for the chosen matrices of a model, by full parameter name. ids_NL: the windows of a loss. The model's weights stay as they are.

    Raises RequestError where a matrix would lose all its weights.
    """
    with ready(model, chosen) as weights:

        def choose(scores: Scores, share: float) -> dict[str, Tensor]:
            return masked(scores, weights, chosen, pattern, share, allocation)

        if criterion == "synflow":
            keep = synflow(model, weights, chosen, choose, sparsity, seed, 1 if pattern.local else ROUNDS)
        else:
            keep = choose(scores_of(model, weights, chosen, criterion, ids_NL, seed), sparsity)
    collapsed = [name for name, mask in keep.items() if not all(bool(m.view_of(mask).any()) for m in chosen[name])]
    if collapsed:
        raise RequestError(
            f"{criterion} at sparsity {sparsity:g}: {collapsed[0]} would lose all its weights", "give --allocation erk, or a lower sparsity"
        )
    return Masks(keep)


@contextmanager
def ready(model: PreTrainedModel, chosen: Chosen) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters that masks are made for, in a model that can be differentiated twice; all as before afterwards."""
    wanted = {name: model.get_parameter(name) for name in chosen}
    modes, before = {m: m.training for m in model.modules()}, {p: p.requires_grad for p in model.parameters()}
    experts = model.config._experts_implementation
    model.eval().requires_grad_(False)
    model.set_experts_implementation("eager")
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            yield wanted
    finally:
        model.set_experts_implementation(experts)
        for parameter, asked in before.items():
            parameter.requires_grad_(asked)
        for module, training in modes.items():
            module.training = training


def scores_of(model: PreTrainedModel, weights: dict[str, nn.Parameter], chosen: Chosen, criterion: str, ids_NL: Tensor | None, seed: int) -> Scores:
    """The scores of every criterion but synflow."""
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return {name: [torch.rand(m.rows, m.columns, generator=generator) for m in ms] for name, ms in chosen.items()}
    if criterion == "magnitude":
        whole = {name: parameter.detach().abs() for name, parameter in weights.items()}
    else:
        assert ids_NL is not None
        gradients = summed(model, weights, ids_NL)
        if criterion == "grasp":
            flow = summed(model, weights, ids_NL, gradients)
            whole = {name: parameter.detach() * flow[name] for name, parameter in weights.items()}
        else:
            whole = {name: (parameter.detach() * gradients[name]).abs() for name, parameter in weights.items()}
    return {name: [m.view_of(whole[name]).float() for m in ms] for name, ms in chosen.items()}


def summed(model: PreTrainedModel, weights: dict[str, nn.Parameter], ids_NL: Tensor, along: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """dL/dw, one window at a time; with ``along`` = v, the products H v of the Hessian instead."""
    totals = {name: torch.zeros_like(parameter) for name, parameter in weights.items()}
    for ids_L in ids_NL.split(1):
        logits_LV = model(input_ids=ids_L, use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits_LV.float(), ids_L[0, 1:], reduction="sum")
        found = torch.autograd.grad(loss, list(weights.values()), create_graph=along is not None, materialize_grads=True)
        if along is not None:
            inner = sum((g * along[name]).sum() for name, g in zip(weights, found, strict=True))
            found = torch.autograd.grad(inner, list(weights.values()), materialize_grads=True)  # type: ignore[arg-type]
        for name, value in zip(weights, found, strict=True):
            totals[name] += value
    return totals


def synflow(
    model: PreTrainedModel,
    weights: dict[str, nn.Parameter],
    chosen: Chosen,
    choose: Callable[[Scores, float], dict[str, Tensor]],
    sparsity: float,
    seed: int,
    rounds: int,
) -> dict[str, Tensor]:
    """Masks after some rounds, each of which keeps (1 - sparsity) ** (1 / rounds) of what the one before kept."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings()
    table_VD = embeddings.get_parameter("weight")
    ids_NL = torch.randint(table_VD.shape[0], PROBE, generator=generator, device="cpu").to(table_VD.device)
    keep = {name: torch.ones_like(parameter, dtype=torch.bool) for name, parameter in weights.items()}
    with absolute(model) as values:
        entering_NLD = embeddings(ids_NL).detach()
        for step in range(1, rounds + 1):
            for name, parameter in weights.items():
                parameter.data = values[name] * keep[name]
            total = model(inputs_embeds=entering_NLD, use_cache=False).logits.sum()
            found = dict(zip(weights, torch.autograd.grad(total, list(weights.values()), materialize_grads=True), strict=True))
            scores = {name: [m.view_of((weights[name].detach() * found[name]).abs()) for m in ms] for name, ms in chosen.items()}
            keep = choose(scores, 1 - (1 - sparsity) ** (step / rounds))
    return keep


@contextmanager
def absolute(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """The model with absolute weights in float64, which are yielded by name; as before afterwards."""
    before = {parameter: parameter.data for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.data = parameter.data.double().abs()
        yield {name: parameter.data for name, parameter in model.named_parameters()}
    finally:
        for parameter, value in before.items():
            parameter.data = value


def masked(scores: Scores, weights: dict[str, nn.Parameter], chosen: Chosen, pattern: Pattern, sparsity: float, allocation: str) -> dict[str, Tensor]:
    """The masks that keep the largest scores, of whole parameters."""
    places = {(name, number): score_RC for name, found in scores.items() for number, score_RC in enumerate(found)}
    if allocation == THRESHOLD and not pattern.local:
        kept = under_one_threshold(places, sparsity)
    else:
        ratios = ratios_of("uniform" if pattern.local else allocation, places, sparsity)
        kept = {
            place: pattern.project(score_RC, pattern.dropped(score_RC.shape[0], score_RC.shape[1], ratios[place]))
            for place, score_RC in places.items()
        }
    keep = {name: torch.ones_like(parameter, dtype=torch.bool) for name, parameter in weights.items()}
    for (name, number), mask_RC in kept.items():
        chosen[name][number].view_of(keep[name]).copy_(mask_RC)
    return keep


def under_one_threshold(places: dict[Place, Tensor], sparsity: float) -> dict[Place, Mask]:
    """The smallest scores of all matrices together are masked."""
    together = torch.cat([score_RC.flatten() for score_RC in places.values()])
    keep = drop_smallest(together, round(sparsity * len(together))).split([score_RC.numel() for score_RC in places.values()])
    return {place: mask.view(score_RC.shape) for (place, score_RC), mask in zip(places.items(), keep, strict=True)}


def ratios_of(allocation: str, places: dict[Place, Tensor], sparsity: float) -> dict[Place, float]:
    """The share that each matrix loses, by its shape."""
    if allocation == "uniform":
        return dict.fromkeys(places, sparsity)
    names = {f"{name}[{number}]": (name, number) for name, number in places}
    shares = {key: by_shape(*places[place].shape) for key, place in names.items()}
    ratios, _ = shared(shares, {key: places[place].numel() for key, place in names.items()}, sparsity)
    return {place: ratios[key] for key, place in names.items()}
