"""What can be wrong with a user's own method: its result, and its changes to its inputs; and small inputs to try it on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.types import Stat, Stats


def wrong_on(weight_RC: Tensor, stats: Stats, attempt: Callable[[], str]) -> str:
    """What is wrong with an attempt, or with what it does to its inputs."""
    copies = {key: value.clone() for key, value in _tensors(weight_RC, stats).items()}
    wrong = attempt()
    changed = [key for key, value in _tensors(weight_RC, stats).items() if not value.equal(copies[key])]
    return wrong or (f"changes {changed[0]} in place" if changed else "")


def fault(score_RC: Any, weight_RC: Tensor) -> str:
    """What is wrong with scores; usually nothing."""
    from torch import Tensor

    if not isinstance(score_RC, Tensor):
        return f"gives {type(score_RC).__name__}, not a tensor"
    if score_RC.shape != weight_RC.shape:
        return f"gives scores {list(score_RC.shape)} for weights {list(weight_RC.shape)}"
    if not score_RC.is_floating_point():
        return f"gives {str(score_RC.dtype).removeprefix('torch.')}, not floating-point scores"
    if score_RC.device != weight_RC.device:
        return f"gives scores on {score_RC.device} for weights on {weight_RC.device}"
    return "gives scores that are NaN" if bool(score_RC.isnan().any()) else ""


def fault_of_pruned(pruned: Any, weight_RC: Tensor, drop: int) -> str:
    """What is wrong with a solver's result; usually nothing."""
    import torch

    from llmprune.types import Pruned

    if not isinstance(pruned, Pruned):
        return f"gives {type(pruned).__name__}, not an llmprune.types.Pruned"
    for name, value, dtype in (("weight_RC", pruned.weight_RC, weight_RC.dtype), ("keep_RC", pruned.keep_RC, torch.bool)):
        if not isinstance(value, torch.Tensor) or value.shape != weight_RC.shape or value.dtype != dtype or value.device != weight_RC.device:
            return f"gives a {name} that is not a {str(dtype).removeprefix('torch.')} tensor {list(weight_RC.shape)} on {weight_RC.device}"
    dropped = int((~pruned.keep_RC).sum())
    if dropped != drop:
        return f"drops {dropped} of {weight_RC.numel()} weights, not {drop}"
    if bool((pruned.weight_RC[~pruned.keep_RC] != 0).any()):
        return "gives weights that are not zero where keep_RC is False"
    return "" if bool(pruned.weight_RC.isfinite().all()) else "gives weights that are not finite"


def made_up(needs: frozenset[Stat], rows: int, columns: int) -> tuple[Tensor, Stats]:
    """Small weights, and positive statistics of the shapes that their names end in."""
    import torch

    from llmprune.types import STATISTICS, Stats, shape_of

    draw = torch.Generator().manual_seed(0)
    sizes = {"R": rows, "C": columns}
    values: dict[str, Any] = {}
    for need, field in STATISTICS.items():
        if need in needs:
            shape = shape_of(field.name)
            value = torch.rand([sizes[letter] for letter in shape], generator=draw) + 0.1
            values[field.name] = value @ value.T + torch.eye(columns) if shape == "CC" else value
    return torch.randn(rows, columns, generator=draw), Stats(tokens=64, grad_tokens=64, grad_windows=4, **values)


def _tensors(weight_RC: Tensor, stats: Stats) -> dict[str, Tensor]:
    from torch import Tensor

    return {"its weights": weight_RC} | {key: value for key, value in vars(stats).items() if isinstance(value, Tensor)}
